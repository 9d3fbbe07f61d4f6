"""recipes/train_bert.py as users run it, and what it takes for granted."""

import json

import numpy as np
import pytest
import yaml
from tiny import check, launch, make_model, make_training_file, write_teacher_scores


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("bert")
    make_model(root / "bert", "bert")
    make_model(root / "mpnet", "mpnet")
    make_training_file(root / "train.jsonl", 60, num_negatives=2)
    records = [json.loads(line) for line in open(root / "train.jsonl")]
    for record in records[::2]:
        record["neg_doc"] = record["neg_doc"][0]  # a lone string is one negative
    (root / "train.json").write_text(json.dumps(records, indent=1))
    for number, size in ((1, 30), (2, 90)):
        path = make_training_file(root / f"scored{number}.jsonl", size, num_negatives=3, seed=number)
        write_teacher_scores(path)
    return root


def train(root, name, *extra, num_ranks=2, zero=2, model="bert", files=()):
    check(
        launch(
            num_ranks,
            "recipes/train_bert.py",
            "--deepspeed",
            f"ds_configs/zero{zero}.json",
            "--model_name_or_path",
            root / model,
            "--train_files",
            *(files or [root / "train.json"]),
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
            8,
            "--learning_rate",
            "2e-3",
            "--report_to",
            "none",
            *extra,
        )
    )
    return [json.loads(line) for line in open(root / name / "metrics.jsonl")]


def test_trains_the_whole_model_with_the_usual_defaults(workplace):
    lines = train(workplace, "run")
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-3:]) < 0.85 * losses[0]
    config = yaml.safe_load((workplace / "run" / "config.yaml").read_text())
    assert (config["lora_rank"], config["negatives"], config["temperature"]) == (0, "own", 0.02)
    card = json.loads((workplace / "run" / "model" / "ds_embed.json").read_text())
    assert card["pooling"] == "mean" and not card["append_eos"] and card["consumed_samples"] == 96
    assert (card["query_prefix"], card["doc_prefix"]) == ("query: ", "passage: ")

    from transformers import AutoModel

    before = AutoModel.from_pretrained(workplace / "bert", add_pooling_layer=False).state_dict()
    after = AutoModel.from_pretrained(workplace / "run" / "model", add_pooling_layer=False).state_dict()
    assert before.keys() == after.keys()
    # Of the token types, only the first is in use.
    assert all(not before[n].equal(after[n].to(before[n])) for n in before if before[n].dim() == 2)


def test_lora_and_cls_under_zero3(workplace):
    train(workplace, "lora", "--lora_rank", 4, "--pooling", "cls", zero=3, model="mpnet")
    assert (workplace / "lora" / "model" / "adapter_config.json").exists()
    assert json.loads((workplace / "lora" / "model" / "ds_embed.json").read_text())["pooling"] == "cls"


def test_every_option_of_loss_and_data_at_once(workplace):
    """The same losses for 1 rank and 2, and the learned temperature in the card."""
    options = [
        "--learnable_temperature",
        "true",
        "--label_smoothing",
        0.1,
        "--symmetric",
        "true",
        "--false_negative_margin",
        0.1,
        "--matryoshka_dims",
        32,
        16,
        "--matryoshka_weights",
        1,
        0.5,
        "--distillation_weight",
        0.2,
        "--sampling_probabilities",
        3,
        1,
        "--hard_negatives_sampling",
        "random",
        "--batching",
        "homogeneous",
        "--bf16",
        "false",
    ]
    files = [workplace / "scored1.jsonl", workplace / "scored2.jsonl"]
    traces = [
        train(workplace, name, *options, num_ranks=num_ranks, zero=zero, files=files)
        for name, num_ranks, zero in (("one", 0, 0), ("two", 2, 3))
    ]
    for one, two in zip(*traces):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert two["temperature"] == pytest.approx(one["temperature"], rel=1e-4)
    temperatures = [line["temperature"] for line in traces[1]]
    assert temperatures[0] == 0.02 and temperatures[-1] != 0.02
    model = workplace / "two" / "model"
    card = json.loads((model / "ds_embed.json").read_text())
    assert card["temperature"] == pytest.approx(temperatures[-1], rel=0.01) and card["temperature"] != 0.02

    from safetensors.torch import load_file

    assert not [name for name in load_file(model / "model.safetensors") if "log_scale" in name]


