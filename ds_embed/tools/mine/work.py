"""The folder of a mining job: what it was begun with, and the parts that are done.

Every part is a file or folder that has its name only when it is whole, so a job that is killed at any instant
goes on with what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.artifact.durable import replaced_when_whole, sync_path
from ds_embed.models.loading import find_model
from ds_embed.settings import TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.mining_arguments import MiningArguments, MiningModelArguments

_PLACES = ("output_file", "work_dir")  # decide no byte of the output
_READ_BYTES = 1 << 20


def describe_inputs(model: MiningModelArguments, text: TextArguments, arguments: MiningArguments) -> dict[str, Any]:
    """All that decides the output: settings, SHA-256 of text files, size and time of change of the large ones."""
    inputs = {**asdict(model), **asdict(text), **asdict(arguments)}
    for name in _PLACES:
        del inputs[name]
    for name in ("train_files", "doc_files"):
        inputs[name] = [_sha256(Path(path)) for path in inputs[name]]
    if arguments.embeddings is not None:
        inputs["embeddings"] = _stamps(Path(arguments.embeddings).resolve().rglob("*.npy"))
    if model.model_name_or_path is not None:
        source = find_model(model.model_name_or_path, model.adapter_path)
        inputs["model_files"] = _stamps_of_folders(source.base, source.adapter)
    if arguments.cross_encoder is not None:
        inputs["cross_encoder_files"] = _stamps_of_folders(arguments.cross_encoder)
    return inputs


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The names that differ, with old and new value where these are short."""
    shown = []
    for name in now:
        old, new = before.get(name), now[name]
        if old != new:
            plain = not isinstance(old, (list, dict)) and not isinstance(new, (list, dict))
            shown.append(f"{name} was {old} and is {new}" if plain else f"{name} changed")
    return ", ".join(shown)


class WorkFolder:
    """WORK/: inputs.json, catalog/, vectors, and chunk_XXXXXX.npz of every chunk of queries that is done."""

    def __init__(self, path: Path):
        self.path = path

    def begin(self, inputs: dict[str, Any]) -> bool:
        """Make the folder, or take up the one that is there; True if it was. UserError when it is another job's."""
        known = self.path / "inputs.json"
        if known.exists():
            changed = differences(json.loads(known.read_text(encoding="utf-8")), inputs)
            if changed:
                raise UserError(
                    f"{self.path}: was begun with other inputs: {changed}; give the same again, or remove that "
                    "folder to start afresh"
                )
            return True
        if self.path.exists() and any(not entry.name.startswith(".inputs.json.") for entry in self.path.iterdir()):
            raise UserError(f"--work_dir {self.path}: is no work folder of this recipe; choose another or an empty one")
        self.path.mkdir(parents=True, exist_ok=True)
        with replaced_when_whole(known) as file:
            json.dump(inputs, file, indent=1)
        return False

    def obtain(self, name: str, write: Callable[[Path], object]) -> Path:
        """The folder `name`, filled by `write` if it is not there."""
        final = self.path / name
        if not final.exists():
            partial = self.path / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(partial)
            for path in partial.iterdir():
                sync_path(path)
            partial.rename(final)
            sync_path(self.path)
        return final

    def chunk_path(self, number: int) -> Path:
        return self.path / f"chunk_{number:06d}.npz"

    def write_chunk(self, number: int, **arrays: np.ndarray) -> None:
        with replaced_when_whole(self.chunk_path(number)) as file:
            np.savez(file.buffer, **arrays)

    def missing_chunks(self, num_chunks: int) -> list[int]:
        return [number for number in range(num_chunks) if not self.chunk_path(number).exists()]

    def remove_parts_of(self, output_file: Path) -> None:
        """Remove what a killed job left beside the output: files that did not become whole."""
        for path in output_file.parent.glob(f".{escape(output_file.name)}*.part"):
            path.unlink()

    def remove(self) -> None:
        """Remove the folder, whole or half removed before."""
        # Renamed first, so that nobody takes what is left of it for a job to go on with.
        removed = self.path.with_name(f".{self.path.name}.removed")
        shutil.rmtree(removed, ignore_errors=True)
        if self.path.exists():
            self.path.rename(removed)
            shutil.rmtree(removed)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _stamps_of_folders(*folders: str | Path | None) -> dict[str, list[int]]:
    """Nothing for a model of the hub: its name is among the settings."""
    present = [Path(folder) for folder in folders if folder is not None and os.path.isdir(folder)]
    return _stamps(path for folder in present for path in folder.iterdir())


def _stamps(paths: Any) -> dict[str, list[int]]:
    files = sorted(path for path in paths if path.is_file())
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
