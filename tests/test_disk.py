"""Disks that are full or read-only, real ones: small file systems in memory, mounted for the test.

Mounting needs root; where it is not allowed these tests are skipped and say so.
"""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from test_damage import OneRank
from tiny import launch, make_model, make_training_file

from ds_embed.models.checkpoint import damage, list_checkpoints
from ds_embed.settings import RunArguments
from ds_embed.settings.errors import UserError
from ds_embed.training import checkpoint, run_folder
from ds_embed.training.run_folder import RunFolder


@pytest.fixture
def mount(tmp_path):
    """mount(folder, size) puts an empty file system there; called again, it changes its options."""
    mounted = []

    def change(folder, options):
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode and not mounted:
            pytest.skip(f"a real full or read-only disk needs the right to mount: {result.stderr.strip()}")
        assert result.returncode == 0, result.stderr
        mounted.append(folder)
        return folder

    yield change
    for folder in set(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_training_on_a_disk_that_fills_up(tmp_path, mount):
    make_model(tmp_path / "llama", "llama")
    make_training_file(tmp_path / "train.jsonl", 60, num_negatives=0)
    disk = mount(tmp_path / "disk", "size=700k")  # room for three checkpoints of 190 KB
    result = launch(
        2,
        "recipes/train_gpt.py",
        "--deepspeed",
        "ds_configs/zero2.json",
        "--model_name_or_path",
        tmp_path / "llama",
        "--train_files",
        tmp_path / "train.jsonl",
        "--output_dir",
        disk / "run",
        "--cache_dir",
        tmp_path / "cache",
        "--max_length",
        24,
        "--global_batch_size",
        4,
        "--max_steps",
        15,
        "--save_interval",
        1,
        "--save_total_limit",
        0,
        "--report_to",
        "none",
    )
    assert result.returncode == 2, result.stderr[-4000:]
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    (last, path), *_ = kept = list_checkpoints(disk / "run" / "checkpoints")
    assert len(errors) == 1 and f"the checkpoint of step {last + 1} could not be written (No space left" in errors[0]
    assert f"the checkpoint of step {last} is intact" in errors[0] and "Traceback" not in result.stderr
    assert len(kept) >= 2 and [damage(path) for _, path in kept] == [None] * len(kept)
    assert not list((disk / "run" / "checkpoints").glob(".unfinished-*"))
    lines = [json.loads(line) for line in open(disk / "run" / "metrics.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, last + 2))
    # And once more, now that nothing at all can be written.
    mount(disk, "remount,ro")
    with pytest.raises(ValueError, match=f"--output_dir {disk / 'run'}: {disk / 'run'} can't be written"):
        RunFolder(str(disk / "run")).claim(True)
    assert damage(path) is None


@pytest.mark.parametrize("state, reason", [("full", "No space left on device"), ("read-only", "Read-only file system")])
def test_disk_that_fails_while_a_run_writes(tmp_path, mount, monkeypatch, state, reason):
    disk = mount(tmp_path / "disk", "size=400k")
    silent = SimpleNamespace(write_events=lambda _: None, close=lambda: None)
    monkeypatch.setattr(run_folder, "Monitors", lambda *_: silent)
    folder = RunFolder(str(disk / "run"))
    folder.claim(True)
    folder.open([], {}, RunArguments("run", "zero2.json", report_to=["none"]), 0, 0)
    folder.log({"step": 1})
    tensors = {kind: torch.ones(5000) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    monkeypatch.setattr(checkpoint, "gather_state", lambda *_: iter([("a", tensors)]))
    monkeypatch.setattr(checkpoint, "adam_step", lambda _: 0)

    def save(step):
        checkpoint.save_checkpoint(None, OneRank(), folder.checkpoints_dir, step, {}, before=folder.sync_log)

    save(10)
    folder.publish_model(lambda target: (target / "weights").write_bytes(b"old"))
    if state == "full":
        with pytest.raises(OSError):
            (disk / "filler").write_bytes(bytes(2**20))
    else:
        folder.close()  # files that are open keep a disk writable
        folder._lock.close()
        mount(disk, "remount,ro")
    with pytest.raises(
        UserError, match=f"--output_dir {disk / 'run'}: .*step 20 could not be written .{reason}.*step 10 is"
    ):
        save(20)
    with pytest.raises(UserError, match=reason):
        folder.publish_model(lambda target: (target / "weights").write_bytes(bytes(2**16)))
    assert (folder.model_dir / "weights").read_bytes() == b"old"
    assert [path.name for path in folder.checkpoints_dir.iterdir()] == ["step_00000010"]
    assert damage(folder.checkpoints_dir / "step_00000010") is None
    if state == "full":
        with pytest.raises(
            UserError, match=f"--output_dir {disk / 'run'}: metrics.jsonl could not be written .{reason}"
        ):
            for step in range(2, 2000):
                folder.log({"step": step})
