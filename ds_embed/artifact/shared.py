"""A folder that many jobs may need at once, such as a token store: one builds it, and the others wait for it."""

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from ds_embed.artifact.durable import (
    UNFINISHED,
    check_writable_folder,
    delete,
    hold_lock,
    host_name,
    remove,
    sync_path,
    sync_tree,
    unfinished_path,
    written_or_named,
)
from ds_embed.settings.errors import UserError

# A build on another machine counts as dead when nothing in its folder was written for this long.
_DEAD_AFTER_SECONDS = 24 * 3600

logger = logging.getLogger(__name__)


def obtain_folder(
    final: Path, what: str, flag: str, problem_of: Callable[[Path], str | None], write: Callable[[Path], None]
) -> Path:
    """Reuse the folder `final` if it is whole; otherwise have `write(folder)` fill one and move it there.

    problem_of(folder) says what is wrong with a folder, None if it is whole. On file systems without locks each process
    builds, and the first to finish wins. Reuse and build are logged, with `what` the folder is. On disk errors,
    UserError naming `flag`; nothing unfinished is left behind.
    """
    if _is_whole(final, what, problem_of):
        return final
    check_writable_folder(flag, final.parent)
    cure = f"free space there or choose another {flag}"
    with contextlib.ExitStack() as held, written_or_named(final, cure, f"the {what} {final}"):
        if (lock := hold_lock(final, flag, wait=True)) is not None:
            held.enter_context(lock)
            _remove_dead_builds(final)
        if _is_whole(final, what, problem_of):
            return final
        logger.info("building the %s %s", what, final)
        folder = unfinished_path(final, own=True)
        held.callback(delete, folder)
        folder.mkdir()
        write(folder)
        assert problem_of(folder) is None
        sync_tree(folder)
        clear_damaged(final, problem_of)
        try:
            folder.rename(final)
        except OSError:
            # Without locks another process may have finished first; its folder is equivalent to ours.
            if problem_of(final) is not None:
                raise
        sync_path(final.parent)
    return final


def _is_whole(final: Path, what: str, problem_of: Callable[[Path], str | None]) -> bool:
    if problem_of(final) is None:
        logger.info("reusing the %s %s", what, final)
        return True
    return False


def clear_damaged(final: Path, problem_of: Callable[[Path], str | None]) -> None:
    """Remove an existing folder `final` that is not whole because files were lost or truncated."""
    # Check existence first: a folder that appears between the two checks was put there whole by another process.
    problem = problem_of(final) if final.exists() else None
    if problem is not None:
        logger.warning("%s: %s; it is replaced by a new build", final, problem)
        remove(final)


def _remove_dead_builds(locked: Path) -> None:
    """Remove what killed builds left in the parent folder of `locked`, whose lock the caller holds.

    A build holds its lock while it runs, so one whose lock is free is dead. This is certain only on the machine where
    it ran (on network file systems locks may be local to a machine); a build on another machine must also have written
    nothing for a day.
    """
    for folder in locked.parent.glob(f"{UNFINISHED}*@*@*"):
        name, host, _ = folder.name.removeprefix(UNFINISHED).rsplit("@", 2)
        if host != host_name() and time.time() - _last_written(folder) < _DEAD_AFTER_SECONDS:
            continue
        with contextlib.suppress(UserError):  # another job holds it
            lock = None if name == locked.name else hold_lock(locked.with_name(name), "")
            logger.info("removing %s, left by a build that was killed", folder)
            delete(folder)
            if lock is not None:
                lock.close()


def _last_written(folder: Path) -> float:
    times = []
    for path in (folder, *folder.glob("*")):
        with contextlib.suppress(FileNotFoundError):  # it may be removed or renamed concurrently
            times.append(path.stat().st_mtime)
    return max(times, default=time.time())
