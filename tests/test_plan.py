"""The plan of micro-batches and the order of samples: pure functions, the same on every rank."""

from itertools import product

import numpy as np
import pytest

from ds_embed.data.order import sample_records
from ds_embed.data.plan import LARGEST_GAP, ROUND_COST, SMALLEST_MICRO_BATCH, cut_by_length, plan_micro_batches


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("budget", [64, 100, 1000, 10**6])
@pytest.mark.parametrize("num_texts", [1, 5, 64, 333])
def test_every_text_once_within_budget(num_ranks, budget, num_texts):
    rng = np.random.default_rng(num_texts)
    lengths = rng.integers(1, 65, num_texts)
    plan = plan_micro_batches(lengths, budget, num_ranks)
    assert len(plan.micro_batches) == num_ranks
    assert {len(rank) for rank in plan.micro_batches} == {plan.num_micro_batches}
    flat = plan.rank_order()
    assert sorted(flat) == list(range(num_texts))
    assert plan.rank_counts() == [sum(map(len, rank)) for rank in plan.micro_batches]
    padded = [len(b) * lengths[b].max() for rank in plan.micro_batches for b in rank if len(b)]
    assert max(padded) <= budget
    assert plan.num_padded_tokens == sum(padded) and plan.num_tokens == lengths.sum()


