"""A folder that any number of jobs may want at once, such as a token store: one makes it, the others wait for it."""

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

# A build of another machine is taken for dead when nothing in its folder was written for this long.
_DEAD_AFTER_SECONDS = 24 * 3600

logger = logging.getLogger(__name__)


def obtain_folder(
    final: Path, what: str, flag: str, problem_of: Callable[[Path], str | None], write: Callable[[Path], None]
) -> Path:
    """Reuse the whole folder `final`, or have `write(folder)` fill one and put it there.

    problem_of: what is wrong with a folder, None where it is whole. On file systems without locks each process
    builds, and the first to finish wins. Which of the two happened is logged, with `what` it is. UserError that names
    `flag` when the disk does not take it; nothing half-done is left behind then.
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
            # Without locks another process may have finished first; its folder is as good as ours.
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
    """Make room where a folder of this name stands that is not whole: its files were lost or cut."""
    # Existence first: a folder that appears between the two looks was put there whole by another process.
    problem = problem_of(final) if final.exists() else None
    if problem is not None:
        logger.warning("%s: %s; it is replaced by a new build", final, problem)
        remove(final)


def _remove_dead_builds(locked: Path) -> None:
    """Remove what killed builds left in a folder. The caller holds the lock of `locked`.

    A build holds its lock while it lives, so one whose lock is free is dead. That is sure only on the machine that
    it ran on (network file systems may keep locks to one machine); a build of another machine must also have been
    silent for a day.
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
        with contextlib.suppress(FileNotFoundError):  # it may be removed or renamed under our eyes
            times.append(path.stat().st_mtime)
    return max(times, default=time.time())
