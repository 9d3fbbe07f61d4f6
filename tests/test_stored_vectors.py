"""A guide's and a teacher's vectors, from the texts of training files to the end of a run, as users go there."""

import json
import shutil

import numpy as np
import pytest
import torch
from loss_reference import reference
from safetensors.torch import load_file
from tiny import check, launch, make_model, make_training_file
from torch.nn.functional import normalize

from ds_embed.data.batch import assemble_batch
from ds_embed.data.forms import Reading
from ds_embed.data.identity import text_id
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.job.ranks import World
from ds_embed.losses import LossOptions, contrastive_loss
from ds_embed.models.loading import find_model, load_tokenizer
from ds_embed.settings import EncodeArguments, ModelArguments, StepArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.tools.convert.job import ConvertArguments, convert
from ds_embed.training.stored_vectors import StoredVectors
from ds_embed.vectors.embedder import Embedder
from ds_embed.vectors.generate import generate

PREFIXES = dict(query_prefix="query: ", doc_prefix="passage: ", max_length=32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Training files, a student of 32 dimensions, a guide of 48, and the guide's vectors of their texts."""
    root = tmp_path_factory.mktemp("vectors")
    make_model(root / "student", "bert")
    make_model(root / "guide", "bert", seed=1, hidden_size=48)
    files = [make_training_file(root / f"train{n}.jsonl", 30, seed=n) for n in (0, 1)]
    texts = {"input_format": "training", "output_format": "texts", "input": [str(path) for path in files]}
    convert(ConvertArguments(output=str(root / "texts"), **texts))
    arguments = EncodeArguments(
        query_files=[str(root / "texts" / "queries.jsonl")],
        doc_files=[str(root / "texts" / "docs.jsonl")],
        output_prefix=str(root / "out"),
        bf16=False,
        cache_dir=str(root / "cache"),
    )
    generate(World.alone(), ModelArguments(str(root / "guide")), TextArguments(**PREFIXES), arguments)
    return root


def store_of(root, *names, kinds=()):
    text_format = TextFormat("query: ", 24, False)
    tokenizer = load_tokenizer(find_model(str(root / "student")), False)
    files = [root / name for name in names]
    return TrainingStore.open(
        build_training_store(
            files, tokenizer, text_format, text_format, 2, root / "cache", reading=Reading(kinds=kinds)
        )
    )


def stored(root, store, folder="out/consumed_samples0"):
    return StoredVectors(World.alone(), store, "--guide_embeddings", str(root / folder), root / "cache")


def write(root, name, queries, documents, num_dims=4):
    """A folder with vectors of these ids, as sentence-transformers' users would write it; the rows are their places."""
    for kind, subfolder, ids in (("query", "test_queries", queries), ("doc", "test_docs", documents)):
        folder = root / name / subfolder
        folder.mkdir(parents=True)
        np.save(folder / f"{kind}.npy", np.repeat(np.arange(len(ids), dtype=np.float32)[:, None] + 1, num_dims, 1))
        (folder / f"{kind}.ids").write_text("".join(f"{one}\n" for one in ids))
    return name


def records_of(path):
    return [json.loads(line) for line in open(path)]


def test_the_loss_is_that_of_running_the_guide(place):
    store = store_of(place, "train0.jsonl", "train1.jsonl")  # both number their queries and documents from 0
    order = SampleOrder(3, store.file_sizes)
    batch = assemble_batch(store, order, first_sample=0, num_queries=60, hard_negatives=2)
    found = stored(place, store).of(batch)
    records = records_of(place / "train0.jsonl") + records_of(place / "train1.jsonl")
    records = [records[number] for number in batch.records]
    guide = Embedder.from_pretrained(str(place / "guide"), dtype="float32", **PREFIXES)
    documents = [r["pos_doc"] for r in records] + [text for r in records for text in r["neg_doc"]]
    expected = [guide.encode_queries([r["query"] for r in records]), guide.encode_documents(documents)]
    expected = np.concatenate(expected)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    table = normalize(
        torch.randn(len(expected), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1
    )
    keys = torch.from_numpy(batch.document_keys)
    named = dict(guide_margin=0.05, symmetric=True)
    run = reference(
        table, keys, 60, 0.1, pairs=batch.positive_pairs, guide=torch.from_numpy(expected).double(), **named
    )
    got = contrastive_loss(
        table,
        keys,
        torch.from_numpy(batch.own_negatives),
        num_queries=60,
        first_query=0,
        last_query=60,
        temperature=0.1,
        positive_pairs=torch.from_numpy(batch.positive_pairs),
        guide=torch.from_numpy(found).double(),
        options=LossOptions(**named, tile_queries=7, tile_documents=50),
    )
    torch.testing.assert_close(got.sums.loss, run)
    assert run < reference(table, keys, 60, 0.1, pairs=batch.positive_pairs, symmetric=True)  # some were left out


def test_vectors_are_found_by_ids_of_records_and_by_texts_that_have_them(place):
    path = place / "named.jsonl"
    records = records_of(place / "train0.jsonl")[:6]
    records[0]["neg_doc"] = [records[3]["pos_doc"], records[4]["pos_doc"]]  # found under d3 and d4
    del records[5]["doc_id"], records[5]["query_id"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [text for record in records[1:] for text in record["neg_doc"]]
    documents = [*(f"d{n}" for n in range(5)), text_id(records[5]["pos_doc"]), *map(text_id, texts)]
    queries = [text_id(records[5]["query"]), *(f"q{n}" for n in range(5))]
    store = store_of(place, "named.jsonl")
    batch = assemble_batch(store, SampleOrder(0, store.file_sizes), first_sample=0, num_queries=6, hard_negatives=2)
    rows = stored(place, store, write(place, "named", queries, documents)).of(batch)[:, 0].astype(int) - 1
    by_text = {record["query"]: (number + 1) % 6 for number, record in enumerate(records)}
    assert rows[:6].tolist() == [by_text[records[number]["query"]] for number in batch.records]
    assert rows[6:12].tolist() == batch.records.tolist()
    first = batch.records.tolist().index(0)
    assert rows[12 + 2 * first : 14 + 2 * first].tolist() == [3, 4]


def test_texts_of_every_kind_of_file_are_converted_and_found(place):
    labelled, scored = place / "labelled.jsonl", place / "scored.jsonl"
    labelled.write_text("".join(f'{{"text": "w{n} w1", "label": "{n % 2}"}}\n' for n in range(6)))
    scored.write_text("".join(f'{{"query": "w{n}", "pos_doc": "w{n} w2", "score": 0.{n}}}\n' for n in range(4)))
    files = [str(labelled), str(scored), str(place / "train0.jsonl")]
    convert(ConvertArguments(input_format="training", output_format="texts", input=files, output=str(place / "kinds")))
    sides = [records_of(place / "kinds" / name) for name in ("queries.jsonl", "docs.jsonl")]
    ids = [[record[name] for record in side] for side, name in zip(sides, ("query_id", "doc_id"))]
    store = store_of(place, "labelled.jsonl", "scored.jsonl", "train0.jsonl", kinds=("labels", "scored"))
    batch = assemble_batch(store, SampleOrder(0, store.file_sizes), first_sample=0, num_queries=40, hard_negatives=1)
    rows = stored(place, store, write(place, "of kinds", *ids)).of(batch)[:, 0].astype(int) - 1
    keys = [
        text_id(sides[place >= batch.num_queries][row][("query", "pos_doc")[place >= batch.num_queries]])
        for place, row in enumerate(rows)
    ]
    assert keys == [f"{key % 2**64:016x}" for key in store.content_keys[batch.uses].tolist()]


def test_what_does_not_fit_is_refused_by_name(place):
    store = store_of(place, "train0.jsonl")
    records = records_of(place / "train0.jsonl")
    queries = [record["query_id"] for record in records]
    documents = sorted({text_id(text) for record in records for text in (record["pos_doc"], *record["neg_doc"])})
    stored(place, store, write(place, "whole", queries, documents))

    def refused(name, message):
        with pytest.raises(UserError, match=message) as error:
            stored(place, store, name)
        assert str(error.value).startswith(f"--guide_embeddings {place / name}: ") and "\n" not in str(error.value)

    refused(
        write(place, "lacks", queries[2:], documents),
        r"2 of 30 queries have no vector in .*query.npy, such as the query of .*train0.jsonl:1, .*output_format texts",
    )
    refused(write(place, "lacks documents", queries, documents[:-5]), r"\d of 90 documents have no vector in .*doc.npy")
    refused(write(place, "none", queries, []), "has no rows")
    refused(write(place, "twice", queries, [*documents, documents[0]]), "1 document ids are repeated")
    refused("train0.jsonl", "no such folder")
    refused("out", "did you mean .*consumed_samples0")
    name = write(place, "nan", queries, documents)
    rows = np.load(place / name / "test_docs" / "doc.npy")
    rows[3] = np.nan
    np.save(place / name / "test_docs" / "doc.npy", rows)
    refused(name, "row 3 .* holds NaN")
    rows[3] = 0
    np.save(place / name / "test_docs" / "doc.npy", rows[:, :2])
    refused(name, "4 dimensions and .* 2")
    np.save(place / name / "test_docs" / "doc.npy", rows.astype(np.int8))
    refused(name, "holds int8, and its scales are not beside it")
    content = (place / "whole" / "test_docs" / "doc.npy").read_bytes()
    (place / name / "test_docs" / "doc.npy").write_bytes(content[: len(content) // 2])
    refused(name, "not a whole .npy file")
    # Two files that number their texts from 0: one id names two texts, and has one vector.
    store = store_of(place, "train0.jsonl", "train1.jsonl")
    refused(
        write(place, "numbers", queries, documents),
        "query_id 'q.*' names two texts, at .*train0.jsonl:.* and .*train1.jsonl",
    )


def test_settings_that_change_nothing_are_refused(place):
    for flags, message in (
        (dict(guide_margin=0.1), "--guide_margin 0.1: has no effect without --guide_embeddings"),
        (dict(teacher_loss="mse"), "--teacher_loss mse: has no effect without --teacher_embeddings"),
        (dict(teacher_embeddings=str(place), teacher_temperature=0.1), "has no effect without --teacher_loss scores"),
        (dict(teacher_embeddings="nowhere"), "--teacher_embeddings nowhere: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            StepArguments(**flags)


def train(root, name, *extra, num_ranks=0, zero=2):
    flags = {
        "deepspeed": f"ds_configs/zero{zero}.json",
        "model_name_or_path": root / "student",
        "output_dir": root / name,
        "cache_dir": root / "cache",
        "max_length": 24,
        "global_batch_size": 10,
        "hard_negatives": 2,
        "micro_batch_tokens": 200,
        "max_steps": 6,
        "learning_rate": "2e-3",
        "report_to": "none",
        "lr_scheduler": "constant",
        "guide_embeddings": root / "out" / "consumed_samples0",
        "teacher_embeddings": root / "out" / "consumed_samples0",
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value)]
    files = ["--train_files", root / "train0.jsonl", root / "train1.jsonl"]
    result = launch(num_ranks, "recipes/train_bert.py", *words, *files, *extra)
    return result, records_of(root / name / "metrics.jsonl") if result.returncode == 0 else None


def test_a_run_is_resumed_bit_equal_and_leaves_its_projection_behind(place):
    check(train(place, "stopped", "--max_steps", 3, num_ranks=2, zero=3)[0])
    resumed, lines = train(place, "stopped", num_ranks=2, zero=3)
    straight, expected = train(place, "straight", num_ranks=2, zero=3)
    assert "48 dimensions of" in straight.stderr and "through a linear map: cosine times 1" in straight.stderr
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected] and len(lines) == 6
    weights = [load_file(place / name / "model" / "model.safetensors") for name in ("stopped", "straight")]
    assert weights[0].keys() == weights[1].keys() == load_file(place / "student" / "model.safetensors").keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # The checkpoint is a model too, and other vectors make another run.
    Embedder.from_pretrained(str(place / "stopped"), step=3)
    shutil.copytree(place / "out" / "consumed_samples0", place / "changed", symlinks=True)
    rows = np.load(place / "changed" / "test_docs" / "doc.npy")
    np.save(place / "changed" / "test_docs" / "doc.npy", -rows)
    other, _ = train(place, "stopped", "--max_steps", 9, "--teacher_embeddings", place / "changed")
    assert (
        other.returncode == 2
        and "teacher_embeddings was" in other.stderr
        and "guide_embeddings was" not in other.stderr
    )
