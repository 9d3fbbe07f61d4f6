"""The benchmarks run, in tiny forms, and say what they are meant to say; how fast anything is is not tested here.

Contestants are real. Those that are not launched run in the test's own process where processes are not the point.
"""

import importlib
import json
import sys

import pytest
from tiny import REPOSITORY, leave_out_when_fast, make_model, make_training_file

EVERY_SCRIPT = sorted(path.stem for path in (REPOSITORY / "benchmarks").glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def not_when_fast():
    leave_out_when_fast()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    make_model(folder / "bert", "bert")
    make_training_file(folder / "train.jsonl", 80, 0)
    return folder


@pytest.fixture
def script(monkeypatch, material, capsys):
    """Run a benchmark's main() with flags; its results file and what it printed."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))

    def here(function, **arguments):
        module, name = function.split(":")
        if name == "matrix_rates":
            arguments["size"] = 64
        return {"peak_gib": 0.0} | getattr(importlib.import_module(module), name)(
            **json.loads(json.dumps(arguments, default=str))
        )

    def run(name, *flags):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "in_process", here)
        words = ["--output_dir", material / name, "--rounds", 2, *flags]
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        module.main()
        return json.loads((material / name / f"{name}.json").read_text()), capsys.readouterr().out

    yield run
    for name in EVERY_SCRIPT:  # their names are too plain to be left about
        sys.modules.pop(name, None)


def test_train_compares_ours_with_a_bare_loop_and_sentence_transformers(script, material):
    result, printed = script(
        "train",
        "--model_name_or_path",
        material / "bert",
        "--train_file",
        material / "train.jsonl",
        "--rounds",
        1,
        "--max_steps",
        2,
        "--skip_steps",
        1,
        "--global_batch_size",
        8,
        "--max_length",
        32,
        "--contestants",
        "ds_embed, 2 ranks",
        "bare loop, grad_cache",
        "sentence-transformers, bf16",
        "sentence-transformers, bf16, grouped, cached by tokens",
    )
    rounds = result["results"]["rounds"]
    assert len(rounds) == 5 and all(len(measured) == 1 for measured in rounds.values())
    rates = {name: measured[0] for name, measured in rounds.items() if name != "matrix products"}
    assert all(m["tokens_per_second"] > 0 for m in rates.values())
    # Ours and the bare loop see the same second batch, the peer another of as many texts.
    ours, bare = rates["ds_embed, 2 ranks"]["num_tokens"], rates["bare loop, grad_cache"]["num_tokens"]
    assert ours == bare and 16 < rates["sentence-transformers, bf16"]["num_tokens"] <= 16 * 32
    figures = [goal["figure"] for goal in result["goals"]]
    assert figures == [
        "ds_embed, 2 ranks / sentence-transformers, bf16",
        "ds_embed, 2 ranks / sentence-transformers' fastest, bf16",
        "padding, ds_embed, 2 ranks",
    ]
    assert "| ds_embed, 2 ranks / sentence-transformers, bf16 |" in printed and ">= 5" in printed


def test_encode_compares_at_the_same_precision(script, material):
    result, printed = script(
        "encode",
        "--model_name_or_path",
        material / "bert",
        "--train_file",
        material / "train.jsonl",
        "--num_texts",
        70,
        "--same_length",
        5,
        "--precisions",
        "bf16",
        "--ranks",
        0,
        "--max_length",
        32,
    )
    assert list(result["results"]) == ["mixed, bf16", "same, bf16"]
    for case in result["results"].values():
        counted = {m["num_tokens"] for name in ("sentence-transformers", "ds_embed.Embedder") for m in case[name]}
        assert len(counted) == 1 and all(len(measured) == 2 for measured in case.values())
    assert result["results"]["same, bf16"]["sentence-transformers"][0]["num_tokens"] == 70 * 7  # with CLS and SEP
    assert [goal["bound"] for goal in result["goals"]] == [1.5, 1.0]


def test_loss_is_compared_with_float64_and_its_memory_measured(script):
    result, printed = script(
        "loss",
        "--num_queries",
        64,
        "--dimensions",
        16,
        "--exact_queries",
        100,
        "--long",
        "true",
        "--long_queries",
        6000,
        "--long_dimensions",
        8,
        "--repeats",
        1,
    )
    time_ratio, difference, memory = result["goals"]
    assert difference["met"] and difference["median"] > 0
    # 6000 x 6000 logits are 0.144 GB; in tiles of 1024 rows it is less, and it is more than the gradient alone.
    assert memory["median"] < 0.144 and result["results"]["long"]["logits_gb"] == pytest.approx(0.144)
    assert time_ratio["low"] <= time_ratio["median"] <= time_ratio["high"]


def test_scaling_counts_the_bytes_that_the_formulas_say(script, material):
    result, printed = script(
        "scaling",
        "--model_name_or_path",
        material / "bert",
        "--train_file",
        material / "train.jsonl",
        "--rounds",
        1,
        "--parts",
        "wire",
        "--num_layers",
        0,
        "--max_steps",
        2,
        "--max_length",
        16,
        "--wire_ranks",
        2,
        "--stages",
        1,
        "--modes",
        "cached",
    )
    rows = {row["what"]: row for row in result["results"]["wire"]}
    assert sorted(rows) == [
        "gather of vectors",
        "reduce-scatter of their gradient",
        "weights: all_gather",
        "weights: all_reduce",
    ]
    assert all(row["counted"] == row["formula"] > 0 for row in rows.values())


def test_scaling_encodes_corpora(script, material):
    result, printed = script(
        "scaling",
        "--model_name_or_path",
        material / "bert",
        "--train_file",
        material / "train.jsonl",
        "--rounds",
        1,
        "--parts",
        "generate",
        "--num_layers",
        0,
        "--max_length",
        16,
        "--corpus_sizes",
        5,
        50,
    )
    small, large = (result["results"]["generate"][size][0] for size in ("5", "50"))
    rates = [measured["tokens_per_second"] * measured["seconds"] for measured in (small, large)]
    assert (
        5 * 6 < rates[0] < 5 * 40 and 50 * 6 < rates[1] < 50 * 40
    )  # tokens: six words and what tokenizers make of them
    assert "| 50 |" in printed


def test_flag_embedding_takes_part_where_it_is_installed(script, monkeypatch, material):
    module = importlib.import_module("train")
    flags = {"model_name_or_path": str(material / "bert"), "train_file": str(material / "train.jsonl")}
    for installed, pooling, takes_part in ((True, "mean", True), (True, "last", False), (False, "mean", False)):
        monkeypatch.setattr(module, "find_spec", lambda name, installed=installed: object() if installed else None)
        settings = module.SpeedArguments(**flags, output_dir=str(material / "flags"), pooling=pooling)
        assert ("FlagEmbedding, bf16" in module.Speed(settings).contestants()) == takes_part


def test_kernels_are_compared_with_what_they_stand_for(script, material):
    result, printed = script(
        "cpu_kernels",
        "--model_name_or_path",
        material / "bert",
        "--parts",
        "lora",
        "training",
        "encoding",
        "products",
        "--num_texts",
        2,
        "--length",
        8,
        "--lora_rank",
        2,
    )
    found = result["results"]
    sides = {part: [name for name in times if "first" not in name] for part, times in found.items()}
    assert {part: len(names) - 1 for part, names in sides.items()} == {
        "lora": 2,
        "training": 2,
        "encoding": 4,
        "products": 4,
    }
    assert all(len(found[part][name]) == 2 for part in found for name in sides[part] if name != "peak_gib")
    assert "| bf16: packed layers / bf16: plain layers |" in printed
    assert "| training: through float32 / training: torch's |" in printed


def test_data_compares_the_store_with_datasets(script, material):
    pytest.importorskip("datasets")
    result, printed = script(
        "data", "--model_name_or_path", material / "bert", "--records", 50, "--rounds", 1, "--batch_sizes", 8
    )
    assert {"token store", "datasets.map"} < set(result["results"])
    assert set(result["results"]["times"]) == {"peak_gib", "open the store", "batch of 8"}


def test_processes_are_measured(script, monkeypatch, tmp_path):
    contest = importlib.import_module("contest")
    measured = contest.in_process("startup:import_seconds", statement="import ds_embed")
    assert 0 < measured["seconds"] < 60 and 0.01 < measured["peak_gib"] < 16
    with pytest.raises(SystemExit, match="AssertionError"):
        contest.run_process([sys.executable, "-c", "assert False"], threads=1)
    calls = []
    results = contest.play({name: lambda n, name=name: calls.append(name) or {"x": n + 1} for name in "ab"}, 3)
    assert calls == list("abbaab")
    notebook = tmp_path / "rounds.jsonl"
    for rounds in (2, 3):  # only the third is still to be played
        contest.play({"a": lambda n: calls.append(n) or {"x": n}}, rounds, notebook)
    assert calls[6:] == [0, 1, 2] and len(notebook.read_text().splitlines()) == 3
    assert str(contest.ratio(results, "a", "b", "x")) == "1" and str(contest.spread(results, "a", "x")) == "2 (1–3)"


@pytest.mark.parametrize("name", EVERY_SCRIPT)
def test_scripts_can_be_imported(script, name):
    importlib.import_module(name)


def test_time_to_quality_is_read_from_straight_lines(script):
    line = importlib.import_module("time_to_quality").Curve((0, 10, 20), (0.0, 4.0, 8.0), (0, 7, 9), (0.2, 0.6, 0.5))
    assert line.until(0.5) == pytest.approx(3.0) and line.until(0.7) == float("inf")
    assert line.at("seconds", 6.0) == pytest.approx(0.55) == line.at("tokens", 8)
    assert line.at("seconds", 100) == 0.5 and line.at_step(10) == 0.6
