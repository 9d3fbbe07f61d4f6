"""Checkpoints on disk: complete or absent, checked before use, free of topology.

RUN/checkpoints/step_00000100/
    weights-00001.safetensors ...   trained weights, float32, "NAME"
    moments-00001.safetensors ...   AdamW's moments, float32, "NAME/exp_avg" and "NAME/exp_avg_sq"
    state.json                      step, consumed_samples, AdamW's step, fingerprint, ...
    manifest.json                   size and SHA-256 of every file above, and a SHA-256 of itself

A checkpoint is written under a hidden name, flushed to the disk and renamed. The learning rate and every
random draw are pure functions of the settings and the position, so neither needs a file.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_embed.artifact.durable import free_space, sync_path
from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError
from ds_embed.training.engine_state import WEIGHT, adam_step, gather_state, restore_state, trained_shapes

FORMAT_VERSION = 1
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step_(\d{8,})")
_HIDDEN = ".unfinished-"
_MAX_SHARD_BYTES = 2**30  # rank 0 holds about two shards of each kind in memory while it writes

logger = logging.getLogger(__name__)


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints in `folder`, newest first, whole or not."""
    found = [(m, path) for path in folder.glob("step_*") if (m := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted(((int(m[1]), path) for m, path in found), reverse=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def save_checkpoint(
    engine: Any, world: World, folder: Path, step: int, state: dict[str, Any], before: Callable[[], None]
) -> None:
    """Write `folder`/step_XXXXXXXX from all ranks. Every rank must call it.

    `state` is JSON content beside the tensors; `before` runs on rank 0 just before the checkpoint
    appears. UserError naming the step when it can't be written: the ones before it are untouched.
    """
    state = {"format_version": FORMAT_VERSION, "step": step, "adam_step": adam_step(engine), **state}
    problem: OSError | None = None
    writer: _Writer | None = None
    # After an error rank 0 still takes part in the gathering, so that no rank waits for it in a collective.
    for name, tensors in gather_state(engine, world):
        if not world.is_main or problem is not None:
            continue
        try:
            writer = writer or _Writer(folder, step)
            for kind, tensor in tensors.items():
                writer.add(name, kind, tensor)
        except OSError as error:
            problem = error

    def publish() -> None:
        try:
            if problem is not None:
                raise problem
            writer.finish(state)
            before()
            writer.publish()
        except OSError as error:
            remove_unfinished(folder)
            raise UserError(_failure(folder, step, error)) from error

    world.on_main(f"save {folder} step {step}", publish)


def _failure(folder: Path, step: int, error: OSError) -> str:
    known = list_checkpoints(folder)
    last = f"the checkpoint of step {known[0][0]} is untouched" if known else "there is none before it"
    free = free_space(folder.parent)
    reason = error.strerror or str(error)
    return (
        f"--output_dir {folder.parent}: the checkpoint of step {step} could not be written ({reason}; {free}); {last}. "
        "Cure that and start the same command again"
    )


def load_checkpoint(engine: Any, world: World, path: Path, state: dict[str, Any]) -> None:
    """Put the verified checkpoint at `path` into the engine. Every rank must call it; rank 0 reads.

    UserError when its weights are not those that this model trains.
    """
    shapes = trained_shapes(engine)
    reader: _Reader | None = None

    def open_and_check() -> None:
        nonlocal reader
        reader = _Reader(path)
        reader.check(shapes)

    world.on_main(f"open {path}", open_and_check)
    restore_state(engine, world, state["adam_step"], reader.read if reader else None)


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, naming the file; None when every byte is as written."""
    try:
        text = (path / MANIFEST).read_bytes()
        files = json.loads(text)["files"]
        if text != _manifest(files):
            return f"{MANIFEST} was changed"
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size:,} bytes and was written with {expected['bytes']:,}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} was changed: its SHA-256 is not the one it was written with"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"can't be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} can't be read as JSON"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a verified checkpoint. UserError when another version of ds_embed wrote it."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: has checkpoint format {state['format_version']} and this version of ds_embed reads "
            f"{FORMAT_VERSION}; go on with the version that wrote it"
        )
    return state


def prune(folder: Path, keep: int, protected: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and those of the steps in `protected`; `keep` 0 deletes none."""
    for step, path in list_checkpoints(folder)[keep:] if keep else []:
        if step in protected:
            continue
        # Renamed first: a job killed here must not leave something that looks like a damaged checkpoint.
        away = path.with_name(f"{_HIDDEN}{path.name}-old")
        shutil.rmtree(away, ignore_errors=True)
        path.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it neither counts nor is in the way of a new one of its step."""
    for number in range(1, 10_000):
        away = path.with_name(f"{path.name}.damaged{number}")
        if not away.exists():
            return path.rename(away)
    raise UserError(f"{path.parent}: too many damaged checkpoints; remove them")


def remove_unfinished(folder: Path) -> None:
    """Remove what jobs that were killed while saving left. The caller holds the run's lock."""
    for path in folder.glob(f"{_HIDDEN}*"):
        shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _manifest(files: dict[str, dict[str, Any]]) -> bytes:
    """The one text that describes `files`; with a hash of its own, so that no change of it goes unnoticed."""
    own = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    content = {"format_version": FORMAT_VERSION, "files": files, "sha256_of_files": own}
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


class _Writer:
    """Fills a hidden folder beside the checkpoint's place and, at the end, gives it its name."""

    def __init__(self, folder: Path, step: int):
        self.final = checkpoint_path(folder, step)
        self.path = folder / f"{_HIDDEN}{self.final.name}-{os.getpid()}"
        is_first = not folder.exists()
        self.path.mkdir(parents=True)
        if is_first:
            sync_path(folder.parent)
        self.files: dict[str, dict[str, Any]] = {}
        self.pending: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}}
        self.num_shards = {"weights": 0, "moments": 0}

    def add(self, name: str, kind: str, tensor: Tensor) -> None:
        stem = "weights" if kind == WEIGHT else "moments"
        pending = self.pending[stem]
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > _MAX_SHARD_BYTES:
            self._write_shard(stem)
        self.pending[stem][name if kind == WEIGHT else f"{name}/{kind}"] = tensor

    def _write_shard(self, stem: str) -> None:
        from safetensors.torch import save

        self.num_shards[stem] += 1
        self._write(f"{stem}-{self.num_shards[stem]:05d}.safetensors", save(self.pending[stem]))
        self.pending[stem] = {}

    def _write(self, name: str, content: bytes) -> None:
        # Hashed in memory, so that what a bad disk makes of it is noticed too.
        self.files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        with open(self.path / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, state: dict[str, Any]) -> None:
        for stem, pending in self.pending.items():
            if pending:
                self._write_shard(stem)
        self._write(STATE, (json.dumps(state, indent=1) + "\n").encode())
        self._write(MANIFEST, _manifest(dict(self.files)))
        sync_path(self.path)

    def publish(self) -> None:
        os.rename(self.path, self.final)
        sync_path(self.final.parent)


class _Reader:
    """The tensors of a checkpoint by name, from however many shards."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.tensors: dict[str, Any] = {}  # name in the file: the open shard that holds it
        # Those that the manifest vouches for, whatever else lies there.
        names = json.loads((path / MANIFEST).read_bytes())["files"]
        for shard in sorted(name for name in names if name.endswith(".safetensors")):
            try:
                file = safe_open(str(path / shard), framework="pt")
            except SafetensorError as error:
                raise UserError(f"{path / shard}: not a file of tensors ({error}); remove {path}") from None
            self.tensors |= dict.fromkeys(file.keys(), file)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        stored = {n: tuple(f.get_slice(n).get_shape()) for n, f in self.tensors.items() if "/" not in n}
        odd = sorted(name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name))
        if odd:
            name = odd[0]
            raise UserError(
                f"{self.path}: {len(odd)} weight(s) don't fit the model, such as {name}: the checkpoint has "
                f"{stored.get(name, 'none')}, the model trains {shapes.get(name, 'none')}; "
                "use the model and LoRA settings of that run, or another --output_dir"
            )

    def read(self, name: str, kind: str) -> Tensor:
        stored = name if kind == WEIGHT else f"{name}/{kind}"
        return self.tensors[stored].get_tensor(stored)
