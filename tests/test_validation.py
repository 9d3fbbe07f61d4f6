"""Validation while training: right numbers on any ranks, no trace of it in training, the best kept, early stops."""

import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import REPOSITORY, check, launch, make_model, make_training_file, sentence

from ds_embed.data.order import sample_records
from ds_embed.job.ranks import EXIT_REQUEUE, World
from ds_embed.settings import EncodeArguments, ModelArguments, TextArguments
from ds_embed.vectors.generate import generate

HELD_OUT, BATCH = 22, 8  # the last batch has six of its own
STEPS = 4
MEASURES = ["RR@10", "nDCG@10", "R@1", "AP"]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("validation")
    make_model(root / "llama", "llama", attention_dropout=0.1)
    make_training_file(root / "train.jsonl", 100, num_negatives=1)
    # So low that ZeRO-3 shards most weights of this tiny model.
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 600}}
    (root / "zero3.json").write_text(json.dumps(zero3))
    make_training_file(root / "held_out.jsonl", HELD_OUT, num_negatives=2, seed=1)
    records = [json.loads(line) for line in open(root / "held_out.jsonl")]
    rng = random.Random(3)
    queries = [{key: record[key] for key in ("query", "query_id", "doc_id")} for record in records[:6]]
    # A query with two right documents stands on two lines.
    write(root / "queries.jsonl", queries + [queries[0] | {"doc_id": "d5"}])
    documents = [{"pos_doc": record["pos_doc"], "doc_id": record["doc_id"]} for record in records[:8]]
    write(root / "docs.jsonl", documents + [{"pos_doc": sentence(rng), "doc_id": f"x{n}"} for n in range(4)])
    return root


def flags(root, name, *extra, deepspeed):
    words = [
        "--deepspeed",
        deepspeed,
        "--model_name_or_path",
        root / "llama",
        "--train_files",
        root / "train.jsonl",
        "--output_dir",
        root / name,
        "--cache_dir",
        root / "cache",
        "--max_length",
        24,
        "--global_batch_size",
        BATCH,
        "--hard_negatives",
        1,
        "--micro_batch_tokens",
        300,
        "--temperature",
        0.1,
        "--max_steps",
        STEPS,
        "--lora_dropout",
        0.1,
        "--grad_cache",
        "true",
        "--bf16",
        "false",
        "--report_to",
        "none",
        *extra,
    ]
    return [str(word) for word in words]


def validation(root):
    return [
        "--val_files",
        root / "held_out.jsonl",
        "--val_query_files",
        root / "queries.jsonl",
        "--val_doc_files",
        root / "docs.jsonl",
        "--val_check_interval",
        2,
        "--val_metrics",
        *MEASURES,
    ]


def page(root):
    """The settings of the older system's GPT page, with a checkpoint at every other validation."""
    settings = ["--global_batch_size", 4, "--max_steps", 20, "--lora_rank", 16, "--val_check_interval", 4]
    return flags(
        root,
        "page",
        *validation(root),
        *settings,
        "--learning_rate",
        "1e-3",
        "--save_interval",
        6,
        "--learnable_temperature",
        "true",
        deepspeed="ds_configs/zero2.json",
    )


def run_all(root, num_ranks, cases):
    (root / "cases.json").write_text(json.dumps(cases))
    return launch(num_ranks, "tests/workers/validation.py", root / "cases.json", timeout=900)


def lines_of(root, name):
    """(training lines, validation lines) of a run's log."""
    lines = [json.loads(line) for line in open(root / name / "metrics.jsonl")]
    return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


def losses(root, name):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines_of(root, name)[0]]


