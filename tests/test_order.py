"""Samples from several files: proportions, purity, and every record once per pass of its file."""

import numpy as np
import pytest

from ds_embed.data.batch import choose_negatives
from ds_embed.data.order import SampleOrder, sample_records
from ds_embed.settings import DataArguments, StepArguments
from ds_embed.training.prepare import sample_order

SIZES = (50, 7, 300)
SHARES = (0.5, 0.2, 0.3)
HOMOGENEOUS = [None, 8]


def order(seed=3, batch_size=None, sizes=SIZES, shares=SHARES):
    return SampleOrder(seed, sizes, shares, batch_size)


def by_counting(sources):
    """How many before each have the same source: what the closed form must equal."""
    return np.array([int((sources[:i] == source).sum()) for i, source in enumerate(sources)])


@pytest.mark.parametrize("batch_size", HOMOGENEOUS)
@pytest.mark.parametrize("shares", [SHARES, (1 / 3, 1 / 3, 1 / 3), (0.001, 0.002, 0.997), (0.98, 0.01, 0.01)])
def test_place_in_the_stream_is_the_number_of_earlier_samples(batch_size, shares):
    sources, places = order(batch_size=batch_size, shares=shares).places(0, 3000)
    assert (places == by_counting(sources)).all()


@pytest.mark.parametrize("start", [0, 12345 * 8, 2**32])
def test_any_stretch_has_the_proportions(start):
    for length in (8, 64, 1000):
        sources, _ = order().places(start, length)
        counts = np.bincount(sources, minlength=3)
        assert np.abs(counts - length * np.array(SHARES)).max() <= 2
    sources, _ = order(batch_size=8).places(start, 8 * 500)
    assert np.abs(np.bincount(sources, minlength=3) / 8 - 500 * np.array(SHARES)).max() <= 2


