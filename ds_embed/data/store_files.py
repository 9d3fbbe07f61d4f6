"""The folder under a token store: arrays written piece by piece, put in place whole or not at all.

A store is written in a hidden folder beside its final place, synced, and renamed. So whatever stands
under the final name was finished, however the process that wrote it ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.artifact.durable import sync_and_close, sync_path
from ds_embed.settings.errors import UserError

# Part of every store's key: raise it when the arrays, their meaning or the tokenization change.
FORMAT_VERSION = 4
MANIFEST_NAME = "manifest.json"
_BUILDING_PREFIX = ".building-"
# A build of another machine is taken for dead when nothing in its folder was written for this long.
_DEAD_AFTER_SECONDS = 24 * 3600
_NO_ROOM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

logger = logging.getLogger("ds_embed.data")


class NpyWriter:
    """A one-dimensional .npy file that grows by appending; its length is entered when it is closed."""

    def __init__(self, path: Path, dtype: Any):
        self._dtype = np.dtype(dtype)
        self._file = open(path, "wb")
        self._num_items = 0
        self._write_header()

    def append(self, values: Any) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        self._file.write(values.data)
        self._num_items += len(values)

    def finish(self) -> None:
        """Enter the length and reach the disk."""
        header_bytes = self._file.seek(0, os.SEEK_END) - self._num_items * self._dtype.itemsize
        self._file.seek(0)
        self._write_header()
        # numpy pads headers for exactly this: the length grows in place.
        assert self._file.tell() == header_bytes
        sync_and_close(self._file)

    def close(self) -> None:
        """Give up: close without promising anything about the contents."""
        with contextlib.suppress(OSError):  # what could not be flushed is about to be deleted
            self._file.close()

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._num_items,)},
        )


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write the manifest, last of all files, with the sizes of the others in it."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    with open(folder / MANIFEST_NAME, "w", encoding="utf-8") as file:
        json.dump({**manifest, "store_files": sizes}, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict:
    """The manifest of a complete store. UserError, with the cure, if the store is not whole."""
    problem, manifest = _inspect(folder)
    if problem is not None:
        raise UserError(f"{folder}: {problem}; delete that folder and build the store again")
    return manifest


def obtain_store(cache_dir: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Reuse the complete store `cache_dir/name`, or have `write(folder)` fill a folder and put it there.

    Any number of processes may call this at once: one builds and the others wait for it. On file
    systems without locks each builds, and the first to finish wins. Which of the two happened is
    logged. UserError with the cure when there is no room; nothing half-done is left behind then.
    """
    cache_dir = cache_dir.expanduser()  # a default or a YAML file's value, which no shell has seen
    final = cache_dir / name
    if _is_complete(final):
        return final
    _make_writable(cache_dir)
    try:
        with _lock(cache_dir / f".{name}.lock", wait=True) as held:
            if _is_complete(final):
                return final
            if held:
                _remove_dead_builds(cache_dir, name)
            return _build(cache_dir, final, write)
    except OSError as error:
        if error.errno in _NO_ROOM_ERRORS:
            raise UserError(
                f"no room for the token store in {cache_dir} ({error.strerror}); "
                "free space there or choose another cache_dir"
            ) from error
        raise


def _make_writable(cache_dir: Path) -> None:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(cache_dir, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        problem = error.strerror
    if problem is not None:
        raise UserError(f"cache_dir={cache_dir} cannot be written ({problem}); choose a folder that can")


def _build(cache_dir: Path, final: Path, write: Callable[[Path], None]) -> Path:
    folder = cache_dir / f"{_BUILDING_PREFIX}{final.name}@{_host_name()}@{os.getpid()}-{secrets.token_hex(4)}"
    logger.info("building the token store %s", final)
    folder.mkdir()
    try:
        write(folder)
        assert _inspect(folder)[0] is None
        sync_path(folder)
        _clear_damaged(final)
        try:
            folder.rename(final)
        except OSError:
            # Without locks another process may have finished first; its store is as good as ours.
            if not _is_complete(final):
                raise
        sync_path(cache_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return final


def _is_complete(final: Path) -> bool:
    if _inspect(final)[0] is None:
        logger.info("reusing the token store %s", final)
        return True
    return False


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


def _clear_damaged(final: Path) -> None:
    """Make room where a store of our own name stands that is not whole: its files were lost or cut."""
    # Existence first: a store that appears between the two looks was put there whole by another process.
    problem = _inspect(final)[0] if final.exists() else None
    if problem is None:
        return
    logger.warning("%s: %s; it is replaced by a new build", final, problem)
    # Renamed first, so that no reader meets it half deleted.
    away = final.with_name(f"{_BUILDING_PREFIX}{final.name}@{_host_name()}@damaged-{secrets.token_hex(4)}")
    final.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _remove_dead_builds(cache_dir: Path, locked_name: str) -> None:
    """Remove what killed builds left. The caller holds the lock of `locked_name`.

    A build holds its store's lock while it lives, so one whose lock is free is dead. That is sure only
    on the machine that it ran on (network file systems may keep locks to one machine); a build of
    another machine must also have been silent for a day.
    """
    for folder in cache_dir.glob(f"{_BUILDING_PREFIX}*@*@*"):
        name, host, _ = folder.name.removeprefix(_BUILDING_PREFIX).split("@", 2)
        if host != _host_name() and time.time() - _last_written(folder) < _DEAD_AFTER_SECONDS:
            continue
        holds_already = contextlib.nullcontext(True)
        with holds_already if name == locked_name else _lock(cache_dir / f".{name}.lock", wait=False) as held:
            if held:
                logger.info("removing %s, left by a build that was killed", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _last_written(folder: Path) -> float:
    times = []
    for path in (folder, *folder.glob("*")):
        with contextlib.suppress(FileNotFoundError):  # it may be removed or renamed under our eyes
            times.append(path.stat().st_mtime)
    return max(times, default=time.time())


@contextlib.contextmanager
def _lock(path: Path, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock, which the system frees when the process ends; yields whether it is held."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
            if wait:
                logger.info("waiting for another process that builds this store (lock %s)", path)
                fcntl.flock(file, fcntl.LOCK_EX)
                held = True
        except OSError as error:
            if error.errno not in _NO_LOCKS_ERRORS:
                raise
            held = False
        yield held


def _host_name() -> str:
    return socket.gethostname().replace("@", "_").replace("/", "_")