def checkpoints(root, name):
    return sorted(int(path.name.split("_")[1]) for path in (root / name / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def on_two_ranks(place):
    """ZeRO-3: a run that is validated, and signalled amid a validation; the same run undisturbed and unvalidated.

    The rate is so high that the model gets worse now and then: the best one is rarely the last.
    """
    rate = ["--learning_rate", "0.3", "--save_interval", 3, "--save_total_limit", 1]
    zero3 = place / "zero3.json"
    watched = flags(
        place,
        "watched",
        *rate,
        *validation(place),
        "--val_before_training",
        "true",
        "--val_save_embeddings",
        "true",
        "--save_top_k",
        1,
        "--load_best_at_end",
        "true",
        "--report_to",
        "tensorboard",
        deepspeed=zero3,
    )
    cases = [
        {"flags": watched, "signal_at": 2 * BATCH},
        {"flags": watched},
        {"flags": watched},
        {"flags": flags(place, "plain", *rate, deepspeed=zero3)},
    ]
    return check(run_all(place, 2, cases))


@pytest.fixture(scope="module")
def on_one_rank(place):
    """Early stopping, with a rate so small that nothing gets better; then a job that is killed."""
    rate = ["--learning_rate", "1e-30", "--max_steps", 20]
    still = flags(place, "still", *validation(place), *rate, deepspeed="ds_configs/zero0.json")
    still += ["--val_before_training", "true", "--micro_batch_tokens", "64", "--load_best_at_end", "true"]
    still += ["--early_stopping_patience"]
    cases = [
        {"flags": [*still, "1"]},
        {"flags": [*still, "1"]},
        {"flags": [*still, "2"]},
        {"flags": page(place), "kill_at": 12},
    ]
    return run_all(place, 0, cases)


def test_training_does_not_notice(place, on_two_ranks):
    ends = [line.split(" ended with ")[1] for line in on_two_ranks.stdout.splitlines() if " ended with " in line]
    assert ends == [str(EXIT_REQUEUE), "0", "0", "0"]
    assert losses(place, "watched") == losses(place, "plain")
    assert len(losses(place, "plain")) == STEPS
    for path in (place / "plain" / "checkpoints" / f"step_{STEPS:08d}").glob("*.safetensors"):
        expected = load_file(path)
        got = load_file(place / "watched" / "checkpoints" / path.parent.name / path.name)
        assert expected.keys() == got.keys() and [n for n in got if not torch.equal(expected[n], got[n])] == []


def test_each_validation_once(place, on_two_ranks):
    _, lines = lines_of(place, "watched")
    assert [(line["step"], line["consumed_samples"]) for line in lines] == [(n, n * BATCH) for n in (0, 2, 4)]
    names = ["step", "consumed_samples", "val_loss", "val_accuracy", *MEASURES, "seconds"]
    assert all(list(line) == names for line in lines)
    shown = [line for line in on_two_ranks.stderr.replace("\r", "\n").splitlines() if "val_loss" in line]
    # The signal did not have to wait for the validation that it came in.
    stopped = on_two_ranks.stderr.index("SIGTERM: stopped after step 2, which was saved")
    assert on_two_ranks.stderr.index("step 0: val_loss") < stopped < on_two_ranks.stderr.index("step 2: val_loss")
    assert len(shown) == 3 and f"val_loss {lines[-1]['val_loss']:.4f}" in shown[-1] and "best RR@10" in shown[-1]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "watched" / "tensorboard"))
    events.Reload()
    seen = {(event.step, event.value) for event in events.Scalars("val/nDCG@10")}
    assert seen == {(line["step"], np.float32(line["nDCG@10"])) for line in lines}
    assert {"val/loss", "train/loss"} <= set(events.Tags()["scalars"])


def test_same_numbers_on_any_ranks(place, on_two_ranks, on_one_rank):
    """Two ranks under ZeRO-3 against one under ZeRO-0 and another cut into micro-batches."""
    two, one = lines_of(place, "watched")[1][0], lines_of(place, "still")[1][0]
    for name in set(one) - {"seconds"}:
        assert two[name] == pytest.approx(one[name], rel=1e-5), name


def test_loss_equals_a_plain_one(place, on_two_ranks):
    """Text by text and record by record, with transformers and PEFT alone: the last model's in float64."""
    encode = plain_encoder(place, place / "watched" / "checkpoints" / f"step_{STEPS:08d}")
    records = [json.loads(line) for line in open(place / "held_out.jsonl")]
    order = sample_records(42, HELD_OUT, 0, HELD_OUT).tolist()
    assert sorted(order) == list(range(HELD_OUT)) and order != sorted(order)
    total = correct = 0
    for start in range(0, HELD_OUT, BATCH):
        batch = [records[number] for number in order[min(start, HELD_OUT - BATCH) :][:BATCH]]
        queries = encode([f"query: {record['query']}" for record in batch])
        texts = [record["pos_doc"] for record in batch] + [record["neg_doc"][0] for record in batch]
        scores = queries @ encode([f"passage: {text}" for text in texts]).T / 0.1
        for row in range(start - min(start, HELD_OUT - BATCH), BATCH):  # each record once
            total += float(torch.logsumexp(scores[row], 0) - scores[row, row])
            correct += int(scores[row].argmax() == row)
    last = lines_of(place, "watched")[1][-1]
    assert last["val_loss"] == pytest.approx(total / HELD_OUT, rel=1e-5)
    assert last["val_accuracy"] == pytest.approx(correct / HELD_OUT)


