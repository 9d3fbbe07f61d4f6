"""Files of a checkpoint lost, cut or changed: always noticed, and the checkpoint before it is used."""

import errno
import json
import os
import shutil
import signal
import sys

import pytest
import torch
from tiny import leave_out_when_fast

from ds_embed.artifact.durable import set_aside
from ds_embed.models.checkpoint import damage, list_checkpoints
from ds_embed.settings.errors import UserError
from ds_embed.training import checkpoint
from ds_embed.training.checkpoint import CheckpointWriter, prune
from ds_embed.training.resume import clear_way, find_start
from ds_embed.training.run_folder import RunFolder, lines_up_to

FINGERPRINT = {"train_files": "aaaa (10 records)", "base_model": "bbbb", "learning_rate": "0.1"}


def write(folder, step):
    writer = CheckpointWriter(folder, step, FINGERPRINT, max_shard_bytes=100)  # two shards of weights, four of moments
    for name in ("layer.a", "layer.b"):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            writer.add(name, kind, torch.full((5, 3), float(step)))
    state = dict(step=step, adam_step=step, consumed_samples=4 * step, skipped_steps=0, best=None, max_steps=30)
    writer.finish(state)
    return writer.publish()


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("damage") / "run"
    for step in (10, 20):
        write(path / "checkpoints", step)
    return path


FILES = ["manifest.json", "state.json", *(f"weights-0000{n}.safetensors" for n in (1, 2))]
FILES += [f"moments-0000{n}.safetensors" for n in (1, 2, 3, 4)]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    os.truncate(path, 0)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\n")


def flip(position):
    def change(path):
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)

    change.__name__ = f"flip_at_{position}"
    return change


CHANGES = [os.remove, cut, empty, lengthen, *(flip(p) for p in (0, 0.3, 0.5, 0.77, 1))]


def test_these_are_all_files(run_path):
    assert sorted(FILES) == sorted(p.name for p in (run_path / "checkpoints" / "step_00000020").iterdir())
    assert find(run_path).step == 20


def find(path, accepted=(), fingerprint=FINGERPRINT, max_steps=30):
    return find_start(RunFolder(str(path)), fingerprint, list(accepted), max_steps)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damaged_file(run_path, tmp_path, caplog, name, change):
    shutil.copytree(run_path, tmp_path / "run")
    change(tmp_path / "run" / "checkpoints" / "step_00000020" / name)
    start = find(tmp_path / "run")
    assert (start.step, start.consumed_samples, start.checkpoint.name) == (10, 40, "step_00000010")
    assert "step_00000020 is damaged" in caplog.text and name in caplog.text
    # Damage in both: an error, and no fresh start.
    change(tmp_path / "run" / "checkpoints" / "step_00000010" / name)
    with pytest.raises(ValueError, match="all of its checkpoints are damaged.*step_00000020.*step_00000010"):
        find(tmp_path / "run")


def test_every_byte_of_the_small_files_counts(run_path, tmp_path):
    path = tmp_path / "step_00000020"
    shutil.copytree(run_path / "checkpoints" / "step_00000020", path)
    for name in ("manifest.json", "state.json"):
        content = (path / name).read_bytes()
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 1 << position % 8
            (path / name).write_bytes(changed)
            assert damage(path) is not None, (name, position)
        (path / name).write_bytes(content)
    assert damage(path) is None


def test_damaged_checkpoints_are_put_aside_and_do_not_count(run_path, tmp_path):
    folder = RunFolder(str(tmp_path / "run"))
    shutil.copytree(run_path, folder.path)
    os.remove(folder.checkpoints_dir / "step_00000020" / "state.json")
    (folder.checkpoints_dir / ".unfinished-step_00000025-1").mkdir()
    clear_way(folder, find(folder.path))
    names = {path.name for path in folder.checkpoints_dir.iterdir()}
    assert names == {"step_00000010", "step_00000020.damaged1"}
    write(folder.checkpoints_dir, 20)
    prune(folder.checkpoints_dir, 1)
    assert [step for step, _ in list_checkpoints(folder.checkpoints_dir)] == [20]
    assert set_aside(folder.checkpoints_dir / "step_00000020").name == "step_00000020.damaged2"


