"""Material of the token-store tests: a tokenizer made in the test, records, and short names."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ds_embed.data import store_writer
from ds_embed.data.store import build_training_store
from ds_embed.data.tokenize import TextFormat

QUERY = TextFormat("query: ", 12, True)
DOCUMENT = TextFormat("passage: ", 16, True)
RECORDS = [
    {
        "query": "where is the lake",
        "pos_doc": "behind the hill",
        "neg_doc": ["a b", "c", "d"],
        "query_id": "q0",
        "doc_id": "d0",
    },
    {"query": "how deep", "pos_doc": "x " * 40, "neg_doc": "c"},
    {"query": "a b", "pos_doc": "c", "neg_doc": ["where is the lake", "how deep"], "doc_id": "d1"},
    {"query": "how deep", "pos_doc": "behind the hill", "query_id": "q1", "doc_id": "d0"},
    {"query": "é 丘", "pos_doc": "</s> x", "neg_doc": []},
]


def make_tokenizer(vocab_size=280):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["query passage the lake hill"] * 3,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(store_writer, "_CHUNK_TEXTS", 4)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def build(files, tokenizer, cache_dir, query=QUERY, document=DOCUMENT, num_negatives=2, **more):
    return build_training_store(files, tokenizer, query, document, num_negatives, cache_dir, **more)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected_texts(record, num_negatives):
    negatives = record.get("neg_doc", [])
    negatives = [negatives] if isinstance(negatives, str) else negatives
    return [record["query"], record["pos_doc"], *negatives[:num_negatives]]
