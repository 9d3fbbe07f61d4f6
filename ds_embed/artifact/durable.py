"""Files and folders that are whole under their name or absent, synced to disk, and owned by one job.

Anything unfinished has a hidden name in the same folder. Only this subpackage uses hidden names, locks, fsync and
renames.
"""

import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ds_embed.settings.errors import UserError

# Errors of the disk or its permissions; other system errors are bugs.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_DISK_ERRORS |= {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_NO_LOCKS_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
UNFINISHED = ".unfinished-"
_REMOVED = ".removed-"
_READ_BYTES = 1 << 22

logger = logging.getLogger(__name__)


def sync_path(path: Path) -> None:
    """Sync a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync everything in a folder to disk."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def sync_file(file: IO) -> None:
    """Sync what was written to an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sha256_of(path: Path, start: int = 0, num_bytes: int | None = None) -> str:
    """SHA-256 of a file from `start` on, or of at most `num_bytes` bytes of it."""
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
    """Turn disk errors inside the block into a UserError with the reason and the free space.

    The message says that `name` (default: `path`) can't be written. Errors that name a file elsewhere are passed on.
    """
    try:
        yield
    except OSError as error:
        folder = path.absolute().parent
        is_elsewhere = isinstance(error.filename, (str, Path)) and folder not in Path(error.filename).absolute().parents
        if error.errno not in _DISK_ERRORS or is_elsewhere:
            raise
        free = f"{free_bytes(path) / 2**20:,.0f} MiB are free there"
        raise UserError(f"{name or path} could not be written ({error.strerror}; {free}); {cure}") from error


def free_bytes(path: Path) -> int:
    """Free bytes on the disk where `path` is or would be."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


def unfinished_path(path: Path, own: bool = False) -> Path:
    """The hidden path of `path` until it is whole; with `own`, one that no other process or thread uses."""
    owner = f"@{host_name()}@{os.getpid()}-{secrets.token_hex(4)}" if own else ""
    return path.with_name(f"{UNFINISHED}{path.name}{owner}")


def host_name() -> str:
    return socket.gethostname().replace("@", "_").replace("/", "_")


def make_folder(path: Path) -> None:
    """Make a folder and its parents. UserError if the file system allows no folder there, as in /proc."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no folder can be made there; choose another place") from None


def remove(path: Path) -> None:
    """Remove a file or folder, never visible half-removed, or what a process that was killed in here left of it."""
    removed = path.with_name(f"{_REMOVED}{path.name}")
    delete(removed)
    if path.is_symlink() or path.exists():
        os.rename(path, removed)
        delete(removed)


def remove_unfinished(path: Path, inside: bool = False) -> None:
    """Remove what killed jobs left of `path`, or of anything in the folder `path`, which the caller's lock protects."""
    name = ".*" if inside else f"{re.escape(path.name)}(@[^@]*@[0-9]+-[0-9a-f]+)?"
    left, folder = re.compile(f"({re.escape(UNFINISHED)}|{re.escape(_REMOVED)}){name}"), path if inside else path.parent
    for entry in folder.iterdir() if folder.is_dir() else ():
        if left.fullmatch(entry.name):
            delete(entry)


def set_aside(path: Path) -> Path:
    """Rename a damaged folder, so that it is neither used nor in the way, and return its new path."""
    for number in range(1, 10_000):
        away = path.with_name(f"{path.name}.damaged{number}")
        if not away.exists():
            return path.rename(away)
    raise UserError(f"{path.parent}: too many damaged copies of {path.name}; remove them")


def delete(path: Path) -> None:
    """Remove a hidden file or folder; anything that can't be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give `unfinished`, which has been synced, the name `path`, replacing what is there.

    A folder can't be replaced in one call: after a kill between the two renames, `path` is absent and `unfinished`
    whole.
    """
    replaced = path.with_name(f"{_REMOVED}{path.name}")
    if path.is_dir() and unfinished.is_dir() and any(path.iterdir()):
        delete(replaced)
        os.rename(path, replaced)
    os.replace(unfinished, path)
    sync_path(path.parent)
    delete(replaced)


@contextmanager
def written_whole(path: Path, binary: bool = False) -> Iterator[IO]:
    """Like replaced_when_whole, for callers that report disk errors themselves."""
    temporary = unfinished_path(path, own=True)
    try:
        with open(temporary, "wb") if binary else open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield file
            sync_file(file)
        put_in_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_when_whole(path: Path, binary: bool = False) -> Iterator[IO]:
    """A text (or binary) file that takes the name `path` only when the block ends without an error.

    Code that writes by name opens `file.name`. On disk errors, UserError with the path and the free space.
    """
    with written_or_named(path):
        make_folder(path.parent)
        with written_whole(path, binary) as file:
            yield file


@contextmanager
def folder_when_whole(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path`, replacing what is there, when the block ends without an error.

    On disk errors, UserError with the path and the free space.
    """
    temporary = unfinished_path(path, own=True)
    try:
        with written_or_named(path):
            make_folder(temporary)
            yield temporary
            sync_tree(temporary)
            put_in_place(temporary, path)
    finally:
        delete(temporary)


def check_writable_folder(flag: str, path: Path) -> None:
    """UserError unless the folder `path`, which need not exist yet, is writable."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path}: is a file; give a folder")
    parent = next(p for p in [path, *path.parents] if p.exists())
    if not parent.is_dir():
        raise UserError(f"{flag} {path}: {parent} is a file; give another folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path}: {parent} can't be written")


def hold_lock(path: Path, flag: str, *, inside: bool = False, wait: bool = False) -> IO | None:
    """Own `path` while the returned file is open; the system releases it however this process ends.

    The lock is a file beside `path`, or `inside` a folder. If another process owns it: `wait`, or UserError naming
    `flag`, `path` and the owner. On a file system without locks it logs a warning, holds nothing and returns None.
    """
    lock = path / ".lock" if inside else path.with_name(f".{path.name}.lock")
    with written_or_named(lock):
        make_folder(lock.parent)
        file = open(lock, "a+", encoding="utf-8")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if not wait:
                raise UserError(
                    f"{flag} {path}: in use by another job ({holder}), which holds the lock {lock}; "
                    "wait until it ends or choose another folder"
                ) from None
            logger.info("waiting for another job (%s) that makes %s (lock %s)", holder, path, lock)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file
    except BaseException as error:
        file.close()
        if not isinstance(error, OSError) or error.errno not in _NO_LOCKS_ERRORS:
            raise
        logger.warning("%s: this file system has no locks (%s): see to it that one job uses it", lock, error)
        return None
