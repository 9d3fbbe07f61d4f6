"""A rank that only has a watchdog: counts marks with the others, and obeys a line of its standard input.

    RANK=0 WORLD_SIZE=2 python tests/workers/watched.py FOLDER RANK_TIMEOUT STALL_TIMEOUT

The store is a folder, so that neither torch nor a launcher is needed.
"""

import os
import sys
import time
from pathlib import Path

from ds_embed.job.watchdog import Watch


class FolderStore:
    def __init__(self, folder: Path):
        self.folder = folder

    def set(self, key: str, value: str) -> None:
        part = self.folder / f"{key}.part"
        part.write_text(value)
        part.rename(self.folder / key)

    def get(self, key: str) -> str:
        while not (self.folder / key).exists():
            time.sleep(0.01)
        return (self.folder / key).read_text()


def hold_the_interpreter(seconds: float) -> None:
    """Nothing else of this process runs meanwhile, as in a long call of a library that keeps the lock."""
    import ctypes

    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(sys.argv[1])
    watch = Watch(rank, size, rank, FolderStore(folder))
    watch.set_timeouts(float(sys.argv[2]), float(sys.argv[3]))
    watch.mark("work", 7)
    print("ready", os.getpid(), flush=True)
    command, *values = sys.stdin.readline().split()
    if command == "hold":
        hold_the_interpreter(float(values[0]))
    elif command == "wait":  # in the next collective
        watch.mark("gather")
    elif command == "leave":
        watch.leave(int(values[0]))
        os._exit(int(values[0]))
    sys.stdin.readline()  # until it is told to end well, or ended
    watch.leave(0)


if __name__ == "__main__":
    main()
