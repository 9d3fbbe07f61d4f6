"""Settings of single training files: as mappings in YAML, as lists behind --train_files, and what of them is refused."""

import json

import pytest
from tiny import load_recipe, make_model, make_training_file, write_scored_pairs

from ds_embed.settings import DataArguments, StepArguments, parse_arguments


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
    b = {"path": "b.jsonl", "weight": 1, "query_prefix": "", "doc_prefix": "d: "}
    more = dict(negatives="own", hard_negatives=1, temperature=0.05, query_prefix="q: ", doc_prefix="p: ")
    data, step = parsed(tmp_path, [a, b], **more)
    assert data.train_files == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert (data.sampling_probabilities, data.hard_negatives_per_file) == ([2.0, 1.0], [3, 1])
    assert (step.negatives_per_file, step.temperature_per_file) == (["pair", "own"], [0.1, 0.05])
    assert (data.query_prefixes, data.doc_prefixes) == (["q: ", ""], ["p: ", "d: "])


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
