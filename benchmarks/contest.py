"""Shared code of the benchmarks: contestants that take turns in separate processes, in rounds; medians, goals, tables.

An interrupted call continues with --go_on true, so that a long comparison can be made in pieces.

A contestant is a function that returns a dict of numbers. Rounds go through the contestants alternately forwards and
backwards, so that a machine that becomes slower or faster favours none, and ratios are taken within a round.
"""

import hashlib
import importlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
_KIB_PER_GIB = 2**20


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        shown = [f"{v:,.0f}" if self.median >= 100 else f"{v:.3g}" for v in (self.median, self.low, self.high)]
        return f"{shown[0]} ({shown[1]}–{shown[2]})" if self.low < self.high else shown[0]


@dataclass(frozen=True)
class Goal:
    """The measurements of a figure, and its bound."""

    what: str
    measured: Spread
    bound: float
    at_least: bool = True

    @property
    def is_met(self) -> bool:
        return self.measured.median >= self.bound if self.at_least else self.measured.median <= self.bound

    def cells(self) -> list[str]:
        return [self.what, str(self.measured), f"{'>=' if self.at_least else '<='} {self.bound:g}", self._verdict()]

    def _verdict(self) -> str:
        return "met" if self.is_met else "missed"


@dataclass(frozen=True)
class Finished:
    """A process that exited without an error. peak_gib: peak memory of the largest process in its tree."""

    output: str
    seconds: float
    peak_gib: float


def run_process(words: list[object], threads: int) -> Finished:
    """Run a command in the repository and wait for it; SystemExit with its output if it fails."""
    command = [str(word) for word in words]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=said, text=True
        )
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{output[-3000:]}\n{said.read()[-6000:]}")
    return Finished(output, seconds, usage.ru_maxrss / _KIB_PER_GIB)


def launched(ranks: int, script: str | Path, *flags: object) -> Finished:
    """Run a script of the repository as users do, with the deepspeed launcher; the ranks share the cores."""
    return run_process([*launcher(ranks), REPOSITORY / script, *flags], threads=max(1, CORES // ranks))


def launcher(ranks: int) -> list[object]:
    """The command line that starts a script on `ranks` ranks, without disturbing other jobs on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", port]


def flags(**values: object) -> list[object]:
    """The values as words of a command line: --name value."""
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def in_process(function: str, python: str = sys.executable, **arguments: Any) -> dict:
    """Run `module:function(**arguments)` of this folder in a new process with all cores; its result and peak_gib."""
    finished = run_process([python, __file__, function, json.dumps(arguments, default=str)], threads=CORES)
    return {"peak_gib": finished.peak_gib} | json.loads(finished.output.splitlines()[-1])


def play(
    contestants: dict[str, Callable[[int], dict]], rounds: int, notebook: Path | None = None
) -> dict[str, list[dict]]:
    """Run each contestant in each round, with the round's number as its argument, and return their measurements.

    notebook: a JSONL file to which each measurement is written at once. Those already in it are not repeated.
    """
    results: dict[str, list[dict]] = {name: [] for name in contestants}
    held = notebook.read_text().splitlines() if notebook and notebook.exists() else []
    known = {(line["round"], line["contestant"]): line["measured"] for line in map(json.loads, held)}
    for number in range(rounds):
        names = list(contestants)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            started = time.perf_counter()
            measured = known.get((number, name)) or contestants[name](number)
            results[name].append(measured)
            if notebook and (number, name) not in known:
                with open(notebook, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"round": number, "contestant": name, "measured": measured}) + "\n")
            print(f"round {number + 1}: {name}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return results


_NOT_OF_A_MEASUREMENT = ("go_on", "rounds", "contestants", "goal", "marks")


def notebook_of(settings: Any, folder: Path) -> Path:
    """The notebook of `play` for these settings; emptied unless --go_on true keeps earlier measurements."""
    told = {name: value for name, value in vars(settings).items() if name not in _NOT_OF_A_MEASUREMENT}
    name = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]
    notebook = folder / f"rounds-{name}.jsonl"
    if not settings.go_on:
        notebook.unlink(missing_ok=True)
    return notebook


def spread(results: dict[str, list[dict]], name: str, key: str) -> Spread:
    return Spread.of([measured[key] for measured in results[name]])


def ratio(results: dict[str, list[dict]], name: str, other: str, key: str = "tokens_per_second") -> Spread:
    """The ratio of `name` to `other` in each round."""
    return Spread.of([mine[key] / theirs[key] for mine, theirs in zip(results[name], results[other])])


def goals(
    results: dict[str, list[dict]], wanted: list[tuple[str, str, str, float, bool]], key: str = "tokens_per_second"
) -> list[Goal]:
    """A goal for each (what, name, other, bound, at_least) whose contestants took part."""
    return [
        Goal(what, ratio(results, name, other, key), bound, at_least)
        for what, name, other, bound, at_least in wanted
        if name in results and other in results
    ]


def print_table(header: list[str], rows: list[list[object]]) -> None:
    """Print a Markdown table."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def print_goals(reached: list[Goal]) -> None:
    if reached:
        print_table(["figure", "measured", "goal", ""], [goal.cells() for goal in reached])


def write_results(path: str | Path, settings: Any, results: Any, reached: list[Goal] | None = None) -> None:
    """Write settings, all measurements and the goals as JSON."""
    if reached is None:
        reached = []
    content = {
        "settings": vars(settings),
        "cores": CORES,
        "results": results,
        "goals": [
            {"figure": g.what, **vars(g.measured), "bound": g.bound, "at_least": g.at_least, "met": g.is_met}
            for g in reached
        ],
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    print("\n" + json.dumps(getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))))