def plain_encoder(root, checkpoint):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(root / "llama")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    weights = load_file(next(checkpoint.glob("weights-*.safetensors")))
    named = dict(model.named_parameters())
    for name, weight in weights.items():
        named[name.removeprefix("backbone.")].data = weight
    assert set(weights) == {f"backbone.{name}" for name, p in named.items() if p.requires_grad}
    model = model.double().eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")

    def encode(texts):
        rows = []
        for text in texts:
            ids = tokenizer(text)["input_ids"][:23] + [tokenizer.eos_token_id]
            with torch.no_grad():
                rows.append(model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    return encode


def test_best_checkpoint_is_kept_and_becomes_the_model(place, on_two_ranks):
    _, lines = lines_of(place, "watched")
    best = max(lines[1:], key=lambda line: line["RR@10"])
    assert checkpoints(place, "watched") == sorted({best["step"], STEPS})
    assert "already finished at step 4" in on_two_ranks.stderr
    card = json.loads((place / "watched" / "model" / "ds_embed.json").read_text())
    assert card["consumed_samples"] == best["consumed_samples"]
    assert model_equals_checkpoint(place / "watched", best["step"])
    state = json.loads((place / "watched" / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())["best"]
    assert [kept["step"] for kept in state["kept"]] == [best["step"]]
    assert (state["metric"], state["last_validation"]) == ("RR@10", STEPS)


def test_metrics_are_those_of_generate_and_evaluate(place, on_two_ranks, tmp_path):
    """The model that the run wrote, encoded and measured by the recipes; and the vectors that were kept."""
    spec = importlib.util.spec_from_file_location("evaluate_recipe", REPOSITORY / "recipes" / "evaluate.py")
    evaluate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evaluate)
    files = {"query_files": [str(place / "queries.jsonl")], "doc_files": [str(place / "docs.jsonl")]}
    out = generate(
        World.alone(),
        ModelArguments(str(place / "watched")),
        TextArguments(),
        EncodeArguments(output_prefix=str(tmp_path), cache_dir=str(place / "cache"), bf16=False, **files),
    )
    kept = place / "watched" / "validation" / out.name
    _, lines = lines_of(place, "watched")
    best = next(line for line in lines if out.name == f"consumed_samples{line['consumed_samples']}")
    for folder in (out, kept):
        evaluate.main(["--embeddings", str(folder), "--query_files", *files["query_files"], "--measures", *MEASURES])
        metrics = json.loads((folder / "metrics.json").read_text())
        for name in MEASURES:
            assert metrics[name] == pytest.approx(best[name], abs=1e-12), (folder, name)
    layout = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.suffix != ".lock") for f in (out, kept)]
    assert layout[0] == layout[1] and (kept / "test_doc").is_symlink()
    for name in ("test_queries/query", "test_docs/doc"):
        np.testing.assert_allclose(np.load(kept / f"{name}.npy"), np.load(out / f"{name}.npy"), atol=2e-6)
        assert (kept / f"{name}.ids").read_bytes() == (out / f"{name}.ids").read_bytes()
    assert sorted(path.name for path in kept.parent.iterdir()) == [f"consumed_samples{n * BATCH}" for n in (0, 2, 4)]


def test_early_stopping(place, on_one_rank):
    _, lines = lines_of(place, "still")
    # Better than nothing at step 2, not better at 4; with more patience, on to 6.
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert "stopped early after step 4 of 20: 1 validation(s) without a better RR@10" in on_one_rank.stderr
    assert "already finished at step 4" in on_one_rank.stderr
    assert "to train further, raise --early_stopping_patience" in on_one_rank.stderr
    assert "stopped early after step 6 of 20: 2 validation(s) without a better RR@10" in on_one_rank.stderr
    assert checkpoints(place, "still") == [2, 4, 6]
    # The best is the first of equals. Even this rate moves lora_B, from zero to where bits can tell the steps apart.
    assert on_one_rank.stderr.count("the best model is from step 2, with RR@10") == 2
    assert model_equals_checkpoint(place / "still", 2) and not model_equals_checkpoint(place / "still", 6)
    assert json.loads((place / "still" / "model" / "ds_embed.json").read_text())["consumed_samples"] == 2 * BATCH


def model_equals_checkpoint(run, step):
    expected = load_file(next((run / "checkpoints" / f"step_{step:08d}").glob("weights-*.safetensors")))
    got = load_file(run / "model" / "adapter_model.safetensors")
    got = {f"backbone.{name.replace('.weight', '.default.weight')}": tensor for name, tensor in got.items()}
    assert got.keys() == expected.keys()
    return all(torch.equal(got[name], expected[name]) for name in got)


def test_killed_between_a_validation_and_its_checkpoint(place, on_one_rank):
    """The recipe itself takes up the run that was killed."""
    assert on_one_rank.returncode == -9
    before = lines_of(place, "page")[1]
    newest = checkpoints(place, "page")[-1]
    assert before[-1]["step"] == 12 and 6 <= newest < 12
    result = check(launch(0, "recipes/train_gpt.py", *page(place)))
    assert f"step {newest} of 20" in result.stderr
    _, lines = lines_of(place, "page")
    assert [line["step"] for line in lines] == [4, 8, 12, 16, 20]
    shared = [line for line in lines if line["step"] <= 12]
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in some] for some in (shared, before)]
    assert timeless[0] == timeless[1]
    assert (place / "page" / "model" / "adapter_config.json").exists()
