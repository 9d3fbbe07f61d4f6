"""recipes/generate.py as users run it: the layout, the order of rows, the same vectors on any number of ranks."""

import json
import random

import numpy as np
import pytest
import torch
from tiny import check, launch, make_model, make_training_file, sentence

from ds_embed.vectors.vectors import stored_numbers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    make_model(root / "llama", "llama")
    make_training_file(root / "train.jsonl", 60, num_negatives=0)
    rng = random.Random(4)

    def write(name, text_key, id_key, numbers):
        records = [{text_key: sentence(rng, 1, 40), id_key: f"{text_key}-{number}"} for number in numbers]
        (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return records

    root_files = {
        "queries": write("q1.jsonl", "query", "query_id", range(30, 0, -1))
        + write("q2.jsonl", "query", "query_id", [77]),
        "docs": write("d1.jsonl", "pos_doc", "doc_id", range(40))
        + write("d2.jsonl", "pos_doc", "doc_id", range(99, 50, -1)),
    }
    check(
        launch(
            2,
            "recipes/train_gpt.py",
            "--deepspeed",
            "ds_configs/zero2.json",
            "--model_name_or_path",
            root / "llama",
            "--train_files",
            root / "train.jsonl",
            "--output_dir",
            root / "run",
            "--cache_dir",
            root / "cache",
            "--max_length",
            20,
            "--query_prefix",
            "find: ",
            "--global_batch_size",
            10,
            "--max_steps",
            3,
            "--learning_rate",
            "1e-2",
            "--report_to",
            "none",
        )
    )
    return root, root_files


def generate(root, out, *flags, num_ranks=2):
    model = [] if "--model_name_or_path" in flags else ["--model_name_or_path", root / "run"]
    check(
        launch(
            num_ranks,
            "recipes/generate.py",
            *model,
            "--query_files",
            root / "q1.jsonl",
            root / "q2.jsonl",
            "--doc_files",
            root / "d1.jsonl",
            root / "d2.jsonl",
            "--output_prefix",
            out,
            "--cache_dir",
            root / "cache",
            *flags,
        )
    )
    return out


def read(folder):
    queries = np.load(folder / "test_queries" / "query.npy", allow_pickle=False)
    documents = np.load(folder / "test_docs" / "doc.npy", allow_pickle=False)
    return queries, documents


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    root, _ = place
    return generate(root, tmp_path_factory.mktemp("out") / "plain", "--bf16", "false", num_ranks=0)


def test_layout(place, plain):
    _, records = place
    folder = plain / "consumed_samples30"
    assert [p.name for p in plain.iterdir()] == ["consumed_samples30"]
    shown = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    assert shown == ["test_doc", "test_docs", "test_queries"]
    assert sorted(p.name for p in (folder / "test_docs").iterdir()) == ["doc.ids", "doc.npy", "manifest.json"]
    assert sorted(p.name for p in (folder / "test_queries").iterdir()) == ["manifest.json", "query.ids", "query.npy"]
    assert (folder / "test_doc").is_symlink() and str((folder / "test_doc").readlink()) == "test_docs"
    queries, documents = read(folder)
    assert queries.dtype == documents.dtype == np.float32
    assert queries.shape == (31, 32) and documents.shape == (89, 32)
    assert (folder / "test_queries" / "query.ids").read_text().splitlines() == [
        r["query_id"] for r in records["queries"]
    ]
    assert (folder / "test_docs" / "doc.ids").read_text().splitlines() == [r["doc_id"] for r in records["docs"]]


def test_rows_equal_a_plain_loop_over_the_files(place, plain):
    """Text by text with transformers and PEFT alone, in file order, with the settings of the run."""
    root, records = place
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root / "run" / "model")
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(root / "llama"), root / "run" / "model").eval()
    queries, documents = read(plain / "consumed_samples30")
    jobs = [(queries, records["queries"], "query", "find: "), (documents, records["docs"], "pos_doc", "passage: ")]
    for rows, texts, key, prefix in jobs:
        for row, record in zip(rows, texts):
            ids = tokenizer(prefix + record[key], add_special_tokens=False)["input_ids"][:19] + [tokenizer.eos_token_id]
            with torch.no_grad():
                state = model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1].float()
            expected = torch.nn.functional.normalize(state, dim=0).numpy()
            np.testing.assert_allclose(row, expected, atol=2e-6)


