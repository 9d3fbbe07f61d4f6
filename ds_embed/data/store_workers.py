"""Processes that encode the chunks of a token store, one per core.

They are separate programs, so they load neither the parent's main module nor torch. They communicate through standard
input and output. A worker whose parent is gone reads the end of its input and exits.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ds_embed.settings.errors import UserError

# A single process reads and checks the records, and it can't feed many more than this.
_MOST_PROCESSES = 16
_THREADS = "RAYON_NUM_THREADS"


def count_processes() -> int:
    """RAYON_NUM_THREADS, which also sets the tokenizer's threads, or the number of cores that this process may use."""
    asked = os.environ.get(_THREADS, "")
    return int(asked) if asked.isdigit() and int(asked) else min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)


class Workers:
    """`number` processes that run submitted function calls until `close`."""

    def __init__(self, number: int):
        self.number = number
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        package = Path(__file__).parents[2]
        environment = os.environ | {_THREADS: "1", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", "from ds_embed.data.store_workers import serve; serve()"]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            for _ in range(number)
        ]
        self._known: dict[int, set[int]] = {process.pid: set() for process in self._processes}
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(number)

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        for process in self._processes:
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):  # input that it will not read
                process.stdin.close()

    def submit(self, function: Callable, shared: tuple, *arguments: Any) -> Future:
        """Run function(*arguments, *shared) in some worker.

        `shared` is sent to each worker once, and must live as long as the workers. The future raises UserError if the
        worker was killed.
        """
        return self._threads.submit(self._call, function, shared, arguments)

    def _call(self, function: Callable, shared: tuple, arguments: tuple) -> Any:
        process = self._idle.get()
        known = self._known[process.pid]
        try:
            new = None if id(shared) in known else shared
            pickle.dump((function, id(shared), new, arguments), process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            known.add(id(shared))
            return pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = process.wait()
            if code >= 0:
                raise RuntimeError(
                    f"a process that tokenizes ended with status {code}; its error stands above"
                ) from None
            raise UserError(
                f"a process that tokenizes was killed by {signal.Signals(-code).name}, as happens when memory runs "
                f"out; run again, with fewer of them if that was the reason ({_THREADS}=1: all in one process)"
            ) from None
        finally:
            self._idle.put(process)


def serve() -> None:
    """Run as a worker: answer calls until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    calls, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr
    shared = {}
    while True:
        try:
            function, key, new, arguments = pickle.load(calls)
        except EOFError:
            return
        if new is not None:
            shared[key] = new
        try:
            pickle.dump(function(*arguments, *shared[key]), answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:
            os._exit(1)
