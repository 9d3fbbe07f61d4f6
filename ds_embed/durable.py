"""Files that survive a crash: on the disk when we say so, and under their name only when whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def sync_path(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_and_close(file: IO) -> None:
    """Close a file that was written, with its content on the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


@contextmanager
def replaced_when_whole(path: Path, binary: bool = False) -> Iterator[IO]:
    """A text (or binary) file that takes the name `path` only when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    text_settings = {} if binary else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, "wb" if binary else "w", **text_settings) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_when_whole(path: Path) -> Iterator[Path]:
    """A folder that takes the name `path`, which must be free, only when the block ends without an error.

    The files in it are the block's to sync.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.mkdir()
    try:
        yield temporary
        sync_path(temporary)
        temporary.rename(path)
        sync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
