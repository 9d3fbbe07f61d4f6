"""A folder that any number of jobs may want at once, such as a token store: one makes it, the others wait for it.

It is written under a hidden name beside its place, brought to the disk, and renamed. So whatever stands under the
final name was finished, however the process that wrote it ended.
"""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ds_embed.artifact.durable import UNFINISHED, sync_path
from ds_embed.settings.errors import UserError

# A build of another machine is taken for dead when nothing in its folder was written for this long.
_DEAD_AFTER_SECONDS = 24 * 3600
_NO_ROOM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS_ERRORS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

logger = logging.getLogger(__name__)


def obtain_folder(
    final: Path, what: str, flag: str, problem_of: Callable[[Path], str | None], write: Callable[[Path], None]
) -> Path:
    """Reuse the whole folder `final`, or have `write(folder)` fill one and put it there.

    problem_of: what is wrong with a folder, None where it is whole. On file systems without locks each process
    builds, and the first to finish wins. Which of the two happened is logged, with `what` it is. UserError that names
    `flag` when there is no room; nothing half-done is left behind then.
    """
    if _is_whole(final, what, problem_of):
        return final
    _make_writable(final.parent, flag)
    try:
        with lock(final, wait=True) as held:
            if _is_whole(final, what, problem_of):
                return final
            if held:
                _remove_dead_builds(final)
            return _build(final, what, problem_of, write)
    except OSError as error:
        if error.errno in _NO_ROOM_ERRORS:
            raise UserError(
                f"no room for the {what} in {final.parent} ({error.strerror}); free space there or choose another {flag}"
            ) from error
        raise


def _make_writable(folder: Path, flag: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(folder, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        problem = error.strerror
    if problem is not None:
        raise UserError(f"{flag}={folder} cannot be written ({problem}); choose a folder that can")


def _build(final: Path, what: str, problem_of: Callable[[Path], str | None], write: Callable[[Path], None]) -> Path:
    folder = _hidden(final, f"{os.getpid()}-{secrets.token_hex(4)}")
    logger.info("building the %s %s", what, final)
    folder.mkdir()
    try:
        write(folder)
        assert problem_of(folder) is None
        sync_path(folder)
        clear_damaged(final, problem_of)
        try:
            folder.rename(final)
        except OSError:
            # Without locks another process may have finished first; its folder is as good as ours.
            if problem_of(final) is not None:
                raise
        sync_path(final.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return final


def _is_whole(final: Path, what: str, problem_of: Callable[[Path], str | None]) -> bool:
    if problem_of(final) is None:
        logger.info("reusing the %s %s", what, final)
        return True
    return False


def clear_damaged(final: Path, problem_of: Callable[[Path], str | None]) -> None:
    """Make room where a folder of this name stands that is not whole: its files were lost or cut."""
    # Existence first: a folder that appears between the two looks was put there whole by another process.
    problem = problem_of(final) if final.exists() else None
    if problem is None:
        return
    logger.warning("%s: %s; it is replaced by a new build", final, problem)
    # Renamed first, so that no reader meets it half deleted.
    away = _hidden(final, f"damaged-{secrets.token_hex(4)}")
    final.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def _remove_dead_builds(locked: Path) -> None:
    """Remove what killed builds left in a folder. The caller holds the lock of `locked`.

    A build holds its lock while it lives, so one whose lock is free is dead. That is sure only on the machine that
    it ran on (network file systems may keep locks to one machine); a build of another machine must also have been
    silent for a day.
    """
    for folder in locked.parent.glob(f"{UNFINISHED}*@*@*"):
        name, host, _ = folder.name.removeprefix(UNFINISHED).split("@", 2)
        if host != _host_name() and time.time() - _last_written(folder) < _DEAD_AFTER_SECONDS:
            continue
        holds_already = contextlib.nullcontext(True)
        with holds_already if name == locked.name else lock(locked.with_name(name), wait=False) as held:
            if held:
                logger.info("removing %s, left by a build that was killed", folder)
                shutil.rmtree(folder, ignore_errors=True)


def _hidden(final: Path, who: str) -> Path:
    return final.with_name(f"{UNFINISHED}{final.name}@{_host_name()}@{who}")


def _last_written(folder: Path) -> float:
    times = []
    for path in (folder, *folder.glob("*")):
        with contextlib.suppress(FileNotFoundError):  # it may be removed or renamed under our eyes
            times.append(path.stat().st_mtime)
    return max(times, default=time.time())


@contextlib.contextmanager
def lock(final: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock of `final`, which the system frees when the process ends; yields whether it is held."""
    path = final.with_name(f".{final.name}.lock")
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
            if wait:
                logger.info("waiting for another process that makes it (lock %s)", path)
                fcntl.flock(file, fcntl.LOCK_EX)
                held = True
        except OSError as error:
            if error.errno not in _NO_LOCKS_ERRORS:
                raise
            held = False
        yield held


def _host_name() -> str:
    return socket.gethostname().replace("@", "_").replace("/", "_")
