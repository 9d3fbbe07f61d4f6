"""A process beside every rank. If a rank dies, is stopped or gets stuck, the watchers name it and end the whole job.

The process runs this file as a script and imports only the standard library, so it responds whatever its rank is doing.
The kernel tells it whether the rank is gone or stopped, and a page of shared memory how far the rank has come. The
watchers report to rank 0's watcher, which decides.

All times are measured on the watcher's own clock, which stops while the watcher is suspended or starved. So when a job
that was suspended as a whole continues, no rank is blamed.
"""

import json
import mmap
import os
import selectors
import signal
import socket
import struct
import sys
import time
from dataclasses import dataclass, field
from typing import Any

EXIT_RANK_LOST = 3  # a rank died, was stopped or got stuck; the message names it
SETTINGS = "DS_EMBED_WATCHER"  # environment variable
PAGE = struct.Struct("<Qqqdd96s")  # marks passed, step, exit code + 1, both timeouts in seconds, phase
_TICK = 0.5  # seconds between reports
_LONGEST_TICK = 1.0  # most seconds that a tick adds to the clock
_LOST_CONTACT = 5.0  # seconds until a watcher whose connection has closed counts as lost
_LEAVE = 5.0  # seconds for the others to exit by themselves after one exited with an error
_EXIT = 2.0  # seconds for a rank to exit before its watcher kills it
_LINGER = 60.0  # seconds that rank 0's watcher outlives a rank 0 that exited normally


@dataclass
class _Rank:
    """What rank 0's watcher knows about one rank; times are on its own clock."""

    heard_at: float
    report: dict[str, Any] = field(default_factory=dict)
    marks: int = -1
    stopped_at: float | None = None
    left_at: float | None = None
    closed_at: float | None = None

    def hear(self, report: dict[str, Any], now: float) -> bool:
        """Take in a report; return whether the rank has passed a mark since the last one."""
        has_moved = report["marks"] != self.marks
        self.report, self.marks, self.heard_at = report, report["marks"], now
        if report["state"] != "stopped":
            self.stopped_at = None
        elif self.stopped_at is None:
            self.stopped_at = now
        if report["state"] == "left" and self.left_at is None:
            self.left_at = now
        return has_moved


class _Lines:
    """JSON lines over a socket that never blocks the caller."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        self.connection = connection
        self._in, self._out = b"", b""
        self.is_closed = False

    def send(self, value: dict[str, Any]) -> None:
        if not self._out or value.get("end"):  # while one is unsent, newer reports are dropped
            self._out += json.dumps(value).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        try:
            self._out = self._out[self.connection.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self.is_closed = True

    def receive(self) -> list[Any]:
        try:
            while content := self.connection.recv(65536):
                self._in += content
            self.is_closed = True
        except BlockingIOError:
            pass
        except OSError:
            self.is_closed = True
        *lines, self._in = self._in.split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            self.is_closed = True
            return []


class _Watcher:
    """What all watchers do: observe their rank, keep time, end their rank."""

    def __init__(
        self, rank: int, size: int, local_rank: int, token: str, parent: int, page: int, control: int, link: int
    ):
        self.rank, self.size, self.local_rank, self.token, self.parent = rank, size, local_rank, token, parent
        self.page = mmap.mmap(page, PAGE.size, prot=mmap.PROT_READ)
        self.control = socket.socket(fileno=control)
        self.link = socket.socket(fileno=link)
        self.host = socket.gethostname()
        self.clock, self._last = 0.0, time.monotonic()
        self.is_urgent = self.is_over = self.is_complete = False
        self.selector = selectors.DefaultSelector()
        # The system closes it the moment the rank ends, unless a process that the rank forked holds it too.
        self.selector.register(self.control, selectors.EVENT_READ, self._on_control)

    def run(self) -> None:
        """Run until the rank has ended and no other watcher needs to be told."""
        next_tick = 0.0
        while not self.is_over:
            now = time.monotonic()
            self.clock += min(now - self._last, _LONGEST_TICK)
            self._last = now
            # Read before judging: reports that came in while this process waited for a CPU count.
            for key, _ in self.selector.select(0 if self.is_urgent else max(0.0, next_tick - now)):
                key.data()
            if not self.is_over and (time.monotonic() >= next_tick or self.is_urgent):
                next_tick, self.is_urgent = time.monotonic() + _TICK, False
                self.tick(self._look())

    def _on_control(self) -> None:
        self.selector.unregister(self.control)
        self._await_end(1.0)  # the kernel closes its files just before it reparents its children
        self.is_urgent = True

    def _await_end(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self.is_gone and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.is_gone

    def tick(self, own: dict[str, Any]) -> None:
        """Called twice a second with the report on the watcher's own rank, to send it or to judge by it."""
        raise NotImplementedError

    @property
    def is_gone(self) -> bool:
        return os.getppid() != self.parent

    def _look(self) -> dict[str, Any]:
        """The report on the watcher's own rank."""
        marks, step, code, self.rank_timeout, self.stall_timeout, phase = PAGE.unpack_from(self.page)
        state = "left" if code else "gone" if self.is_gone else "stopped" if self._is_stopped() else "working"
        place = {"marks": marks, "step": step, "phase": phase.rstrip(b"\0").decode(errors="replace")}
        me = {"rank": self.rank, "host": self.host, "pid": self.parent, "token": self.token}
        return me | place | {"state": state, "code": code - 1}

    def _is_stopped(self) -> bool:
        try:
            with open(f"/proc/{self.parent}/stat", "rb") as file:
                return file.read().rpartition(b")")[2].split()[0] == b"T"
        except OSError:
            return False

    def tell_rank(self, what: str, code: int) -> None:
        try:
            self.control.sendall(f"{what} {code}\n".encode())
        except OSError:
            pass  # the rank is gone

    def end_rank(self, code: int) -> None:
        """Ask the watcher's own rank to exit, and kill it if it doesn't."""
        self.tell_rank("end", code)
        if not self._await_end(0.0 if self._is_stopped() else _EXIT):
            os.kill(self.parent, signal.SIGKILL)  # our own parent, so the pid can't belong to another process