def test_same_vectors_on_other_ranks_micro_batches_and_zero_stage(place, plain, tmp_path):
    """Up to rounding. The same bytes with the same micro-batches: test_generate_restart.py."""
    root, _ = place
    other = ["--micro_batch_tokens", "64", "--deepspeed", "ds_configs/zero3.json"]
    out = generate(root, tmp_path / "out", "--bf16", "false", *other, num_ranks=4)
    for got, expected in zip(read(out / "consumed_samples30"), read(plain / "consumed_samples30")):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_smaller_numbers_on_two_ranks(place, plain, tmp_path):
    """int8 rows with their scales beside them, and float16: what is stored of the rows of one process, bit for bit."""
    root, _ = place
    for dtype in ("float16", "int8"):
        folder = generate(root, tmp_path / dtype, "--bf16", "false", "--vector_dtype", dtype) / "consumed_samples30"
        for kind, rows in zip(("queries/query", "docs/doc"), read(plain / "consumed_samples30")):
            files = [f"test_{kind}.npy", f"test_{kind}.scales.npy"]
            for file, numbers in zip(files, stored_numbers(rows, dtype)):
                found = np.load(folder / file, allow_pickle=False)
                assert found.dtype == numbers.dtype and np.array_equal(found, numbers)
    documents = ["--doc_files", root / "d1.jsonl", "--cache_dir", root / "cache", "--model_name_or_path", root / "run"]
    begun = ["--query_files", root / "q1.jsonl", *documents[2:], "--output_prefix", tmp_path / "one"]
    check(launch(0, "recipes/generate.py", *begun))
    other = launch(0, "recipes/generate.py", *documents, "--output_prefix", tmp_path / "one", "--vector_dtype", "int8")
    assert other.returncode == 2 and "test_queries holds float32, and queries and documents" in other.stderr


def test_adapter_on_a_base_and_base_alone(place, plain, tmp_path):
    root, _ = place
    with_adapter = generate(
        root,
        tmp_path / "a",
        "--model_name_or_path",
        root / "llama",
        "--adapter_path",
        root / "run",
        "--bf16",
        "false",
        num_ranks=0,
    )
    for got, expected in zip(read(with_adapter / "consumed_samples30"), read(plain / "consumed_samples30")):
        assert np.array_equal(got, expected)
    base = generate(root, tmp_path / "b", "--model_name_or_path", root / "llama", num_ranks=0)
    queries, documents = read(base / "consumed_samples0")
    assert np.abs(documents - read(plain / "consumed_samples30")[1]).max() > 0.05
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), 1, atol=1e-5)


def test_blocks_and_ranks_do_not_change_the_rows(place, tmp_path):
    """Many small blocks, each with its own sorting, give the rows of one pass in file order."""
    root, _ = place
    from transformers import AutoTokenizer

    from ds_embed.data.store import TextStore, build_text_store
    from ds_embed.data.tokenize import TextFormat
    from ds_embed.job.ranks import World
    from ds_embed.vectors.corpus import Corpus
    from ds_embed.vectors.encode import encode_store

    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    path = build_text_store(
        [root / "d1.jsonl", root / "d2.jsonl"], "pos_doc", "doc_id", tokenizer, TextFormat("", 50, True), tmp_path / "c"
    )
    store = TextStore.open(path)
    world = World.alone()

    def vector(ids, lengths, has_padding):
        kept = torch.arange(ids.shape[1])[None] < lengths[:, None]
        assert has_padding == (not kept.all())
        return torch.stack([(ids * kept).sum(1), lengths], dim=1).float()

    for block in (7, 89, 1000):
        corpus = Corpus(tmp_path / f"{block}", "doc")
        encode_store(store, vector, world, corpus, micro_batch_tokens=100, block_texts=block)
        rows = np.load(tmp_path / f"{block}" / "doc.npy")
        expected = [[store.tokens_of(i).sum(), len(store.tokens_of(i))] for i in range(store.num_texts)]
        assert np.array_equal(rows, np.array(expected, dtype=np.float32))
