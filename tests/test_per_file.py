"""Settings of single training files: as mappings in YAML, as lists behind --train_files, and what of them is refused."""

import json
import re

import pytest
from tiny import load_recipe, make_model, make_training_file, write_scored_pairs

from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.loading import find_model, load_tokenizer
from ds_embed.settings import DataArguments, StepArguments, parse_arguments
from ds_embed.training.prepare import file_formats, prepare_store


def parsed(folder, files, *flags, **more):
    for name in "ab":
        (folder / f"{name}.jsonl").write_text("{}")
    for one in files:
        if isinstance(one, dict) and "path" in one:
            one["path"] = str(folder / one["path"])
    (folder / "config.yaml").write_text(json.dumps({"train_files": files} | more))
    return parse_arguments(DataArguments, StepArguments, argv=["--config", str(folder / "config.yaml"), *flags])


def test_mappings_are_the_lists_behind_train_files(tmp_path):
    a = {"path": "a.jsonl", "weight": 2, "negatives": "pair", "hard_negatives": 3, "temperature": "1e-1"}
    b = {"path": "b.jsonl", "weight": 1, "query_prefix": "", "doc_prefix": "d: ", "doc_max_length": 24}
    more = dict(negatives="own", hard_negatives=1, temperature=0.05, query_prefix="q: ", doc_prefix="p: ")
    more |= dict(doc_max_length=32)
    data, step = parsed(tmp_path, [a, b], **more)
    assert data.train_files == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert (data.sampling_probabilities, data.hard_negatives_per_file) == ([2.0, 1.0], [3, 1])
    assert (step.negatives_per_file, step.temperature_per_file) == (["pair", "own"], [0.1, 0.05])
    assert (data.query_prefixes, data.doc_prefixes) == (["q: ", ""], ["p: ", "d: "])
    assert (data.query_max_length_per_file, data.doc_max_length_per_file) == ([], [32, 24])


def test_lengths_of_files(tmp_path):
    """Each file's texts are cut at its own length, and documents that are then the same tokens are one."""
    tokenizer = load_tokenizer(find_model(str(make_model(tmp_path / "bert", "bert"))), False)
    long = "w1 " * 20
    for name in "ab":
        lines = [{"query": f"w{n} " * 20, "pos_doc": long + f"w{n}"} for n in (2, 3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    settings = dict(query_max_length_per_file=[8, 16], doc_max_length_per_file=[30, 12], doc_prefixes=["w8 ", "w9 "])
    data = DataArguments(train_files=files, cache_dir=str(tmp_path / "cache"), doc_prefix="", **settings)
    card = EmbeddingCard("mean", "w7 ", "", 16, 32, False, "m", 0)
    store = prepare_store(World.alone(), files, data, StepArguments(), tokenizer, file_formats(data, card))
    assert store.lengths.tolist() == [8, 24, 8, 24, 16, 12, 16, 12]
    keys = store.text_keys[1::2].tolist()
    assert keys[0] != keys[1] and keys[2] == keys[3]
    said = [line for line in store.describe() if "cut at" in line]
    assert [int(re.search("cut at ([0-9]+)", line)[1]) for line in said] == [8, 30, 16, 12]
    for name, lengths in (("query_max_length", [8, 17]), ("doc_max_length", [33, 1])):
        data = DataArguments(train_files=files, **{f"{name}_per_file": lengths})
        message = f"--{name}_per_file {lengths[0]} {lengths[1]}: the model's own length.*is (16|32); lower"
        with pytest.raises(ValueError, match=message):
            file_formats(data, card)


A, B = {"path": "a.jsonl"}, {"path": "b.jsonl"}
BAD = {
    "unknown key 'temprature' .did you mean temperature": ([A | {"temprature": 1}, B], {}),
    r"number 2 \(.*b.jsonl\) has no weight, and others have one": ([A | {"weight": 1}, B], {}),
    r"number 1 \(None\) has no path": ([{"weight": 1}], {}),
    "sampling_probabilities and a weight in train_files say the same": (
        [A | {"weight": 1}, B | {"weight": 1}],
        {"sampling_probabilities": [1, 2]},
    ),
    "--negatives_per_file some: choose one of all, own, hard, pair": ([A | {"negatives": "some"}], {}),
    "--temperature_per_file 0.0: each must be greater than 0": ([A | {"temperature": 0}], {}),
    "--temperature_per_file: --learnable_temperature true": (
        [A | {"temperature": 1}],
        {"learnable_temperature": "true"},
    ),
    "--hard_negatives_per_file: .*invalid int value: 'many'|hard_negatives_per_file.*many": (
        [A | {"hard_negatives": "many"}],
        {},
    ),
    "--hard_negatives_per_file 1 2 3: has 3 values, but --train_files has 2 files": (
        [A, B],
        {"hard_negatives_per_file": [1, 2, 3]},
    ),
    "--doc_max_length_per_file 0: each must be greater than 0": ([A | {"doc_max_length": 0}], {}),
    "--query_max_length_per_file: .*(invalid int value|many)": ([A | {"query_max_length": "many"}], {}),
    r"number 1 \(.*a.jsonl\) has no query_max_length, and others": ([A, B | {"query_max_length": 8}], {}),
    "query_max_length_per_file and a query_max_length in train_files say the same": (
        [A | {"query_max_length": 8}, B | {"query_max_length": 8}],
        {"query_max_length_per_file": [8, 8]},
    ),
    "--doc_max_length_per_file 8: has 1 values, but --train_files has 2 files": (
        [A, B],
        {"doc_max_length_per_file": [8]},
    ),
    "unknown key 'max_length' .did you mean query_max_length|unknown key 'max_length'": (
        [A | {"max_length": 8}, B],
        {},
    ),
    "--query_prefixes: also set --query_prefix": ([A | {"query_prefix": "x"}], {}),
}


@pytest.mark.parametrize("message", BAD)
def test_refused(message, tmp_path):
    files, more = BAD[message]
    with pytest.raises(ValueError, match=message):
        parsed(tmp_path, [dict(one) for one in files], **more)


RUNS = {
    "--negatives_per_file own: has 1 values, but --train_files has 2 files": ["--negatives_per_file", "own"],
    "--temperature_per_file 0.1: has 1 values, but --train_files has 2": ["--temperature_per_file", "0.1"],
    "--negatives pair: scores each positive of .*b.jsonl against hard negatives; set": [
        *("--negatives_per_file", "own", "pair", "--hard_negatives_per_file", "1", "0")
    ],
    "--hard_negatives_per_file 2: .*pairs.jsonl has scored pairs, which have no negatives": [
        *("--pair_loss", "cosent", "--hard_negatives_per_file", "1", "2")
    ],
    "b.jsonl:1: has no neg_doc, but rerankers and --negatives pair": [
        *("--negatives_per_file", "own", "pair", "--hard_negatives", "1")
    ],
}


@pytest.mark.parametrize("message", RUNS)
def test_refused_when_the_files_are_read(message, tmp_path):
    model = make_model(tmp_path / "model", "bert")
    files = [make_training_file(tmp_path / f"{name}.jsonl", 20, num_negatives=n) for n, name in ((1, "a"), (0, "b"))]
    if "--pair_loss" in RUNS[message]:
        files[1] = write_scored_pairs(tmp_path / "pairs.jsonl", 20)
    flags = ["--deepspeed", "zero0", "--model_name_or_path", model, "--train_files", *files, *RUNS[message]]
    flags += ["--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--global_batch_size", 8]
    with pytest.raises(ValueError, match=message):
        load_recipe("train_bert").main([str(flag) for flag in flags])
