"""A rank's side of the watchdog: it records its progress for its watcher, which ends the job when a rank is lost."""

import json
import mmap
import os
import secrets
import socket
import subprocess
import sys
import threading
from typing import Any

from ds_embed.job import watcher
from ds_embed.job.watcher import EXIT_RANK_LOST, PAGE
from ds_embed.settings.errors import UserError

DEFAULT_RANK_TIMEOUT = 60.0  # seconds; applies until the settings are read
DEFAULT_STALL_TIMEOUT = 540.0  # seconds; names the rank before NCCL's ten minutes pass, which names none
_START = 300.0  # seconds for all ranks to join


class Watch:
    """Records this rank's progress, and ends the rank when rank 0's watcher says so."""

    def __init__(self, rank: int, size: int, local_rank: int, store: Any):
        """Start this rank's watcher and wait for all others. OSError if rank 0's can't be reached."""
        descriptor = os.memfd_create("ds_embed_watch")
        os.ftruncate(descriptor, PAGE.size)
        self._page = mmap.mmap(descriptor, PAGE.size)
        self._marks, self._step, self._phase = 0, -1, "start"
        self._code = -1
        self._timeouts = (DEFAULT_RANK_TIMEOUT, DEFAULT_STALL_TIMEOUT)
        self._write()
        self._is_watched, self._news = threading.Event(), threading.Event()
        self._news_code = EXIT_RANK_LOST
        self._control, theirs = socket.socketpair()
        address = os.environ["MASTER_ADDR"]
        if rank == 0:
            link, token = _listen(address), secrets.token_hex(16)
            store.set("watch", json.dumps([link.getsockname()[1], token]))
        else:
            port, token = json.loads(store.get("watch"))
            link = socket.create_connection((address, port), timeout=60)
        passed = (descriptor, theirs.fileno(), link.fileno())
        settings = [rank, size, local_rank, token, os.getpid(), *passed]
        self._process = subprocess.Popen(
            # -I and -S: import nothing but the standard library.
            [sys.executable, "-I", "-S", watcher.__file__],
            env=os.environ | {watcher.SETTINGS: json.dumps(settings)},  # other users can't read the environment
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=passed,
        )
        for ours in (theirs, link):
            ours.close()
        os.close(descriptor)
        threading.Thread(target=self._listen_to_watcher, name="ds_embed watch", daemon=True).start()
        if not self._is_watched.wait(_START):
            raise UserError(f"the watchdogs of the {size} ranks did not find each other at {address} in {_START:.0f} s")

    def set_timeouts(self, rank_timeout_seconds: float, stall_timeout_seconds: float) -> None:
        """Rank 0's values apply to the whole job, except for the silence of its own host. 0 disables a timeout."""
        self._timeouts = (rank_timeout_seconds, stall_timeout_seconds)
        self._write()

    def mark(self, phase: str | None = None, step: int | None = None) -> None:
        """Pass a point that all ranks pass in the same order: a rank that has passed fewer is behind."""
        self._marks += 1
        self._phase = self._phase if phase is None else phase
        self._step = self._step if step is None else step
        self._write()

    def wait_for_news(self, seconds: float) -> int | None:
        """The exit code of a rank that failed, or EXIT_RANK_LOST; None if no rank is known to have failed."""
        return self._news_code if self._news.wait(seconds) else None

    def leave(self, code: int) -> None:
        """Announce that this process is about to exit, so that its watcher expects it."""
        self._code = code
        self._write()

    def _write(self) -> None:
        phase = self._phase.encode(errors="replace")[:96]
        PAGE.pack_into(self._page, 0, self._marks, self._step, self._code + 1, *self._timeouts, phase)

    def _listen_to_watcher(self) -> None:
        with self._control.makefile("r", encoding="ascii") as lines:
            for line in lines:
                what, code = line.split()
                if what == "watched":
                    self._is_watched.set()
                elif what == "left":
                    self._news_code = int(code)
                    self._news.set()
                else:
                    # The main thread may be stuck in a collective, so exit from here.
                    os._exit(int(code))


def _listen(address: str) -> socket.socket:
    """A socket that the other ranks can reach at MASTER_ADDR, bound to loopback if that is a loopback address."""
    # Compare the text: a host's own name may resolve to a loopback address, which other hosts can't use.
    if address == "localhost" or address.startswith("127."):
        return socket.create_server(("127.0.0.1", 0), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)
