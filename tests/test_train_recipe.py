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
        num_ranks,
        "recipes/train_gpt.py",
        "--deepspeed",
        f"ds_configs/zero{zero}.json",
        "--model_name_or_path",
        root / "llama",
        "--train_files",
        root / "train.jsonl",
        "--output_dir",
        root / name,
        "--cache_dir",
        root / "cache",
        "--max_length",
        32,
        "--global_batch_size",
        12,
        "--hard_negatives",
        2,
        "--micro_batch_tokens",
        200,
        "--max_steps",
        10,
        "--learning_rate",
        "5e-3",
        "--report_to",
        "none",
        *extra,
    )


def trace(root, name):
    return [json.loads(line) for line in open(root / name / "metrics.jsonl")]


@pytest.fixture(scope="session")
def plain_trace(workplace):
    monitors = ("--report_to", "tensorboard", "csv")
    check(train(workplace, "plain", "--bf16", "false", *monitors, num_ranks=0, zero=0))
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


def test_monitors_hold_the_values_of_the_metrics_file(workplace, plain_trace):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(workplace / "plain" / "tensorboard")).Reload()
    names = plain_trace[0].keys() - {"step", "data"}  # what was read stands in the first line alone
    assert {"loss", "margin", "peak_memory_gib", "learning_rate", "grad_norm"} < names
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in names}
    for name in names:
        expected = [(line["step"], line[name]) for line in plain_trace]
        stored = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert stored == [(step, np.float32(value)) for step, value in expected]
        header, *rows = (workplace / "plain" / "csv" / f"train_{name}.csv").read_text().splitlines()
        assert header == f"step,{name}" and rows == [f"{step},{value}" for step, value in expected]
    for line in plain_trace:  # every query has negatives here
        assert line["margin"] == pytest.approx(line["positive_similarity"] - line["negative_similarity"], abs=1e-6)
        assert 0.1 < line["peak_memory_gib"] < 8


def test_all_weights_in_bf16_under_zero3(workplace):
    """Bidirectional, and with an instruction for the training file other than the one that the model keeps."""
    result = check(
        train(
            workplace,
            "full",
            "--lora_rank",
            "0",
            "--max_steps",
            25,
            "--learning_rate",
            "2e-3",
            "--report_to",
            "tensorboard",
            "--bidirectional",
            "true",
            "--query_prefix",
            r"w1\n{text} w2",
            "--query_prefixes",
            "w5 ",
            zero=3,
        )
    )
    assert 'queries        "w1\\n{text} w2" stored with the model' in result.stderr + result.stdout
    stores = (workplace / "cache").glob("training-*/manifest.json")
    assert any('"prefix": "w5 "' in path.read_text() for path in stores)
    run = workplace / "full"
    losses = [line["loss"] for line in trace(workplace, "full")]
    assert np.mean(losses[-8:]) < 0.9 * np.mean(losses[:4])
    import torch
    from transformers import AutoModel, AutoTokenizer

    before = AutoModel.from_pretrained(workplace / "llama").state_dict()
    after = AutoModel.from_pretrained(run / "model").state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].shape == before[name].shape for name in before)
    # 2-D weights all moved; a few steps move none of them far.
    moved = [n for n in before if before[n].dim() == 2 and not torch.equal(before[n].bfloat16(), after[n].bfloat16())]
    assert len(moved) == sum(before[n].dim() == 2 for n in before)
    assert list((run / "tensorboard").rglob("events*"))

    # Used later without a flag: the whole text is seen by every token.
    from ds_embed import Embedder

    (vector,) = Embedder.from_pretrained(run, pooling="cls", dtype="float32", device="cpu").encode_queries(["w7 w8 w9"])
    model = AutoModel.from_pretrained(run / "model", attn_implementation="eager", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(run / "model")("w1 w7 w8 w9 w2", return_tensors="pt")["input_ids"]
    assert ids[0, -1] == 1  # EOS, which the saved tokenizer appends
    with torch.no_grad():
        state = model(input_ids=ids, attention_mask=torch.zeros(1, 1, 6, 6)).last_hidden_state[0, 0]
    np.testing.assert_allclose(vector, torch.nn.functional.normalize(state, dim=0).numpy(), atol=2e-6)


def test_config_file_gives_the_same_run_and_flags_win(workplace, plain_trace):
    result = launch(
        0,
        "recipes/train_gpt.py",
        "--config",
        workplace / "plain" / "config.yaml",
        "--output_dir",
        workplace / "again",
        "--max_steps",
        3,
        "--warmup_steps",
        1,
    )
    check(result)
    got = trace(workplace, "again")
    assert len(got) == 3 and got[0]["loss"] == plain_trace[0]["loss"]
