"""Files and folders that are whole under their name or absent, on the disk when we say so, and owned by one job.

What is not whole yet stands under a hidden name beside it. Hidden names, locks, fsync and renames are spelled in this
room alone.
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

# What a disk or its owner refuses; other errors of the system are bugs.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}
_DISK_ERRORS |= {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
_NO_LOCKS_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
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

    It calls what can't be written `name`, or `path`. An error that names a file elsewhere is not about `path`.
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
    """Bytes that are free where `path` is or would be."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


def unfinished_path(path: Path, own: bool = False) -> Path:
    """Where `path` stands until it is whole; with `own`, a place that no other process or thread uses."""
    owner = f"@{host_name()}@{os.getpid()}-{secrets.token_hex(4)}" if own else ""
    return path.with_name(f"{UNFINISHED}{path.name}{owner}")


def host_name() -> str:
    return socket.gethostname().replace("@", "_").replace("/", "_")


def make_folder(path: Path) -> None:
    """Make a folder and those above it. UserError where the file system takes none, as in /proc."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no folder can be made there; choose another place") from None


def remove(path: Path) -> None:
    """Remove a file or folder, or what a process that was killed in here left of it, so that it is never seen in part."""
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
    """Rename what is damaged, so that it neither counts nor is in the way, and return where it is kept."""
    for number in range(1, 10_000):
        away = path.with_name(f"{path.name}.damaged{number}")
        if not away.exists():
            return path.rename(away)
    raise UserError(f"{path.parent}: too many damaged copies of {path.name}; remove them")


def delete(path: Path) -> None:
    """Remove a hidden file or folder; what the disk does not let go stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give `unfinished`, which is on the disk, the name `path`; what stands there is replaced.

    A folder can't be replaced in one call: killed between the two, neither stands there, and `unfinished` is whole.
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
    """As replaced_when_whole, for those who say themselves what it means when the disk does not take the file."""
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

    Who writes by name opens `file.name`. UserError naming it, and what is free, when the disk does not take it.
    """
    with written_or_named(path):
        make_folder(path.parent)
        with written_whole(path, binary) as file:
            yield file


@contextmanager
def folder_when_whole(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path` when the block ends without an error; what stands there goes.

    UserError naming it, and what is free, when the disk does not take it.
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
    """UserError unless the folder `path`, which need not exist yet, can be written."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path}: is a file; give a folder")
    parent = next(p for p in [path, *path.parents] if p.exists())
    if not parent.is_dir():
        raise UserError(f"{flag} {path}: {parent} is a file; give another folder")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path}: {parent} can't be written")


def hold_lock(path: Path, flag: str, *, inside: bool = False, wait: bool = False) -> IO | None:
    """Own `path` for as long as the returned file lives; the system frees it however we end.

    The lock is a file beside `path`, or `inside` a folder. When another process owns it: `wait`, or UserError naming
    `flag`, `path` and the owner. On a file system without locks a warning says so, nothing is held, and None returned.
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
