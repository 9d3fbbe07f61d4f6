"""Held-out files: how their records become batches, and what is said of files and settings that do not fit."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import make_tokenizer, make_training_file
from transformers import AutoTokenizer

from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.settings import DataArguments, StepArguments, ValidationArguments
from ds_embed.training.run_folder import RunFolder, lines_up_to
from ds_embed.training.validation import Validation, _Encode

HELD_OUT, BATCH = 22, 8


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("held_out")
    make_tokenizer(root / "llama", bert=False)
    make_training_file(root / "held_out.jsonl", HELD_OUT, num_negatives=1)
    records = [json.loads(line) for line in open(root / "held_out.jsonl")]
    write(root / "queries.jsonl", [{key: record[key] for key in ("query", "query_id", "doc_id")} for record in records])
    write(root / "docs.jsonl", [{key: record[key] for key in ("pos_doc", "doc_id")} for record in records])
    return root


def test_batches_of_held_out_records(place, tmp_path):
    """Each record is counted once, in a full batch; with homogeneous batching in one of its own file."""
    make_training_file(tmp_path / "other.jsonl", 9, num_negatives=1, seed=4)
    files = [str(place / "held_out.jsonl"), str(tmp_path / "other.jsonl")]
    form = TextFormat("", 24, True)
    tokenizer = AutoTokenizer.from_pretrained(place / "llama")
    path = build_training_store(files, tokenizer, form, form, 1, tmp_path / "cache")
    for batching in ("mixed", "homogeneous"):
        measured = SimpleNamespace(
            store=TrainingStore.open(path),
            data=DataArguments(train_files=files, batching=batching, hard_negatives=1),
            step=StepArguments(global_batch_size=BATCH),
            seed=3,
        )
        batches = list(Validation._batches(measured))
        assert [batch.num_queries for batch, _ in batches] == [BATCH] * (4 if batching == "mixed" else 5)
        assert sorted(record for batch, first in batches for record in batch.records[first:]) == list(range(31))
        pure = [len(set(batch.records >= HELD_OUT)) == 1 for batch, _ in batches]
        assert all(pure) if batching == "homogeneous" else not all(pure)
        assert all(len(set(batch.records)) == BATCH for batch, _ in batches)


def test_what_a_model_caches_serves_training():
    class Engine:
        table = None

        def __call__(self, ids, lengths, has_padding):
            if self.table is None:
                self.table = torch.ones(2)  # as rotary tables are made in the first pass
            return ids * self.table, torch.zeros(1)  # with a learned temperature

    engine = Engine()
    with torch.inference_mode():
        rows = _Encode(engine, SimpleNamespace(agreed=lambda: None))(torch.ones(3, 2), torch.ones(3), False)
    weight = torch.ones(2, requires_grad=True)
    (weight * engine.table).sum().backward()
    assert rows.shape == (3, 2) and weight.grad.tolist() == [1, 1]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(best_metric="R@7"), ["--best_metric R@7", "is not computed", "nDCG@10", "val_loss"]),
        (dict(val_metrics=["nDGC@10"]), ["--val_metrics", "nDGC@10"]),
        (dict(val_doc_files="twice"), ["--val_doc_files", "'d3'", "more than once"]),
        (dict(val_doc_files="few"), ["--val_query_files", "'d21'", "not in the corpus"]),
        (dict(val_files="one"), ["--val_files: no query has a negative", "one.jsonl:1", "alone in its batch"]),
    ],
)
def test_held_out_files_that_do_not_fit(place, tmp_path, settings, words):
    lines = (place / "docs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "twice.jsonl").write_text("".join([*lines, lines[3]]))
    (tmp_path / "few.jsonl").write_text("".join(lines[:-1]))
    write(tmp_path / "one.jsonl", [{"query": "w1", "pos_doc": "w2", "neg_doc": "w2 "}])
    good = dict(val_files="held_out", val_query_files="queries", val_doc_files="docs")
    for name, value in (good | settings).items():
        if name.endswith("_files"):
            root = place if (place / f"{value}.jsonl").exists() else tmp_path
            settings = settings | {name: [str(root / f"{value}.jsonl")]}
    card = EmbeddingCard("last", "query: ", "passage: ", 24, 24, True, "base", 0)
    with pytest.raises(ValueError) as caught:
        Validation(
            World.alone(),
            ValidationArguments(**settings),
            DataArguments(
                train_files=[str(place / "held_out.jsonl")], hard_negatives=1, cache_dir=str(tmp_path / "cache")
            ),
            StepArguments(),
            1,
            AutoTokenizer.from_pretrained(place / "llama"),
            card,
            RunFolder(str(tmp_path / "run")),
        )
    assert all(word in str(caught.value) for word in words), caught.value


def test_log_is_cut_back_to_the_last_validation_that_counts():
    values = [{"step": 0, "RR": 1}, {"step": 1, "loss": 1}, {"step": 1, "val_loss": 2}]
    lines = [json.dumps(line) + "\n" for line in values]
    assert lines_up_to("".join(lines), 1, 1) == lines
    assert lines_up_to("".join(lines), 1, 0) == lines[:2]  # step 1 was saved when a signal had cut its validation short
    assert lines_up_to("".join(lines), 0) == []


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(val_check_interval=5), ["--val_check_interval 5", "--val_files"]),
        (dict(val_sets=["/absent"]), ["--val_sets /absent", "NAME=FOLDER"]),
        (dict(val_sets=["a=/absent"]), ["--val_sets a=/absent", "queries.jsonl", "no such file"]),
        (dict(val_sets=["mean=/absent"]), ["--val_sets mean=/absent", "the name mean is reserved"]),
        (dict(val_each_epoch=True), ["--val_each_epoch true", "--val_files"]),
        (dict(val_query_files="queries"), ["--val_query_files", "--val_doc_files"]),
        (dict(val_files="absent"), ["--val_files", "no such file"]),
        (dict(val_files="held_out", val_metrics=["nDCG@10"]), ["--val_metrics", "--val_query_files"]),
        (dict(val_files="held_out", val_save_embeddings=True), ["--val_save_embeddings true", "--val_query_files"]),
        (dict(val_files="held_out", early_stopping_patience=2), ["_patience 2", "--val_check_interval"]),
        (dict(val_files="held_out", early_stopping_min_delta=0.1), ["min_delta 0.1", "--early_stopping_patience"]),
        (dict(val_files="held_out", load_best_at_end=True, save_top_k=0), ["--load_best_at_end true", "--save_top_k"]),
        (dict(val_files="held_out", save_top_k=-1), ["--save_top_k -1", "at least 0"]),
        (dict(best_metric="val_loss"), ["--best_metric", "--val_files"]),
    ],
)
def test_settings_that_do_not_fit(place, settings, words):
    files = {name: [str(place / f"{value}.jsonl")] for name, value in settings.items() if name.endswith("_files")}
    with pytest.raises(ValueError) as caught:
        ValidationArguments(**settings | files)
    assert all(word in str(caught.value) for word in words), caught.value
