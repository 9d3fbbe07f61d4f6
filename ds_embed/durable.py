"""Files that survive a crash: on the disk when we say so, and under their name only when whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TextIO


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
def replaced_when_whole(path: Path) -> Iterator[TextIO]:
    """A text file that takes the name `path` only when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_when_whole(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path`, which is free or an empty folder, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync_path(file)
        os.replace(temporary, path)
        sync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