TOUCHES_THE_DISK = ("mkdir", "write", "pwrite", "flush", "close", "fsync", "rename", "replace", "unlink", "rmdir")


def save_until(folder, call):
    """Save step 30 and delete step 10, killed just before the `call`-th call that touches the disk; whether it was."""
    child = os.fork()
    if child == 0:
        calls = 0

        def count(frame, event, function):
            nonlocal calls
            if event == "c_call" and function.__name__ in TOUCHES_THE_DISK:
                calls += 1
                if calls == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        write(folder, 30)
        prune(folder, 2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_between_any_two_calls_of_a_save(run_path, tmp_path):
    leave_out_when_fast()
    call, starts, killed = 0, [], True
    while killed:
        call += 1
        folder = RunFolder(str(tmp_path / str(call)))
        shutil.copytree(run_path, folder.path)
        killed = save_until(folder.checkpoints_dir, call)
        start = find(folder.path)
        assert {damage(path) for _, path in list_checkpoints(folder.checkpoints_dir)} == {None}  # whole or absent
        starts.append(start.step)
        clear_way(folder, start)
        assert {path.name for path in folder.checkpoints_dir.iterdir()} <= {f"step_000000{n}0" for n in (1, 2, 3)}
        write(folder.checkpoints_dir, 40)  # the run goes on
        assert find(folder.path, max_steps=40).step == 40
    assert call > 20 and starts == sorted(starts) and starts[0] == 20 and starts[-5:] == [30] * 5


def test_changed_run(run_path, tmp_path):
    changed = FINGERPRINT | {"train_files": "cccc (10 records)", "learning_rate": "0.2"}
    with pytest.raises(ValueError) as caught:
        find(run_path, fingerprint=changed)
    for words in (
        "train_files was aaaa (10 records) and is cccc (10 records)",
        "learning_rate was 0.1 and is 0.2",
        "--accept_changes train_files learning_rate",
    ):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="train_files was"):
        find(run_path, fingerprint=changed, accepted=["learning_rate"])
    assert find(run_path, fingerprint=changed, accepted=["learning_rate", "train_files"]).step == 20
    with pytest.raises(ValueError, match="--accept_changes rate: no such name"):
        find(run_path, accepted=["rate"])
    with pytest.raises(ValueError, match="--max_steps 15: .*has already trained 20 steps"):
        find(run_path, max_steps=15)


def test_log_is_cut_back_to_the_checkpoint():
    lines = [json.dumps({"step": n, "loss": 1.0}) + "\n" for n in (1, 2, 2, 3)]
    assert lines_up_to("".join(lines) + '{"step": 2, "lo', 2) == lines[:3]
    assert lines_up_to("".join(lines), 0) == []


class OneRank:
    """Stands for the job of one process; saving asks no more of it."""

    is_main, size, rank = True, 1, 0

    def on_main(self, name, work):
        return work()


def test_checkpoints_of_earlier_versions_are_refused(tmp_path):
    path = tmp_path / "run" / "checkpoints" / "step_00000010"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text('{"format_version": 1, "files": {}}')
    with pytest.raises(UserError, match="holds what another version of ds_embed wrote.*go on with the version that"):
        find(tmp_path / "run")


@pytest.mark.parametrize("stage", ["write", "rename"])
def test_disk_that_fails_keeps_the_checkpoint_before(run_path, tmp_path, monkeypatch, stage):
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(run_path / "checkpoints", folder)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_):
        raise full

    tensors = {kind: torch.zeros(5) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    monkeypatch.setattr(checkpoint, "gather_state", lambda *_: iter([("a", tensors)]))
    monkeypatch.setattr(checkpoint, "adam_step", lambda _: 30)
    if stage == "write":
        monkeypatch.setattr(os, "pwrite", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="step 30 could not be written.*No space left.*step 20 is intact"):
        checkpoint.save_checkpoint(None, OneRank(), folder, 30, {}, before=lambda: None)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000010", "step_00000020"]
    assert damage(folder / "step_00000020") is None
