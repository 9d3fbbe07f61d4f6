"""Texts of a batch that are the same tokens are one text."""

import json

import numpy as np
import pytest
from tiny import make_model

from ds_embed.data.batch import assemble_batch, distinct_texts
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.models.loading import find_model, load_tokenizer

# The last document differs from the first behind the length, the second's query is the third's document.
RECORDS = [
    {"query": "w1 w2", "pos_doc": "w3 w4 w5 w6 w7", "neg_doc": ["w8 w9", "w1 w2"]},
    {"query": "w10", "pos_doc": "w8 w9", "neg_doc": ["w3 w4 w5 w6 w7", "w11"]},
    {"query": "w1 w2", "pos_doc": "w10", "neg_doc": ["w3 w4 w5 w6 w12", "w4 w3 w5 w6 w7"]},
]


@pytest.fixture
def make_store(tmp_path):
    def make(document_prefix: str = "") -> TrainingStore:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
        tokenizer = load_tokenizer(find_model(str(make_model(tmp_path / "model", "bert"))), False)
        formats = TextFormat("", 6, False), TextFormat(document_prefix, 6, False)
        return TrainingStore.open(
            build_training_store([tmp_path / "train.jsonl"], tokenizer, *formats, 2, tmp_path / "cache")
        )

    return make


def tokens_by_place(store: TrainingStore) -> tuple[list[list[int]], int]:
    """The tokens of every use as the batch has them, and how many texts it encodes."""
    batch = assemble_batch(store, SampleOrder(0, store.file_sizes), first_sample=0, num_queries=3, hard_negatives=2)
    texts = [store.tokens_of(text).tolist() for text in batch.texts[batch.rows]]
    numbers = np.concatenate([np.repeat(0, 3), np.repeat(1, 3), np.tile([2, 3], 3)])
    records = np.concatenate([batch.records, batch.records, np.repeat(batch.records, 2)])
    assert texts == [store.tokens_of(text).tolist() for text in store.first_text[records] + numbers]
    assert batch.num_tokens_named == sum(map(len, texts)) and batch.lengths.tolist() == [
        len(store.tokens_of(text)) for text in batch.texts
    ]
    return texts, len(batch.texts)


@pytest.mark.parametrize("prefix, wanted", [("", 6), ("query: ", 8)])
def test_equal_tokens_are_one_text_whatever_they_are_used_as(make_store, prefix, wanted):
    texts, num_texts = tokens_by_place(make_store(prefix))
    assert num_texts == len({tuple(tokens) for tokens in texts}) == wanted


def test_texts_whose_keys_agree_by_chance_stay_apart(make_store):
    store = make_store()
    store.text_keys = np.zeros(store.num_texts, np.int64)
    uses = np.arange(store.num_texts)
    texts, rows = distinct_texts(store, uses)
    for use, text in zip(uses, texts[rows]):
        assert store.tokens_of(use).tolist() == store.tokens_of(text).tolist()
