"""The files of a token store: arrays written piece by piece, and a manifest that marks the store as whole."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.artifact.shared import obtain_folder
from ds_embed.settings.errors import UserError

# Part of every store's key; increase it when the arrays, their meaning or the tokenization change.
FORMAT_VERSION = 7
MANIFEST_NAME = "manifest.json"


class NpyWriter:
    """A one-dimensional .npy file that grows by appending; `finish` writes its length."""

    def __init__(self, path: Path, dtype: Any):
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")
        self.num_items = 0
        self._write_header()

    def append(self, values: Any) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        self._file.write(values.data)
        self.num_items += len(values)

    def finish(self) -> None:
        """Write the length and close the file."""
        header_bytes = self._file.seek(0, os.SEEK_END) - self.num_items * self._dtype.itemsize
        self._file.seek(0)
        self._write_header()
        # numpy pads headers so that the length can grow in place.
        assert self._file.tell() == header_bytes
        self._file.close()

    def close(self) -> None:
        """Close after a failure; the content may be incomplete."""
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, header | {"shape": (self.num_items,)})


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write the manifest, the last of all files, with the sizes of the others."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    with open(folder / MANIFEST_NAME, "w", encoding="utf-8") as file:
        json.dump({**manifest, "store_files": sizes}, file, indent=1, ensure_ascii=False)
        file.write("\n")


def read_manifest(folder: Path) -> dict:
    """The manifest of a complete store. UserError with the cure if the store is not whole."""
    problem, manifest = _inspect(folder)
    if problem is not None:
        raise UserError(f"{folder}: {problem}; delete that folder and build the store again")
    return manifest


def obtain_store(cache_dir: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Reuse the store `cache_dir/name` if it is complete, or have `write(folder)` fill a folder and move it there.

    Any number of processes may call this at once (artifact.shared). UserError with the cure if the disk is full.
    """
    cache_dir = cache_dir.expanduser()  # a default or a value from YAML, which no shell has expanded
    return obtain_folder(cache_dir / name, "token store", "--cache_dir", lambda folder: _inspect(folder)[0], write)


def _inspect(folder: Path) -> tuple[str | None, dict]:
    """What is wrong with the store (None: nothing), and its manifest."""
    if not folder.is_dir():
        return "there is no token store here", {}
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing, so this is not a complete token store", {}
    except ValueError:
        return f"{MANIFEST_NAME} is not readable JSON", {}
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        return f"the store has format version {version}, and this program reads {FORMAT_VERSION}", {}
    for name, num_bytes in manifest["store_files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing", {}
        if path.stat().st_size != num_bytes:
            return f"{name} has {path.stat().st_size} bytes, and was written with {num_bytes}", {}
    return None, manifest
