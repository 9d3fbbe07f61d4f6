"""Files and folders that are whole under their name or absent, on the disk when we say so, and owned by one job.

What is not whole yet stands under a hidden name beside it. Hidden names, locks, fsync and renames are spelled here
and in artifact.py alone.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ds_embed.settings.errors import UserError

# What a disk or its owner refuses; other errors of the system are bugs.
_DISK_ERRORS = {
    errno.ENOSPC,
    errno.ENOENT,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EFBIG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}
UNFINISHED = ".unfinished-"
_REMOVED = ".removed-"
_READ_BYTES = 1 << 22

logger = logging.getLogger(__name__)


def sync_path(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Have everything in a folder on the disk when this returns."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def sync_file(file: IO) -> None:
    """Have what was written to an open file on the disk when this returns."""
    file.flush()
    os.fsync(file.fileno())


def sync_and_close(file: IO) -> None:
    """Close a file that was written, with its content on the disk."""
    sync_file(file)
    file.close()


def sha256_of(path: Path, start: int = 0, num_bytes: int | None = None) -> str:
    """SHA-256 of a file, or of `num_bytes` bytes (as many of them as there are) from `start` on."""
    digest, left = hashlib.sha256(), num_bytes
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(_READ_BYTES if left is None else min(left, _READ_BYTES)):
            digest.update(block)
            left = None if left is None else left - len(block)
    return digest.hexdigest()


@contextmanager
def written_or_named(
    path: Path, cure: str = "cure that and start the same command again", name: str | None = None
) -> Iterator[None]:
    """What the disk refuses inside is the user's to cure: a UserError with the reason and what is free.

    It calls what can't be written `name`, or `path`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(
            f"{name or path} could not be written ({error.strerror}; {free_space(path)}); {cure}"
        ) from error


def free_space(path: Path) -> str:
    """How much is free where `path` is or would be, for messages."""
    try:
        place = next(p for p in [path, *path.absolute().parents] if p.exists())
        return f"{shutil.disk_usage(place).free / 2**20:,.0f} MiB are free there"
    except OSError as error:
        return str(error)


def unfinished_path(path: Path, own: bool = False) -> Path:
    """Where `path` stands until it is whole; with `own`, a place that no other process of this machine uses."""
    return path.with_name(f"{UNFINISHED}{path.name}" + (f"-{os.getpid()}" if own else ""))


def remove(path: Path) -> None:
    """Remove a file or folder, or what a process that was killed in here left of it, so that it is never seen in part."""
    removed = path.with_name(f"{_REMOVED}{path.name}")
    _delete(removed)
    if path.is_symlink() or path.exists():
        os.rename(path, removed)
        _delete(removed)


def remove_unfinished(path: Path) -> None:
    """Remove what jobs that were killed left of `path`, which the caller's lock protects from others."""
    name = re.escape(path.name)
    left = re.compile(f"{re.escape(UNFINISHED)}{name}(-\\d+)?|{re.escape(_REMOVED)}{name}")
    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        if left.fullmatch(entry.name):
            _delete(entry)


def remove_all_unfinished(folder: Path) -> None:
    """Remove what jobs that were killed left in a folder that the caller's lock protects from others."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.name.startswith((UNFINISHED, _REMOVED)):
            _delete(entry)


def set_aside(path: Path) -> Path:
    """Rename what is damaged, so that it neither counts nor is in the way, and return where it is kept."""
    for number in range(1, 10_000):
        away = path.with_name(f"{path.name}.damaged{number}")
        if not away.exists():
            return path.rename(away)
    raise UserError(f"{path.parent}: too many damaged copies of {path.name}; remove them")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give `unfinished`, which is on the disk, the name `path`; what stands there is replaced.

    A folder can't be replaced in one call: killed between the two, neither stands there, and `unfinished` is whole.
    """
    replaced = path.with_name(f"{_REMOVED}{path.name}")
    if path.is_dir() and unfinished.is_dir() and any(path.iterdir()):
        _delete(replaced)
        os.rename(path, replaced)
    os.replace(unfinished, path)
    sync_path(path.parent)
    _delete(replaced)


@contextmanager
def written_whole(path: Path, binary: bool = False) -> Iterator[IO]:
    """As replaced_when_whole, for those who say themselves what it means when the disk does not take the file."""
    temporary = unfinished_path(path, own=True)
    text_settings = {} if binary else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, "wb" if binary else "w", **text_settings) as file:
            yield file
            sync_file(file)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_when_whole(path: Path, binary: bool = False) -> Iterator[IO]:
    """A text (or binary) file that takes the name `path` only when the block ends without an error.

    UserError naming it, and what is free, when the disk does not take it.
    """
    with written_or_named(path), written_whole(path, binary) as file:
        yield file


@contextmanager
def file_when_whole(path: Path) -> Iterator[Path]:
    """As replaced_when_whole, for those who write a file by its name: a path that becomes `path`."""
    temporary = unfinished_path(path, own=True)
    try:
        with written_or_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync_path(temporary)
            put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_when_whole(path: Path, name: str | None = None) -> Iterator[Path]:
    """A folder to fill that takes the name `path` when the block ends without an error; what stands there goes.

    UserError naming it (or `name`), and what is free, when the disk does not take it.
    """
    temporary = unfinished_path(path, own=True)
    try:
        with written_or_named(path, name=name):
            path.parent.mkdir(parents=True, exist_ok=True)
            _delete(temporary)
            temporary.mkdir()
            yield temporary
            sync_tree(temporary)
            put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_writable_folder(flag: str, path: Path) -> None:
    """UserError unless the folder `path`, which need not exist yet, can be written."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path}: is a file; give a folder")
    parent = next(p for p in [path, *path.parents] if p.exists())
    if not parent.is_dir():
        raise UserError(f"{flag} {path}: {parent} is a file; give another folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path}: {parent} can't be written")


def hold_lock(path: Path, flag: str, *, inside: bool = False) -> IO:
    """Own `path` for as long as the returned file lives; the system frees it however we end.

    The lock is a file beside `path`, or `inside` a folder. UserError naming `flag`, `path` and the owner when
    another process owns it. On a file system without locks a warning says so, and nothing is held.
    """
    lock = path / ".lock" if inside else path.with_name(f".{path.name}.lock")
    with written_or_named(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = open(lock, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{flag} {path}: in use by another job ({holder}), which holds the lock {lock}; "
            "wait until it ends or choose another folder"
        ) from None
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s): see to it that one job uses it", lock, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