def test_balanced_and_tight():
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 2000).clip(4, 512).astype(int)
    plan = plan_micro_batches(lengths, 4096, 4)
    per_rank = [sum(len(b) * lengths[b].max() for b in rank if len(b)) for rank in plan.micro_batches]
    assert max(per_rank) / min(per_rank) < 1.1
    assert plan.padding_share < 0.05
    # A few more micro-batches than the fewest, where that saves padding; never many more.
    fewest = -(-lengths.sum() // (4 * 4096))
    assert plan.num_micro_batches <= 1.5 * fewest + 4


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", [64, 100, 1000, 10**6])
@pytest.mark.parametrize("num_texts", [1, 5, 64, 333])
def test_packed_texts_once_within_budget_in_full_micro_batches(num_ranks, budget, num_texts):
    lengths = np.random.default_rng(num_texts).integers(1, 65, num_texts)
    plan = plan_micro_batches(lengths, budget, num_ranks, is_packed=True)
    assert {len(rank) for rank in plan.micro_batches} == {plan.num_micro_batches}
    assert sorted(plan.rank_order()) == list(range(num_texts))
    tokens = [int(lengths[texts].sum()) for rank in plan.micro_batches for texts in rank]
    assert max(tokens) <= budget and plan.num_padded_tokens == plan.num_tokens == sum(tokens)

    def count(lengths, size):
        """Micro-batches up to this size, text after text."""
        number, left = 0, 0
        for length in lengths:
            number, left = (number, left - length) if length <= left else (number + 1, size - length)
        return number

    assert plan.num_micro_batches == -(-count(sorted(lengths, reverse=True), budget) // num_ranks)
    *full, last = zip(*plan.micro_batches)
    assert all(lengths[texts].sum() > budget - 64 for together in full for texts in together)
    # No smaller size does for the last round.
    rest = [length for texts in last for length in lengths[texts]]
    largest = max(int(lengths[texts].sum()) for texts in last)
    assert largest == max(rest) or count(rest, largest - 1) > num_ranks


def test_packed_micro_batches_of_a_corpus_are_full():
    lengths = np.random.default_rng(1).integers(1, 65, 500)
    batches = cut_by_length(lengths, 300, is_packed=True)
    assert np.array_equal(np.concatenate(batches), np.argsort(-lengths, kind="stable"))
    tokens = [int(lengths[texts].sum()) for texts in batches]
    assert max(tokens) <= 300 and min(tokens[:-1]) > 300 - 64


def cost_of(descending, starts, num_ranks, budget):
    """By the definition: the slowest micro-batch of every round, and a constant."""
    padded = [(b - a) * descending[a] for a, b in zip(starts, [*starts[1:], len(descending)])]
    rounds = [max(padded[i : i + num_ranks]) for i in range(0, len(padded), num_ranks)]
    return sum(rounds) + len(rounds) * budget * ROUND_COST if max(padded) <= budget else np.inf


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_cut_is_nearly_the_best_of_all(num_ranks):
    rng, ratios = np.random.default_rng(num_ranks), []
    for _ in range(25):
        descending = np.sort(rng.lognormal(3, 1, 9).clip(2, 90).astype(int))[::-1]
        budget = int(rng.integers(90, 400))
        cuts = product([False, True], repeat=len(descending) - 1)
        every = ([0, *(1 + np.flatnonzero(cut))] for cut in cuts)
        best = min(cost_of(descending, starts, num_ranks, budget) for starts in every)
        plan = plan_micro_batches(descending, budget, num_ranks)
        batches = [batch for together in zip(*plan.micro_batches) for batch in together if len(batch)]
        ratios.append(cost_of(descending, [batch[0] for batch in batches], num_ranks, budget) / best)
    assert min(ratios) >= 1 and np.mean(ratios) < 1.02 and max(ratios) < 1.15


@pytest.mark.parametrize("num_texts, budget, num_ranks", [(700, 600, 1), (3000, 4096, 2), (1500, 600, 16)])
def test_a_plan_from_some_positions_is_as_good_as_one_from_all(monkeypatch, num_texts, budget, num_ranks):
    """What is left out where texts are many, positions and single decisions, costs next to nothing."""
    rng = np.random.default_rng(num_texts)
    lengths = np.concatenate([rng.normal(15, 4, num_texts // 2), rng.lognormal(4.3, 0.7, num_texts // 2)])
    descending = np.sort(lengths.clip(3, 512).astype(int))[::-1]

    def cost() -> float:
        plan = plan_micro_batches(descending, budget, num_ranks)
        batches = [batch for together in zip(*plan.micro_batches) for batch in together if len(batch)]
        return cost_of(descending, [batch[0] for batch in batches], num_ranks, budget)

    coarse = cost()
    monkeypatch.setattr("ds_embed.data.plan._FEWEST_POSITIONS", num_texts)
    monkeypatch.setattr("ds_embed.data.plan._POSITIONS_PER_ROUND", num_texts)
    monkeypatch.setattr("ds_embed.data.plan._MOST_DECISIONS", num_texts)
    assert coarse < 1.01 * cost()


@pytest.mark.parametrize("seed", range(4))
def test_a_corpus_is_cut_where_texts_get_shorter(seed):
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(1, 6, 3000)).astype(int)
    batches = cut_by_length(lengths, 8192)
    assert sorted(np.concatenate(batches)) == list(range(3000))
    sizes = [len(texts) * lengths[texts].max() for texts in batches]
    assert max(sizes) <= 8192
    for texts, size, following in zip(batches, sizes, batches[1:]):
        longest, next_longest = lengths[texts].max(), lengths[following].max()
        # What ends a micro-batch: no room, or a text that is much shorter.
        assert size + longest > 8192 or (next_longest < longest * (1 - LARGEST_GAP) and size >= SMALLEST_MICRO_BATCH)
        # What goes on in spite of a much shorter text: a micro-batch that is not worth a forward pass.
        assert lengths[texts].min() >= longest * (1 - LARGEST_GAP) or size < SMALLEST_MICRO_BATCH + longest
    assert 1 - lengths.sum() / sum(sizes) < 0.02


def test_text_longer_than_budget():
    with pytest.raises(ValueError, match="--micro_batch_tokens 63: smaller than one text of 64 tokens"):
        plan_micro_batches(np.array([3, 64]), 63, 2)


@pytest.mark.parametrize("num_records", [1, 2, 3, 10, 257, 1000])
def test_each_epoch_is_a_permutation(num_records):
    order = sample_records(7, num_records, 0, 3 * num_records).reshape(3, num_records)
    assert all(sorted(epoch) == list(range(num_records)) for epoch in order)
    if num_records > 100:
        assert not (order[0] == order[1]).all()
        assert abs(np.corrcoef(order[0], np.arange(num_records))[0, 1]) < 0.2
        assert abs(np.corrcoef(order[0], order[1])[0, 1]) < 0.2


def test_order_depends_on_position_alone():
    whole = sample_records(3, 100, 0, 350)
    pieces = [sample_records(3, 100, start, 50) for start in range(0, 350, 50)]
    assert (whole == np.concatenate(pieces)).all()
    assert not (whole == sample_records(4, 100, 0, 350)).all()


def test_order_has_no_short_cycles_over_seeds():
    """The record in first place is uniform over seeds (chi-square, 20 bins, 4000 seeds)."""
    first = np.array([sample_records(seed, 20, 0, 1)[0] for seed in range(4000)])
    counts = np.bincount(first, minlength=20)
    assert ((counts - 200) ** 2 / 200).sum() < 45  # p < 0.001 beyond
