"""One query, one document: what is masked is what the rule of identity says, no more and no less."""

import itertools
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loss_reference import reference
from store_material import make_tokenizer, write_jsonl

from ds_embed.data import identity
from ds_embed.data.batch import assemble_batch
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.job.ranks import World
from ds_embed.settings import StepArguments
from ds_embed.training.step import ContrastiveStep

TOKENIZER = make_tokenizer()
FORMAT = TextFormat("", 12, True)


class BagOfTokens:
    """In place of a model: the unit vector of the sum of its tokens' vectors."""

    vectors = torch.randn(400, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()

    module = SimpleNamespace(is_packed=False)

    def zero_optimization_stage(self):
        return 0

    def __call__(self, ids, lengths, has_padding, prompt_lengths=None):
        is_token = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
        return torch.nn.functional.normalize((self.vectors[ids] * is_token[:, :, None]).sum(1), dim=1)


def open_store(cache, *files, num_negatives=None, formats=(FORMAT, FORMAT)):
    return TrainingStore.open(build_training_store(files, TOKENIZER, *formats, num_negatives, cache))


def loss_of(store, hard_negatives=0, num_queries=None, **settings):
    """The mean loss of the first batch."""
    num_queries = num_queries or store.num_records
    batch = assemble_batch(
        store, SampleOrder(3, store.file_sizes), first_sample=0, num_queries=num_queries, hard_negatives=hard_negatives
    )
    arguments = StepArguments(global_batch_size=num_queries, temperature=0.5, **settings)
    step = ContrastiveStep(BagOfTokens(), store, World.alone(), arguments, 1)
    total, _ = step.evaluate(step.prepare(batch), 0)
    return total / num_queries


def no_negatives_of(batch):
    """(N, M): which documents are no negatives of which queries, by what the loss is given."""
    keys = batch.document_keys
    masked = (keys[: batch.num_queries, None, :] == keys[None, :, :]).any(2)
    masked[tuple(batch.positive_pairs.T)] = True
    return masked


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows_at_once", [5, 1 << 21])
def test_what_is_masked_is_what_the_rule_says(tmp_path, monkeypatch, seed, rows_at_once):
    monkeypatch.setattr(identity, "_ROWS_AT_ONCE", rows_at_once)
    rng = random.Random(seed)
    texts = [f"text {chr(97 + i)}" for i in range(14)]
    files = []
    for name in "ab":
        records = [
            {"query": query, "pos_doc": positive, "neg_doc": rng.sample([t for t in texts if t != positive], 2)}
            for query, positive in zip(rng.choices(["one", "two", "three", *texts], k=30), rng.choices(texts, k=30))
        ]
        # A label with more positives than a batch has documents.
        records += [{"query": "label", "pos_doc": f"{name} {number}"} for number in range(40)]
        files.append(write_jsonl(tmp_path / f"{name}.jsonl", records))
    everything = [json.loads(line) for file in files for line in open(file)]
    positives = {}
    for record in everything:
        positives.setdefault(record["query"], set()).add(record["pos_doc"])
    store = open_store(tmp_path, *files)
    order = SampleOrder(seed, store.file_sizes)
    for first_sample in range(0, 140, 10):
        batch = assemble_batch(store, order, first_sample=first_sample, num_queries=10, hard_negatives=2)
        records = [everything[number] for number in batch.records]
        negatives = [record.get("neg_doc", []) for record in records]
        documents = [record["pos_doc"] for record in records] + list(itertools.chain(*negatives))
        wanted = [[document in positives[record["query"]] for document in documents] for record in records]
        assert no_negatives_of(batch).tolist() == wanted
        places = iter(range(10, len(documents)))
        own = [[next(places) for _ in negative] or [-1, -1] for negative in negatives]
        for query, record in enumerate(records):
            own[query] = [-1 if documents[place] in positives[record["query"]] else place for place in own[query]]
        assert batch.own_negatives.tolist() == own
    assert [file["max_positives"] for file in store.facts()] == [80, 80]
    pairs = [(record["query"], record["pos_doc"]) for record in everything]
    repeated = [pair in pairs[:number] for number, pair in enumerate(pairs)]
    assert [file["num_repeated"] for file in store.facts()] == [sum(repeated[:70]), sum(repeated[70:])]


SIBLINGS = [
    {"query": "who", "pos_doc": "a man", "neg_doc": ["a hat", "a coat"]},
    {"query": "where", "pos_doc": "a lake", "neg_doc": ["a hill", "a man"]},
    {"query": "who", "pos_doc": "a woman", "neg_doc": ["a man", "a shoe"]},
    {"query": "who", "pos_doc": "a child", "neg_doc": ["a lake", "a hat"]},
    {"query": "when", "pos_doc": "a day", "neg_doc": ["a week", "a child"]},
]


@pytest.mark.parametrize(
    "settings, hard_negatives",
    [
        ({}, 0),
        ({}, 2),
        (dict(symmetric=True), 0),
        (dict(symmetric=True, negatives="own"), 2),
        (dict(negatives="pair"), 2),
    ],
)
def test_siblings_without_ids_train_as_siblings_with_them(tmp_path, settings, hard_negatives):
    named = [record | {"query_id": record["query"][:4], "doc_id": record["pos_doc"]} for record in SIBLINGS]
    stores = [
        open_store(tmp_path, write_jsonl(tmp_path / f"{name}.jsonl", records), num_negatives=2)
        for name, records in (("bare", SIBLINGS), ("named", named))
    ]
    bare, with_ids = (loss_of(store, hard_negatives, **settings) for store in stores)
    assert bare == with_ids
    # And it is the loss in which no positive of "who" is a negative of "who".
    batch = assemble_batch(
        stores[0], SampleOrder(3, (5,)), first_sample=0, num_queries=5, hard_negatives=hard_negatives
    )
    records = [SIBLINGS[number] for number in batch.records]
    documents = [r["pos_doc"] for r in records] + [n for r in records for n in r["neg_doc"][:hard_negatives]]
    of_query = {}
    for record in SIBLINGS:
        of_query.setdefault(record["query"], set()).add(record["pos_doc"])
    pairs = [(i, j) for i, r in enumerate(records) for j, d in enumerate(documents) if d in of_query[r["query"]]]
    ids = [
        torch.from_numpy(np.array(stores[0].tokens_of(int(text)), np.int64))[None] for text in batch.texts[batch.rows]
    ]
    table = torch.cat([BagOfTokens()(row, torch.tensor([row.shape[1]]), False) for row in ids]).double()
    keys = torch.arange(len(documents))[:, None]
    expected = reference(
        table, keys, 5, 0.5, settings.get("negatives", "all"), symmetric="symmetric" in settings, pairs=pairs
    )
    assert bare == pytest.approx(expected.item(), rel=1e-5)


def test_equal_ids_of_two_files_are_strangers(tmp_path):
    """Both files number from 0; the loss is that of the files whose ids differ."""
    rng = random.Random(1)
    texts = [f"{a} {b}" for a in ("lake", "hill", "the") for b in ("x", "y", "z", "w")]
    rng.shuffle(texts)
    losses = []
    for kind in ("same", "distinct"):
        files = []
        for name, part in (("rivers", texts[:6]), ("cooking", texts[6:])):
            mark = "" if kind == "same" else name
            records = [
                {"query": part[n], "pos_doc": part[n + 3], "query_id": f"{mark}{n}", "doc_id": f"{mark}{n}"}
                for n in range(3)
            ]
            files.append(write_jsonl(tmp_path / f"{name}-{kind}.jsonl", records))
        store = open_store(tmp_path, *files)
        losses.append(loss_of(store, symmetric=True))
        batch = assemble_batch(store, SampleOrder(3, store.file_sizes), first_sample=0, num_queries=6, hard_negatives=0)
        assert no_negatives_of(batch).tolist() == np.eye(6, dtype=bool).tolist()
    assert losses[0] == losses[1]


def test_equal_is_what_the_model_sees(tmp_path):
    long = "x " * 20
    records = [
        {"query": "one", "pos_doc": long + "a"},  # cut before they differ
        {"query": "two", "pos_doc": long + "b"},
        {"query": "three", "pos_doc": "the hill"},
        {"query": "four", "pos_doc": " the hill "},
        {"query": " one ", "pos_doc": "the lake"},
    ]
    store = open_store(tmp_path, write_jsonl(tmp_path / "a.jsonl", records))
    batch = assemble_batch(store, SampleOrder(3, (5,)), first_sample=0, num_queries=5, hard_negatives=0)
    place = {int(record): number for number, record in enumerate(batch.records)}
    masked = no_negatives_of(batch)
    equal = {(a, b) for a in range(5) for b in range(5) if masked[place[a], place[b]]}
    assert equal == {(n, n) for n in range(5)} | {(0, 1), (1, 0), (2, 3), (3, 2), (0, 4), (4, 0), (4, 1)}


def test_one_document_behind_two_prefixes_is_one(tmp_path):
    """A query behind another instruction is another query; a document stays what it is."""
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"query": "who", "pos_doc": "a man"}, {"query": q, "pos_doc": d}])
        for name, q, d in (("a", "one", "a lake"), ("b", "two", "a hill"))
    ]
    formats = [[TextFormat(prefix, 12, True) for prefix in prefixes] for prefixes in (("ask ", "find "), ("x ", "y "))]
    store = open_store(tmp_path, *files, formats=formats)
    batch = assemble_batch(store, SampleOrder(3, (2, 2)), first_sample=0, num_queries=4, hard_negatives=0)
    place = {int(record): number for number, record in enumerate(batch.records)}
    masked = no_negatives_of(batch)
    equal = {(a, b) for a in range(4) for b in range(4) if masked[place[a], place[b]]}
    assert equal == {(n, n) for n in range(4)} | {(0, 2), (2, 0)}
    assert len(set(store.text_keys[[0, 4]].tolist())) == 2 and store.text_keys[1] == store.text_keys[5]
