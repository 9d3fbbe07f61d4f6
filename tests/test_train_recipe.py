"""recipes/train_gpt.py as users run it: the launcher, real ranks, real files."""

import json

import numpy as np
import pytest
from tiny import check, launch, make_model, make_training_file


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    make_model(root / "llama", "llama")
    make_training_file(root / "train.jsonl", 100, num_negatives=2)
    return root


def train(root, name, *extra, num_ranks=2, zero=2):
    return launch(
        num_ranks, "recipes/train_gpt.py", "--deepspeed", f"ds_configs/zero{zero}.json",
        "--model_name_or_path", root / "llama", "--train_files", root / "train.jsonl",
        "--output_dir", root / name, "--cache_dir", root / "cache", "--max_length", 32,
        "--global_batch_size", 12, "--hard_negatives", 2, "--micro_batch_tokens", 200, "--max_steps", 10,
        "--learning_rate", "5e-3", "--report_to", "none", *extra,
    )  # fmt: skip


def trace(root, name):
    return [json.loads(line) for line in open(root / name / "metrics.jsonl")]


@pytest.fixture(scope="session")
def plain_trace(workplace):
    check(train(workplace, "plain", "--bf16", "false", num_ranks=0, zero=0))
    return trace(workplace, "plain")


@pytest.mark.parametrize(
    "num_ranks, zero, extra",
    [
        (2, 2, []),
        (4, 3, ["--grad_cache", "true", "--micro_batch_tokens", "100"]),
        (2, 0, ["--grad_cache", "true"]),
        (4, 1, []),
        (2, 3, ["--gradient_checkpointing", "true"]),
    ],
)
def test_loss_trace_does_not_depend_on_topology(workplace, plain_trace, num_ranks, zero, extra):
    name = f"ranks{num_ranks}_zero{zero}"
    check(train(workplace, name, "--bf16", "false", *extra, num_ranks=num_ranks, zero=zero))
    got = trace(workplace, name)
    assert [line["step"] for line in got] == list(range(1, 11))
    for line, expected in zip(got, plain_trace):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-4, rel=1e-4)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert line["learning_rate"] == expected["learning_rate"]
        assert line["consumed_samples"] == expected["consumed_samples"] == 12 * line["step"]


def test_it_learns_and_writes_what_it_promises(workplace, plain_trace):
    losses = [line["loss"] for line in plain_trace]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    run = workplace / "plain"
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "ds_config.json", "metrics.jsonl", "model"}
    assert "auto" not in (run / "ds_config.json").read_text()

    import torch
    from peft import PeftModel
    from transformers import AutoModel

    base = AutoModel.from_pretrained(workplace / "llama")
    model = PeftModel.from_pretrained(base, run / "model")
    weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(weights) == 2 * 2 * 7  # A and B on seven linear modules of two layers
    assert all(torch.isfinite(p).all() and p.any() for name, p in weights.items())
    card = json.loads((run / "model" / "ds_embed.json").read_text())
    assert card["pooling"] == "last" and card["append_eos"] and card["consumed_samples"] == 120
    assert card["query_prefix"] == "query: " and card["doc_max_length"] == 32


def test_all_weights_in_bf16_under_zero3(workplace):
    check(train(workplace, "full", "--lora_rank", "0", "--max_steps", 25, "--learning_rate", "2e-3", "--report_to", "tensorboard", zero=3))
    run = workplace / "full"
    losses = [line["loss"] for line in trace(workplace, "full")]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:4])
    import torch
    from transformers import AutoModel

    before = AutoModel.from_pretrained(workplace / "llama").state_dict()
    after = AutoModel.from_pretrained(run / "model").state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].shape == before[name].shape for name in before)
    # 2-D weights all moved; a few steps move none of them far.
    moved = [n for n in before if before[n].dim() == 2 and not torch.equal(before[n].bfloat16(), after[n].bfloat16())]
    assert len(moved) == sum(before[n].dim() == 2 for n in before)
    assert list((run / "tensorboard").rglob("events*"))


def test_config_file_gives_the_same_run_and_flags_win(workplace, plain_trace):
    result = launch(
        0, "recipes/train_gpt.py", "--config", workplace / "plain" / "config.yaml",
        "--output_dir", workplace / "again", "--max_steps", 3, "--warmup_steps", 1,
    )  # fmt: skip
    check(result)
    got = trace(workplace, "again")
    assert len(got) == 3 and got[0]["loss"] == plain_trace[0]["loss"]
