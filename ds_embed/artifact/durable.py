"""Files that survive a crash: on the disk when we say so, and under their name only when whole."""

import errno
import fcntl
import logging
import os
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
def written_or_named(path: Path, cure: str = "Cure that and start the same command again") -> Iterator[None]:
    """What the disk refuses inside is the user's to cure: a UserError that names `path`, the reason and what is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise UserError(f"{path}: could not be written ({error.strerror}; {free_space(path)}). {cure}") from error


def free_space(path: Path) -> str:
    """How much is free where `path` is or would be, for messages."""
    try:
        place = next(p for p in [path, *path.absolute().parents] if p.exists())
        return f"{shutil.disk_usage(place).free / 2**20:,.0f} MiB are free there"
    except OSError as error:
        return str(error)


@contextmanager
def replaced_when_whole(path: Path, binary: bool = False) -> Iterator[IO]:
    """A text (or binary) file that takes the name `path` only when the block ends without an error.

    UserError naming it, and what is free, when the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    text_settings = {} if binary else {"encoding": "utf-8", "newline": "\n"}
    try:
        with written_or_named(path), open(temporary, "wb" if binary else "w", **text_settings) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_when_whole(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path`, free or an empty folder, when the block ends without an error.

    UserError naming it, and what is free, when the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with written_or_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                sync_path(file)
            sync_path(temporary)
            os.replace(temporary, path)
            sync_path(path.parent)
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


def hold_lock(path: Path, flag: str, folder: Path) -> IO:
    """Hold the lock file `path` for as long as the returned file lives; the system frees it however we end.

    UserError naming `flag`, `folder` and the holder when another process holds it. On a file system
    without locks a warning says so, and nothing is held.
    """
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{flag} {folder}: in use by another job ({holder}), which holds the lock {path}; "
            "wait until it ends or choose another folder"
        ) from None
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s): see to it that one job uses it", path, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