class _Reporter(_Watcher):
    """The watcher of any rank except 0."""

    def __init__(self, *settings: Any):
        super().__init__(*settings)
        self.heard_at, self.main = 0.0, {"rank": 0}
        self.lines = _Lines(self.link)
        self.selector.register(self.link, selectors.EVENT_READ, self._on_message)

    def _on_message(self) -> None:
        for message in self.lines.receive():
            self.heard_at, self.main = self.clock, message["main"]
            if message["is_complete"] and not self.is_complete:
                self.is_complete = True
                self.tell_rank("watched", 0)
            if message["left"] is not None:
                self.tell_rank("left", message["left"])
            if message["end"] is not None:
                self.end_rank(message["end"])
                self.is_over = True
        if self.lines.is_closed:
            self.selector.unregister(self.link)

    def tick(self, own: dict[str, Any]) -> None:
        self.lines.send(own)
        silent = self.clock - self.heard_at
        if self.is_gone:
            self.is_over = True
        elif own["state"] == "left":
            return
        elif silent > (_LOST_CONTACT if self.lines.is_closed else self.rank_timeout or float("inf")):
            if self.rank == 1 or self.local_rank == 0:  # one message per host
                _say(self.main, f"has not answered for {silent:.0f} s")
            self.end_rank(EXIT_RANK_LOST)
            self.is_over = True


