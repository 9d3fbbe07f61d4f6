"""The folder of a mining job: what it was begun with, and the parts that are done.

WORK/catalog/, bm25/, vectors/   folders that have their name only when they are whole
WORK/chunk_XXXXXX.npz            a part of the artifact for every chunk of queries that is done
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ds_embed.artifact.artifact import BEGUN, Artifact
from ds_embed.artifact.durable import folder_when_whole, hold_lock, remove, remove_unfinished
from ds_embed.artifact.identity import identify_large, identify_texts, identify_weights
from ds_embed.data.files import list_parts, stamp_of
from ds_embed.models.loading import find_source
from ds_embed.models.reranker import find_reranker
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.mining_arguments import MiningArguments

KIND = "the work of mining, form 3"
_PLACES = ("output_file", "work_dir")  # decide no byte of the output


def describe_inputs(model: ModelArguments, text: TextArguments, arguments: MiningArguments) -> dict[str, str]:
    """All that decides the output, by the name of its flag where it has one."""
    settings = {**asdict(model), **asdict(text), **asdict(arguments)}
    inputs = {name: str(value) for name, value in settings.items() if name not in _PLACES}
    for name in ("train_files", "doc_files", "corpus_files"):
        inputs[name] = ", ".join(map(_identify, settings[name]))
    if arguments.embeddings is not None:
        inputs["embeddings"] = identify_large(Path(arguments.embeddings).resolve().rglob("*.npy"))
    if model.model_name_or_path:
        source = find_source(model)
        inputs |= source.identify(None)
    if arguments.cross_encoder is not None:
        inputs["cross_encoder"] = identify_weights(find_reranker(arguments.cross_encoder, flag="cross_encoder").base)
    return inputs


def _identify(entry: str) -> str:
    """Files by what they hold, URLs and data sets by their stamps."""
    parts = list_parts(entry)
    return ", ".join(identify_texts([part]) if Path(part).is_file() else str(stamp_of(part)) for part in parts)


class WorkFolder(Artifact):
    """WORK/, which is begun, gone on with, and removed when the output is there."""

    def __init__(self, path: Path, inputs: dict[str, str]):
        super().__init__(path, KIND, "--work_dir", inputs, begun=path)
        self._done: set[str] = set()

    def open(self) -> bool:
        """Make the folder and own it, or take up the one that is there; True if it was. UserError: another job's."""
        names = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        if BEGUN not in names and any(not name.startswith(".") for name in names):
            raise UserError(f"--work_dir {self.path}: is no work folder of this recipe; choose another or an empty one")
        self._lock = hold_lock(self.path, self.flag, inside=True)
        # One that ended before its first part, as on a bad record, holds nothing that other inputs would spoil.
        has_parts = any(entry.is_dir() or entry.suffix == ".npz" for entry in self.path.glob("[!.]*"))
        was_there = has_parts and self.look_begun() == "begun"
        kept = [part for part in self.begin() if self.holds(part)]
        self.keep(kept)
        self._done = {part.file for part in kept}
        return was_there

    def obtain(self, name: str, write: Callable[[Path], object]) -> Path:
        """The folder `name`, filled by `write` if it is not there."""
        final = self.path / name
        if not final.exists():
            remove_unfinished(final)
            with folder_when_whole(final) as folder:
                write(folder)
        return final

    def chunk_path(self, number: int) -> Path:
        return self.path / f"chunk_{number:06d}.npz"

    def write_chunk(self, number: int, **arrays: np.ndarray) -> None:
        content = io.BytesIO()
        np.savez(content, **arrays)
        with self.or_named(str(self.path), "the chunks that are done are kept"):
            self.write(self.chunk_path(number).name, content.getbuffer())
            self.save()

    def missing_chunks(self, num_chunks: int) -> list[int]:
        return [number for number in range(num_chunks) if self.chunk_path(number).name not in self._done]

    def remove(self) -> None:
        """Remove the folder, whole or half removed before."""
        self.release()
        remove(self.path)
