"""LoRA runs trained further: with their own matrices, with new ones on the merged base, or with all weights."""

import json
import shutil

import pytest
import torch
from tiny import check, launch, make_model, make_training_file

from ds_embed import Embedder

STEPS, BATCH = 3, 8


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora_runs")
    make_model(root / "base", "llama")
    make_training_file(root / "train.jsonl", 60, num_negatives=2)
    make_training_file(root / "held_out.jsonl", 20, num_negatives=2, seed=1)
    return root


def case(root, name, model, *extra, zero=2, **accident):
    flags = [
        *("--deepspeed", f"ds_configs/zero{zero}.json"),
        *("--model_name_or_path", root / model),
        *("--train_files", root / "train.jsonl"),
        *("--val_files", root / "held_out.jsonl"),
        *("--output_dir", root / name),
        *("--cache_dir", root / "cache"),
        *("--max_length", 32),
        *("--global_batch_size", BATCH),
        *("--hard_negatives", 2),
        *("--micro_batch_tokens", 200),
        *("--max_steps", STEPS),
        *("--save_interval", 1),
        *("--learning_rate", "1e-2"),
        *("--warmup_steps", 0),
        *("--temperature", 0.5),  # losses of a few units, so that 1e-6 is some bits of float32
        *("--bf16", "false"),
        *("--val_before_training", "true"),
        *("--report_to", "none"),
        *extra,
    ]
    return {"flags": [str(flag) for flag in flags], **accident}


def run_all(root, num_ranks, cases):
    path = root / f"cases{num_ranks}.json"
    path.write_text(json.dumps(cases))
    return launch(num_ranks, "tests/workers/validation.py", path, timeout=500)


def lines(root, name):
    """(validation losses by step, training losses by step) of a run."""
    found = [json.loads(line) for line in open(root / name / "metrics.jsonl")]
    losses = {line["step"]: line["loss"] for line in found if "loss" in line}
    return {line["step"]: line["val_loss"] for line in found if "val_loss" in line}, losses


NEW, ALL = ("--new_lora", "true", "--lora_rank", 2), ("--lora_rank", 0)
FURTHER = {"on": (), "new": NEW, "all": ALL}


@pytest.fixture(scope="module", params=[0, 2], ids=["one rank", "two ranks"])
def runs(request, place):
    """One start of the ranks: RUN1, and what it is trained further to under two ZeRO stages; then once more, resumed."""
    ranks = request.param
    root = place / f"ranks{ranks}"
    root.mkdir()
    for name in ("base", "train.jsonl", "held_out.jsonl"):
        (root / name).symlink_to(place / name)
    cases = [case(root, "run1", "base", "--lora_rank", 4, "--lora_variant", "rslora")]
    for zero in (2, 3):
        cases += [case(root, f"{name}{zero}", "run1", *extra, zero=zero) for name, extra in FURTHER.items()]
    cases.append(case(root, "run3", "new2", zero=3))
    for variant, zero in (("dora", 2), ("pissa", 3)):
        flags = ("--lora_rank", 4, "--lora_variant", variant)
        cases.append(case(root, variant, "base", *flags, zero=zero))
        cases.append(case(root, f"{variant} on", variant, zero=2))
    if not ranks:  # the job dies: nothing may come after it
        cases.append(case(root, "killed", "run1", *NEW, kill_at=2))
    result = run_all(root, ranks, cases)
    if ranks:
        check(result)
    else:
        assert (root / "killed" / "base").exists() and not (root / "killed" / "model").exists(), result.stderr[-3000:]
        before = (root / "killed" / "base" / "model.safetensors").stat().st_mtime_ns
        check(run_all(root, 0, [case(root, "killed", "run1", *NEW)]))
        assert (root / "killed" / "base" / "model.safetensors").stat().st_mtime_ns == before  # not merged again
    return root


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("name", FURTHER)
def test_it_begins_where_the_first_run_ended(runs, name, zero):
    first, _ = lines(runs, "run1")
    second, _ = lines(runs, f"{name}{zero}")
    assert abs(first[STEPS] - first[0]) > 0.01
    assert second[0] == pytest.approx(first[STEPS], abs=1e-6)
    assert abs(second[STEPS] - second[0]) > 1e-3


@pytest.mark.parametrize("name", FURTHER)
def test_the_stage_changes_nothing(runs, name):
    assert lines(runs, f"{name}2")[1] == pytest.approx(lines(runs, f"{name}3")[1], abs=1e-4, rel=1e-4)


def test_a_run_on_a_run_on_a_run(runs):
    assert lines(runs, "run3")[0][0] == pytest.approx(lines(runs, "new2")[0][STEPS], abs=1e-6)


@pytest.mark.parametrize("variant, rank", [("dora", 4), ("pissa", 8)])
def test_variants_load_as_they_were_trained(runs, variant, rank):
    first, second = lines(runs, variant)[0], lines(runs, f"{variant} on")[0]
    assert abs(first[STEPS] - first[0]) > 1e-3
    assert second[0] == pytest.approx(first[STEPS], abs=1e-6)
    assert (config(runs, variant)["r"], config(runs, variant)["init_lora_weights"]) == (rank, True)


def config(root, name):
    return json.loads((root / name / "model" / "adapter_config.json").read_text())


def test_what_is_saved_names_its_base_and_its_kind(runs):
    for name in ("run1", "on2", "on3"):
        saved = config(runs, name)
        assert (saved["base_model_name_or_path"], saved["r"]) == (str((runs / "base").resolve()), 4), name
        assert saved["use_rslora"] and saved["task_type"] == "FEATURE_EXTRACTION"
    for name in ("new2", "new3"):
        saved = config(runs, name)
        assert (saved["base_model_name_or_path"], saved["r"], saved["use_rslora"]) == (
            str(runs / name / "base"),
            2,
            True,
        )
    assert not (runs / "all2" / "model" / "adapter_config.json").exists()


def vectors(name):
    embedder = Embedder.from_pretrained(str(name), dtype="float32", device="cpu")
    return torch.from_numpy(embedder.encode_queries(["w1 w2 w3", "w4 w5"]))


def test_other_libraries_load_what_is_saved(runs):
    """With PEFT alone, which looks the base up by its name."""
    from peft import AutoPeftModelForFeatureExtraction
    from transformers import AutoModel

    for name in ("on3", "new3", "all3"):
        folder = runs / name / "model"
        auto = AutoModel if name == "all3" else AutoPeftModelForFeatureExtraction
        embedder = Embedder.from_pretrained(str(runs / name), dtype="float32", device="cpu")
        # What a run saves ends a text with EOS by itself.
        ids = embedder.tokenizer(["query: w1 w2 w3"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            state = auto.from_pretrained(str(folder))(input_ids=ids).last_hidden_state[:, -1]
        expected = torch.from_numpy(embedder.encode_queries(["w1 w2 w3"]))
        torch.testing.assert_close(torch.nn.functional.normalize(state, dim=1), expected, atol=1e-5, rtol=0)


def test_a_run_may_be_moved_with_its_base(runs, tmp_path):
    expected = vectors(runs / "new2")
    shutil.copytree(runs / "new2", tmp_path / "moved")
    shutil.move(runs / "new2", tmp_path / "old place")
    try:
        torch.testing.assert_close(vectors(tmp_path / "moved"), expected)
    finally:
        shutil.move(tmp_path / "old place", runs / "new2")


def test_resumed_it_goes_on_with_what_it_began(runs):
    if runs.name == "ranks0":
        for found, expected in zip(lines(runs, "killed"), lines(runs, "new2")):
            assert found == pytest.approx(expected, abs=1e-6)