def test_validation_and_checkpoints_at_the_end_of_each_epoch(workplace):
    """60 records in steps of 24: a pass ends within steps 3 and 5, and with the last one, 8 (192 of 3.2 passes)."""
    epochs = ["--val_files", workplace / "train.json", "--val_each_epoch", "true", "--save_each_epoch", "true"]
    lines = train(workplace, "epochs", *epochs, "--save_total_limit", 0, "--global_batch_size", 24, num_ranks=0)
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 5, 8]
    saved = {path.name for path in (workplace / "epochs" / "checkpoints").iterdir()}
    assert {name for name in saved if name[0] != "."} == {f"step_0000000{number}" for number in (3, 5, 8)}, saved


def test_several_test_sets_by_name(workplace):
    """Each set has its measures, those of the files without a name are theirs, and the mean is over all sets."""
    records = [json.loads(line) for line in open(workplace / "train.jsonl")]
    for name, part in (("a", records[:20]), ("b", records[20:])):
        folder = workplace / f"test_{name}"
        folder.mkdir()
        for file, keys in (("queries", ("query", "query_id", "doc_id")), ("docs", ("pos_doc", "doc_id"))):
            lines = [json.dumps({key: record[key] for key in keys}) + "\n" for record in part]
            (folder / f"{file}.jsonl").write_text("".join(lines))
    sets = [f"{name}={workplace / f'test_{name}'}" for name in "ab"]
    unnamed = ["--val_query_files", workplace / "test_a" / "queries.jsonl"]
    unnamed += ["--val_doc_files", workplace / "test_a" / "docs.jsonl"]
    best = ["--best_metric", "mean/nDCG@10", "--val_metrics", "nDCG@10", "RR@10", "--val_save_embeddings", "true"]
    lines = train(workplace, "sets", "--val_sets", *sets, *unnamed, *best, num_ranks=2)
    (found,) = [line for line in lines if "a/nDCG@10" in line]
    for measure in ("nDCG@10", "RR@10"):
        values = [found[f"{name}{measure}"] for name in ("", "a/", "b/")]
        assert values[0] == values[1] != values[2] and found[f"mean/{measure}"] == pytest.approx(np.mean(values))
    kept = workplace / "sets" / "validation" / "consumed_samples96"
    assert {path.name for path in (kept / "b").iterdir()} >= {"test_queries", "test_docs"}
    assert (kept / "a/test_docs/doc.npy").read_bytes() == (kept / "test_docs/doc.npy").read_bytes()


def test_settings_of_the_older_systems_page(workplace):
    """A JSON array and the flags of its BERT page, cut down to a few steps of a tiny model."""
    make_model(workplace / "bert512", "bert", max_position_embeddings=512)
    changed = ["--warmup_steps", 2, "--val_check_interval", 3, "--max_steps", 6]
    lines = train(
        workplace,
        "page",
        "--val_files",
        workplace / "train.json",
        "--hard_negatives",
        4,
        "--global_batch_size",
        8,
        "--max_length",
        512,
        "--micro_batch_tokens",
        512,
        "--learning_rate",
        "5e-6",
        "--min_learning_rate",
        "1e-8",
        "--warmup_steps",
        100,
        "--val_check_interval",
        100,
        *changed,
        num_ranks=0,
        model="bert512",
    )
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for line in training[:3]] == pytest.approx([2.5e-6, 5e-6, 5e-6])
    validations = [line for line in lines if "val_loss" in line]
    assert [list(line) for line in validations] == [
        ["step", "consumed_samples", "val_loss", "val_accuracy", "seconds"]
    ] * 2
    assert [line["step"] for line in validations] == [3, 6] and all(line["val_loss"] > 0 for line in validations)
    assert (workplace / "page" / "model" / "config.json").exists()
