"""Intermediate work, done chunk by chunk: it is resumed after a kill and removed at the end.

WORK/chunk_XXXXXX.npz   a part of the artifact for every chunk that is done
WORK/NAME/              folders that have their name only when they are whole
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.artifact.artifact import BEGUN, Artifact
from ds_embed.artifact.durable import folder_when_whole, hold_lock, remove, remove_unfinished
from ds_embed.settings.errors import UserError


class WorkFolder(Artifact):
    """A folder of intermediate work. `made_from` is everything that determines the result; see Artifact."""

    def __init__(self, path: Path, kind: str, flag: str, made_from: dict[str, str]):
        super().__init__(path, kind, flag, made_from, begun=path)
        self._done: set[str] = set()

    def open(self) -> bool:
        """Own the folder, new or existing. True if there is work to resume. UserError if another job owns it."""
        names = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        if BEGUN not in names and any(not name.startswith(".") for name in names):
            raise UserError(
                f"{self.flag} {self.path}: is no work folder of this recipe; choose another or an empty one"
            )
        self._lock = hold_lock(self.path, self.flag, inside=True)
        # If it ended before its first part, as on a bad record, there is nothing that other inputs would invalidate.
        has_parts = any(entry.is_dir() or entry.suffix == ".npz" for entry in self.path.glob("[!.]*"))
        was_there = has_parts and self.look_begun() == "begun"
        kept = [part for part in self.begin() if part.is_in(self.begun)]
        self.keep(kept)
        self._done = {part.file for part in kept}
        return was_there

    def obtain(self, name: str, write: Callable[[Path], object]) -> Path:
        """The folder `name`; if it does not exist, `write` fills it."""
        final = self.path / name
        if not final.exists():
            remove_unfinished(final)
            with folder_when_whole(final) as folder:
                write(folder)
        return final

    def chunk_path(self, number: int) -> Path:
        return self.path / f"chunk_{number:06d}.npz"

    def missing_chunks(self, num_chunks: int) -> list[int]:
        return [number for number in range(num_chunks) if self.chunk_path(number).name not in self._done]

    def write_chunk(self, number: int, **arrays: Any) -> None:
        content = io.BytesIO()
        np.savez(content, **arrays)
        with self.or_named(str(self.path), "the chunks that are done are kept"):
            self.write(self.chunk_path(number).name, content.getbuffer())
            self.save()

    def remove(self) -> None:
        """Remove the folder, even if an earlier removal was interrupted."""
        self.release()
        remove(self.path)
