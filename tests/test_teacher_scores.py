"""A teacher's scores from the record to the loss: each beside its own text, and a clear error where one lacks."""

import json

import numpy as np
import pytest
from tiny import make_tokenizer, make_training_file, write_teacher_scores

from ds_embed.data.batch import assemble_batch
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.settings import DataArguments, StepArguments
from ds_embed.training.prepare import check_store


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder, bert=True)
    return AutoTokenizer.from_pretrained(folder)


def build(path, tokenizer, num_negatives):
    text_format = TextFormat("", 32, False)
    store = build_training_store([path], tokenizer, text_format, text_format, num_negatives, path.parent / "cache")
    return TrainingStore.open(store)


def check(store, path, hard_negatives=1):
    data = DataArguments(train_files=[str(path)], hard_negatives=hard_negatives)
    check_store(store, data, StepArguments(distillation_weight=1.0))


@pytest.mark.parametrize("sampling", ["first", "random"])
@pytest.mark.parametrize("num_negatives", [None, 2])
def test_scores_follow_their_texts(tmp_path, tokenizer, num_negatives, sampling):
    path = write_teacher_scores(make_training_file(tmp_path / "a.jsonl", 20, num_negatives=3))
    store = build(path, tokenizer, num_negatives)
    records = [json.loads(line) for line in open(path)]
    order = SampleOrder(seed=1, source_sizes=(20,))
    batch = assemble_batch(
        store, order, first_sample=0, num_queries=8, hard_negatives=4, hard_negatives_sampling=sampling
    )
    assert batch.teacher_scores.shape == (8 * 5,)
    for position, (text, score) in enumerate(zip(batch.texts[batch.rows][8:], batch.teacher_scores)):
        query = position if position < 8 else (position - 8) // 4
        record = records[batch.records[query]]
        number = text - store.first_text[batch.records[query]]
        expected = record["pos_score"] if number == 1 else record["neg_scores"][number - 2]
        assert score == pytest.approx(expected, rel=1e-6)
    assert np.isnan(store.scores[store.first_text[:-1]]).all()  # a query has none
    check(store, path)


@pytest.mark.parametrize("missing", ["pos_score", "neg_scores"])
def test_a_record_without_scores_is_named(tmp_path, tokenizer, missing):
    path = write_teacher_scores(make_training_file(tmp_path / "a.jsonl", 6, num_negatives=1))
    records = [json.loads(line) for line in open(path)]
    del records[3][missing], records[5][missing]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    store = build(path, tokenizer, 1)
    with pytest.raises(ValueError, match=r"a.jsonl:4: has no pos_score and neg_scores.*\(2 records lack them\)"):
        check(store, path)
    with pytest.raises(ValueError, match="set --hard_negatives 1 or more"):
        check(store, path, hard_negatives=0)
