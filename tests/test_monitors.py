"""Monitors beside metrics.jsonl: resumed runs, what is missing, and Weights & Biases offline where it is installed."""

import importlib.util
import json
import struct
from pathlib import Path

import pytest
from tiny import check, launch, make_model, make_training_file

from ds_embed.settings import RunArguments
from ds_embed.training.monitors import cut_csv_files


def test_rows_of_steps_that_will_run_again_are_dropped(tmp_path):
    (tmp_path / "train_loss.csv").write_bytes(b"step,loss\r\n1,0.5\r\n2,0.25\r\n3,0.1\r\n4,0.")
    (tmp_path / "train_margin.csv").write_bytes(b"step,margin\n3,0.5\n")
    (tmp_path / "empty.csv").touch()
    assert cut_csv_files(tmp_path, 2) == ["train_loss"]
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"train_loss.csv": "step,loss\n1,0.5\n2,0.25\n"}
    assert cut_csv_files(tmp_path / "absent", 2) == []


@pytest.mark.parametrize("name, package", [("comet", "comet_ml"), ("wandb", "wandb")])
def test_a_monitor_whose_package_is_missing_names_it(monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == package else "there")
    with pytest.raises(ValueError, match=f"--report_to {name}: the package {package} is not installed; pip install"):
        RunArguments("out", "zero2.json", report_to=["tensorboard", name])


def records_of(log: bytes):
    """The records of a W&B file: LevelDB's log format behind seven bytes of their own."""
    place, record = 7, b""
    while len(log) - place > 7:
        room = 2**15 - place % 2**15
        if room < 7:  # too little for a header: the rest of the block is empty
            place += room
            continue
        length, part = struct.unpack("<HB", log[place + 4 : place + 7])
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the package wandb is not installed")
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """A run and its continuation, both with W&B's own files read back."""
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    make_model(tmp_path / "llama", "llama")
    make_training_file(tmp_path / "train.jsonl", 40, num_negatives=1)
    for steps in (2, 3):
        check(
            launch(
                0,
                "recipes/train_gpt.py",
                "--deepspeed",
                "ds_configs/zero0.json",
                "--model_name_or_path",
                tmp_path / "llama",
                "--train_files",
                tmp_path / "train.jsonl",
                "--output_dir",
                tmp_path / "run",
                "--cache_dir",
                tmp_path / "cache",
                "--max_length",
                32,
                "--global_batch_size",
                8,
                "--max_steps",
                steps,
                "--report_to",
                "wandb",
                "--report_project",
                "projected",
                "--run_name",
                "named",
            )
        )
    trace = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    seen, identities = {}, []
    for path in sorted(Path(tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")):
        for record in map(Record.FromString, records_of(path.read_bytes())):
            if record.WhichOneof("record_type") == "run":
                identities.append((record.run.run_id, record.run.project, record.run.display_name))
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                if key in ("train/loss", "train/margin"):
                    seen.setdefault(key, []).append(json.loads(item.value_json))
    assert len(set(identities)) == 1 and identities[0][1:] == ("projected", "named") and len(identities) >= 2
    assert seen["train/loss"] == [line["loss"] for line in trace] and len(trace) == 3
    assert seen["train/margin"] == [line["margin"] for line in trace]
