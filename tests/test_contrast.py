"""Records with and without negatives in one run, and runs in which nothing can be contrasted."""

import logging

import pytest
from store_material import make_tokenizer, write_jsonl

from ds_embed.data.batch import assemble_batch
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.settings import DataArguments, StepArguments
from ds_embed.training.prepare import check_contrast, check_store, sample_order

TOKENIZER = make_tokenizer()
PAIRS = [{"query": f"q{n}", "pos_doc": f"d{n}"} for n in range(12)]
WITH = [pair | {"neg_doc": [f"n{number}", f"m{number}"]} for number, pair in enumerate(PAIRS)]


def check(tmp_path, records, *, hard_negatives=0, size=4, **settings):
    """What is said of a run over `records`: its check, and that of its first batches. Returns these."""
    path = write_jsonl(tmp_path / "train.jsonl", records)
    form = TextFormat("", 12, True)
    store = TrainingStore.open(build_training_store([path], TOKENIZER, form, form, hard_negatives, tmp_path))
    data = DataArguments(train_files=[str(path)], hard_negatives=hard_negatives)
    step = StepArguments(global_batch_size=size, **settings)
    check_store(store, data, step)
    order = sample_order(store, data, step, 1)
    batches = [
        assemble_batch(store, order, first_sample=n * size, num_queries=size, hard_negatives=hard_negatives)
        for n in range(4)
    ]
    check_contrast(batches, store, [step.negatives], "--train_files")
    return batches


def test_those_without_negatives_train_against_the_batch(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    batches = check(tmp_path, PAIRS[:6] + WITH[6:], hard_negatives=2)
    assert "6 of 12 records (50.0%) have no hard negatives" in caplog.text
    for batch in batches:
        has_own = batch.records >= 6
        assert (batch.own_negatives >= 0).all(1).tolist() == has_own.tolist()
        assert (batch.own_negatives < 0).all(1).tolist() == (~has_own).tolist()
        assert len(batch.texts) == 8 + 2 * has_own.sum()  # nothing is encoded to fill a place


LABELS = [{"query": f"q{n}", "pos_doc": "good" if n % 2 else "bad"} for n in range(12)]
CONSTANT = [{"query": "the label", "pos_doc": f"d{n}"} for n in range(12)]


@pytest.mark.parametrize(
    "records, settings, words",
    [
        (PAIRS, dict(size=1), ["--train_files", "the loss is 0", "is alone in its batch", "--global_batch_size"]),
        (
            [PAIRS[0] | {"query": f"q{n}"} for n in range(12)],
            {},
            ["no query has a negative", "is one of its positives"],
        ),
        (CONSTANT, dict(symmetric=True), ["no query has a negative", "train.jsonl:"]),
        (PAIRS, dict(hard_negatives=1), ["--hard_negatives 1", "no record has a neg_doc", "train.jsonl:1"]),
        (
            [{"query": "q", "pos_doc": f"d{n}", "neg_doc": f"d{n - 1}"} for n in range(12)],
            dict(hard_negatives=1, size=3),
            ["no query has a negative"],
        ),
        (
            [*WITH[:2], *PAIRS[2:]],
            dict(hard_negatives=1, negatives="pair"),
            ["train.jsonl:3", "--negatives pair", "10 of 12"],
        ),
        (PAIRS, dict(negatives="pair"), ["--negatives pair", "--hard_negatives 1 or more"]),
        (PAIRS, dict(hardness_weight=5.0), ["--hardness_weight 5", "--hard_negatives is 0", "1 or more"]),
        (PAIRS, dict(negatives="hard"), ["--negatives hard", "--hard_negatives 1 or more"]),
    ],
)
def test_a_run_in_which_nothing_can_be_contrasted_is_refused(tmp_path, records, settings, words):
    if settings.get("hard_negatives") and "d-1" in str(records):
        records[0]["neg_doc"] = "d5"
    with pytest.raises(ValueError) as caught:
        check(tmp_path, records, **settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_queries_without_negatives_are_told_with_their_share(tmp_path, caplog):
    check(tmp_path, LABELS, size=2)
    assert (
        "% of the queries of the first batches have no negative and contribute nothing to the loss, such as the one at"
        in caplog.text
    )
    caplog.clear()
    check(tmp_path, PAIRS)
    assert "contribute nothing" not in caplog.text
