"""Checkpoints on disk: complete or absent, verified before use, and independent of the number of ranks and ZeRO stage.

RUN/checkpoints/step_00000100/
    weights-00001.safetensors ...   trained weights, float32, "NAME"
    moments-00001.safetensors ...   AdamW's moments, float32, "NAME/exp_avg" and "NAME/exp_avg_sq"
    state.json                      step, consumed_samples, AdamW's step, the best validations, ...
    manifest.json                   what the run is made from, size and SHA-256 of every file above

A checkpoint is an artifact whose parts are files, and can also be used for encoding. The learning rate and all random
draws are pure functions of settings and position, so they need no file.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_embed.artifact.artifact import MANIFEST, inspect, read_whole
from ds_embed.settings.errors import UserError

KIND = "a checkpoint, form 2"
STATE = "state.json"
WEIGHT = "weight"  # the kind of tensor other than AdamW's moments
_OTHER = "take another step, or start the run's command again, which writes it anew"
_NAME = re.compile(r"step_(\d{8,})")


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all checkpoints in `folder`, damaged or not, newest first."""
    found = [(m, path) for path in folder.glob("step_*") if (m := _NAME.fullmatch(path.name)) and path.is_dir()]
    return sorted(((int(m[1]), path) for m, path in found), reverse=True)


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`, naming the file; None if every byte is as written.

    UserError if another version of ds_embed wrote it.
    """
    return inspect(path, KIND)[0]


def read_state(path: Path) -> dict[str, Any]:
    """The content of state.json of a verified checkpoint."""
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def verify(path: Path, names: str) -> None:
    """UserError naming the first changed file of the checkpoint, among those whose names begin with `names`."""
    for part in read_whole(path, KIND, _OTHER)["parts"]:
        if part.file.startswith(names) and not part.is_in(path):
            raise UserError(f"{path / part.file}: was changed: its SHA-256 is not as it was written; {_OTHER}")


def checkpoint_in(flag: str, name: str, step: int | None) -> Path | None:
    """The checkpoint of `step` in the run `name`, or without a step `name` itself; None if that is not a checkpoint.

    UserError listing the run's steps if it has none of that step.
    """
    path = Path(name).expanduser()
    if step is None:
        is_one = _NAME.fullmatch(path.name) or ((path / STATE).exists() and (path / MANIFEST).exists())
        return path.resolve() if path.is_dir() and is_one else None
    checkpoint = checkpoint_path(path / "checkpoints", step)
    if not checkpoint.is_dir():
        raise UserError(f"--step {step}: --{flag} {name} has no checkpoint of that step; {steps_of(path)}")
    return checkpoint.resolve()


def steps_of(run: Path) -> str:
    """The steps of a run that can be chosen, in words."""
    steps = sorted(step for step, _ in list_checkpoints(run / "checkpoints"))
    return f"--step can be {', '.join(map(str, steps))}" if steps else f"there is none in {run / 'checkpoints'}"


def way_to(place: str, folder: Path) -> list[str]:
    """Paths to a place, absolute and from `folder`, so that both can be moved together; a hub name is kept as is."""
    if not Path(place).is_dir():
        return [place]
    return [str(Path(place).resolve()), os.path.relpath(Path(place).resolve(), folder.resolve())]


def found_again(ways: list[str], folder: Path) -> str:
    """The folder or hub name stored by `way_to`. UserError if the folder is gone."""
    if len(ways) == 1:
        return ways[0]
    for way in ways:
        if (folder / way).is_dir():
            return str((folder / way).resolve())
    raise UserError(f"{folder}: {ways[0]}, which it was trained from, is gone; bring it back, or move both together")


class CheckpointReader:
    """The tensors of a checkpoint by name, from all shards."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.tensors: dict[str, Any] = {}  # name in the file: the open shard with that tensor
        # Only the files listed in the manifest.
        names = {part.file for part in read_whole(path, KIND, _OTHER)["parts"]}
        for shard in sorted(name for name in names if name.endswith(".safetensors")):
            try:
                file = safe_open(str(path / shard), framework="pt")
            except SafetensorError as error:
                raise UserError(f"{path / shard}: not a file of tensors ({error}); remove {path}") from None
            self.tensors |= dict.fromkeys(file.keys(), file)

    def check(self, shapes: dict[str, tuple[int, ...]], cure: str) -> None:
        """UserError with the cure unless the checkpoint has exactly these weights, with these shapes."""
        stored = {n: tuple(f.get_slice(n).get_shape()) for n, f in self.tensors.items() if "/" not in n}
        odd = sorted(name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name))
        if odd:
            name = odd[0]
            raise UserError(
                f"{self.path}: {len(odd)} weight(s) don't fit the model, such as {name}: the checkpoint has "
                f"{stored.get(name, 'none')}, the model trains {shapes.get(name, 'none')}; {cure}"
            )

    def read(self, name: str, kind: str = WEIGHT) -> Tensor:
        stored = name if kind == WEIGHT else f"{name}/{kind}"
        return self.tensors[stored].get_tensor(stored)