@pytest.mark.parametrize("batch_size", HOMOGENEOUS)
def test_every_record_once_per_pass_of_its_file(batch_size):
    records = order(batch_size=batch_size).records(0, 8 * 400)
    sources = np.searchsorted(np.cumsum(SIZES), records, side="right")
    for source, size in enumerate(SIZES):
        stream = records[sources == source] - sum(SIZES[:source])
        passes = stream[: len(stream) // size * size].reshape(-1, size)
        assert len(passes) >= 1
        assert all(sorted(one) == list(range(size)) for one in passes)
    first = records[sources == 0][:100].reshape(2, 50)
    assert (first[0] != first[1]).any()  # each pass has an order of its own


@pytest.mark.parametrize("batch_size", HOMOGENEOUS)
def test_position_and_seed_alone_decide(batch_size):
    whole = order(batch_size=batch_size).records(0, 800)
    pieces = [order(batch_size=batch_size).records(start, 16) for start in range(0, 800, 16)]
    assert (whole == np.concatenate(pieces)).all()
    assert (whole != order(seed=4, batch_size=batch_size).records(0, 800)).any()


def test_a_homogeneous_batch_has_one_source_and_a_mixed_one_several():
    per_batch = order(batch_size=8).places(0, 8 * 300)[0].reshape(300, 8)
    assert (per_batch == per_batch[:, :1]).all() and len(np.unique(per_batch)) == 3
    assert all(len(np.unique(batch)) == 3 for batch in order().places(0, 8 * 300)[0].reshape(300, 8)[::10])


def test_without_probabilities_all_files_are_one_stream():
    assert (SampleOrder(5, SIZES).records(40, 700) == sample_records(5, sum(SIZES), 40, 700)).all()


def clustered(seed=3, sizes=(40, 200), shares=None, num_documents=24):
    """Records of a query, a positive that about ten share, and two negatives out of the positive's family of four."""
    rng = np.random.default_rng(0)
    positives = rng.integers(0, num_documents, sum(sizes))
    negatives = positives[:, None] // 4 * 4 + rng.integers(0, 4, (sum(sizes), 2))
    queries = 1000 + np.arange(sum(sizes))
    keys = np.column_stack([queries, positives, negatives]).ravel()
    first_text = np.arange(0, len(keys) + 1, 4)
    return SampleOrder(seed, sizes, shares, documents=(first_text, keys)), keys.reshape(-1, 4)[:, 1:]


@pytest.mark.parametrize("shares", [None, (0.3, 0.7)])
def test_a_clustered_stream_has_each_record_once_a_pass_and_depends_on_the_position_alone(shares):
    whole = clustered(shares=shares)[0].records(0, 720)
    pieces = [clustered(shares=shares)[0].records(start, 24) for start in range(0, 720, 24)]
    assert (whole == np.concatenate(pieces)).all()
    going = clustered(shares=shares)[0]  # what it keeps of passes changes nothing, in whatever order they are asked for
    assert all((going.records(start, 24) == whole[start : start + 24]).all() for start in (696, 0, 240, 228, 696))
    assert (whole != clustered(seed=4, shares=shares)[0].records(0, 720)).any()
    sources = (whole >= 40).astype(int) if shares else np.zeros(720, int)
    sizes = (40, 200) if shares else (240,)
    for source, size in enumerate(sizes):
        stream = whole[sources == source]
        passes = stream[: len(stream) // size * size].reshape(-1, size) - (40 if source else 0)
        assert len(passes) > 1 and all(sorted(one) == list(range(size)) for one in passes)
        assert (passes[0] != passes[1]).any()


def test_a_clustered_batch_shares_documents_and_comes_in_another_order_each_pass():
    order, documents = clustered()
    batches = order.records(0, 3 * 240).reshape(-1, 24)
    mixed = SampleOrder(3, (40, 200)).records(0, 3 * 240).reshape(-1, 24)

    def mean_distinct(batches, columns=slice(None)):
        return np.mean([len(np.unique(documents[batch, columns])) for batch in batches])

    assert mean_distinct(batches, 0) < 0.4 * mean_distinct(mixed, 0)  # the records of one positive
    assert mean_distinct(batches) < 0.4 * mean_distinct(mixed)  # and groups that have negatives in common
    first = [documents[batch[0], 0] for batch in batches[::10]]
    assert len(set(first)) > 1


class Store:
    def __init__(self, sizes):
        self.file_sizes, self.num_records = sizes, sum(sizes)


def arguments(tmp_path, num_files, **settings):
    files = [tmp_path / f"{i}.jsonl" for i in range(num_files)]
    for file in files:
        file.touch()
    return DataArguments(train_files=list(map(str, files)), **settings)


def test_order_of_a_run(tmp_path):
    step = StepArguments(global_batch_size=5)
    plain = sample_order(Store(SIZES), arguments(tmp_path, 3), step, seed=1)
    assert plain == SampleOrder(1, SIZES)
    weighted = sample_order(Store(SIZES), arguments(tmp_path, 3, sampling_probabilities=[5, 2, 3]), step, seed=1)
    assert weighted.probabilities == pytest.approx(SHARES) and weighted.batch_size is None
    by_size = sample_order(Store(SIZES), arguments(tmp_path, 3, batching="homogeneous"), step, seed=1)
    assert by_size.probabilities == pytest.approx(np.array(SIZES) / 357) and by_size.batch_size == 5
    with pytest.raises(ValueError, match="1.jsonl has 7 records, fewer than --global_batch_size 8"):
        big = StepArguments(global_batch_size=8)
        sample_order(Store(SIZES), arguments(tmp_path, 3, batching="homogeneous"), big, seed=1)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(sampling_probabilities=[0.5]), "--sampling_probabilities 0.5: has 1 values, but --train_files has 2"),
        (dict(sampling_probabilities=[0.5, 0.0]), "--sampling_probabilities 0.5 0.0: each must be greater than 0"),
        (dict(batching="sorted"), "--batching sorted: choose one of"),
        (dict(batching="clustered", positives="random"), "--batching clustered: needs fixed positives"),
        (dict(hard_negatives_sampling="last"), "--hard_negatives_sampling last: choose one of"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, 2, **settings)


def choose(first_sample, available, wanted, sampling):
    samples = np.arange(first_sample, first_sample + len(available))
    return choose_negatives(1, samples, np.array(available), wanted, sampling)


@pytest.mark.parametrize("sampling", ["first", "random"])
def test_negatives_are_a_function_of_the_sample_and_distinct_while_there_are_enough(sampling):
    available = [4, 7, 2, 30, 4, 1] * 50
    whole = choose(100, available, 4, sampling)
    assert (whole[60:] == choose(160, available[60:], 4, sampling)).all()
    for row, count in zip(whole, available):
        assert ((row >= 0) & (row < count)).all()
        assert len(set(row)) == min(4, count)
        if sampling == "first":
            assert row[: min(4, count)].tolist() == list(range(min(4, count)))


def test_random_negatives_are_uniform_and_differ_between_samples():
    drawn = choose(0, [5] * 4000, 2, "random")
    counts = np.bincount(drawn.ravel(), minlength=5)
    assert ((counts - 1600) ** 2 / 1600).sum() < 18.5  # p < 0.001 beyond
    first = np.bincount(drawn[:, 0], minlength=5)
    assert ((first - 800) ** 2 / 800).sum() < 18.5