class _Judge(_Watcher):
    """The watcher of rank 0, which receives all reports and decides."""

    def __init__(self, *settings: Any):
        super().__init__(*settings)
        self.ranks = {rank: _Rank(0.0) for rank in range(self.size)}
        self.connections: dict[_Lines, int | None] = {}
        self.moved_at = 0.0
        self.selector.register(self.link, selectors.EVENT_READ, self._on_connection)

    def _on_connection(self) -> None:
        lines = _Lines(self.link.accept()[0])
        self.connections[lines] = None
        self.selector.register(lines.connection, selectors.EVENT_READ, lambda: self._on_report(lines))

    def _on_report(self, lines: _Lines) -> None:
        for report in lines.receive():
            if not isinstance(report, dict) or report.get("token") != self.token:
                lines.is_closed = True
                break
            self.connections[lines] = report["rank"]
            self._hear(report)
        if lines.is_closed:
            self.selector.unregister(lines.connection)
            lines.connection.close()
            rank = self.connections.pop(lines)
            if rank is not None:
                self.ranks[rank].closed_at = self.clock

    def _hear(self, report: dict[str, Any]) -> None:
        if self.ranks[report["rank"]].hear(report, self.clock):
            self.moved_at = self.clock
        if not self.is_complete and all(rank.report for rank in self.ranks.values()):
            self.is_complete = self.is_urgent = True
            self.tell_rank("watched", 0)
        self.is_urgent |= report["state"] in ("gone", "left") and report["rank"] != self.rank

    def tick(self, own: dict[str, Any]) -> None:
        self._hear(own)
        left = [r.report["code"] for r in self.ranks.values() if r.left_at is not None and r.report["code"]]
        verdict = self._verdict()
        code = verdict[0] if verdict else None
        main = {name: value for name, value in own.items() if name != "token"}
        # A rank whose collective fails needs to know whether another rank failed first.
        news = left[0] if left else code
        for lines in self.connections:
            lines.send({"main": main, "is_complete": self.is_complete, "left": news, "end": code})
        if news is not None:
            self.tell_rank("left", news)
        if verdict is not None:
            if verdict[1] is not None:
                _say(*verdict[1])
            self.end_rank(verdict[0])
            self._flush(_LOST_CONTACT)
        elif self.is_gone:  # after announcing it
            others = [r for r in self.ranks.values() if r.left_at is None and r.closed_at is None]
            self.is_over = not others or self.clock - (self.ranks[0].left_at or 0.0) > _LINGER

    def _verdict(self) -> tuple[int, tuple[dict[str, Any], str] | None] | None:
        """The job's exit code and the report and message to print (None: no message), or None while all is well."""
        failed = [r for r in self.ranks.values() if r.left_at is not None and r.report["code"]]
        if failed:  # it has reported the reason itself, and others may too
            is_late = self.clock - min(r.left_at or 0.0 for r in failed) > _LEAVE
            return (failed[0].report["code"], None) if is_late else None
        working = [r for r in self.ranks.values() if r.left_at is None and r.report]
        limit = self.rank_timeout or float("inf")
        if all(rank.stopped_at is not None for rank in working):  # the whole job was suspended on purpose
            for rank in working:
                rank.stopped_at = self.clock
        for rank in working:
            silent, stopped = (self.clock - (since or self.clock) for since in (rank.heard_at, rank.stopped_at))
            if rank.report["state"] == "gone":
                what = "died: killed, out of memory, or crashed"
            elif rank.closed_at is not None and self.clock - rank.closed_at > _LOST_CONTACT:
                what = "can't be reached: its host, or the process that watches it, is gone"
            elif silent > limit:
                what = f"has not answered for {silent:.0f} s"
            elif stopped > limit:
                what = f"has not answered for {stopped:.0f} s: its process is stopped (SIGSTOP)"
            else:
                continue
            return EXIT_RANK_LOST, (rank.report, what)
        stalled = self.clock - self.moved_at
        if working and stalled > (self.stall_timeout or float("inf")):
            behind = min(working, key=lambda rank: rank.marks)
            if behind.marks < max(rank.marks for rank in working):
                what = f"has made no progress for {stalled:.0f} s while others wait for it"
                return EXIT_RANK_LOST, (behind.report, what)
        return None

    def _flush(self, seconds: float) -> None:
        """Wait until the other watchers have gone, so that none misses the verdict."""
        deadline = time.monotonic() + seconds
        while self.connections and time.monotonic() < deadline:
            for key, _ in self.selector.select(0.1):
                key.data()
            for lines in self.connections:
                lines.flush()
        self.is_over = True


def _say(report: dict[str, Any], what: str) -> None:
    """Print the one message of a job that ends because of a rank."""
    rank, place = f"rank {report['rank']}", ""
    if "host" in report:
        rank += f" ({report['host']}, process {report['pid']})"
        step = f"step {report['step']}, " if report["step"] >= 0 else ""
        place = f"; last seen in {step}phase {report['phase']}"
    print(f"\nerror: {rank} {what}{place}; the job is ended", file=sys.stderr, flush=True)


def _main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the rank; the watcher exits when the rank does
    settings = json.loads(os.environ[SETTINGS])
    watcher = _Judge(*settings) if settings[0] == 0 else _Reporter(*settings)
    watcher.run()


if __name__ == "__main__":
    _main()
