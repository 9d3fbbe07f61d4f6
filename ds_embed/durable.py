"""Files that survive a crash: on the disk when we say so, and under their name only when whole."""

import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


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
    """A folder to fill that takes the name `path`, free or an empty folder, when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync_path(file)
        sync_path(temporary)
        os.replace(temporary, path)
        sync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable_folder(flag: str, path: Path) -> None:
    """ValueError unless the folder `path`, which need not exist yet, can be written."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{flag} {path}: is a file; give a folder")
    parent = next(p for p in [path, *path.parents] if p.exists())
    if not parent.is_dir():
        raise ValueError(f"{flag} {path}: {parent} is a file; give another folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{flag} {path}: {parent} can't be written")


def hold_lock(path: Path, flag: str, folder: Path) -> IO:
    """Hold the lock file `path` for as long as the returned file lives; the system frees it however we end.

    ValueError naming `flag`, `folder` and the holder when another process holds it. On a file system
    without locks a warning says so, and nothing is held.
    """
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ValueError(
            f"{flag} {folder}: in use by another job ({holder}), which holds the lock {path}; "
            "wait until it ends or choose another folder"
        ) from None
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s): see to it that one job uses it", path, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
