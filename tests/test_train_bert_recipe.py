"""recipes/train_bert.py as users run it, and what it takes for granted."""

import json

import numpy as np
import pytest
import yaml
from tiny import check, launch, make_model, make_training_file


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
    return root


def train(root, name, *extra, num_ranks=2, zero=2, model="bert"):
    check(
        launch(
            num_ranks, "recipes/train_bert.py", "--deepspeed", f"ds_configs/zero{zero}.json",
            "--model_name_or_path", root / model, "--train_files", root / "train.json",
            "--output_dir", root / name, "--cache_dir", root / "cache", "--max_length", 32,
            "--global_batch_size", 12, "--hard_negatives", 2, "--micro_batch_tokens", 200, "--max_steps", 8,
            "--learning_rate", "2e-3", "--report_to", "none", *extra,
        )
    )  # fmt: skip
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
