"""Ranks that die, stop or get stuck: real processes with real watchers, killed and stopped by signals.

All jobs run at the same time, so that waiting costs once.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from tiny import REPOSITORY, free_port, leave_out_when_fast

from ds_embed.job.ranks import EXIT_REQUEUE
from ds_embed.job.watcher import EXIT_RANK_LOST

TIMEOUT, LONG = 2.0, 1000.0


class Job:
    """Ranks of tests/workers/watched.py."""

    def __init__(self, folder, size=2, rank_timeout=TIMEOUT, stall_timeout=LONG):
        folder.mkdir()
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "tests/workers/watched.py", folder, str(rank_timeout), str(stall_timeout)],
                env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"},
                cwd=REPOSITORY,
                text=True,
                start_new_session=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(size)
        ]

    def wait_until_ready(self):
        for rank in self.ranks:
            assert rank.stdout.readline() == f"ready {rank.pid}\n", rank.stderr.read()

    def tell(self, *commands):
        for rank, command in zip(self.ranks, commands):
            rank.stdin.write(command + "\n")
            rank.stdin.flush()

    def end(self):
        """Exit codes and the error lines of all ranks; every process that they started has ended as well."""
        codes = [rank.wait(timeout=600) for rank in self.ranks]
        lines = [line for rank in self.ranks for line in rank.stderr.read().splitlines() if line]
        return codes, lines


def message(job, rank, what):
    who = rf"rank {rank} \(\S+, process {job.ranks[rank].pid}\)"
    place = r"(step 7, phase work|phase start)"  # the last report may be half a second old
    return rf"error: {who} {what}; last seen in {place}; the job is ended"


@pytest.fixture(scope="module", autouse=True)
def not_when_fast():
    leave_out_when_fast()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All jobs after their accident, none waited for."""
    root = tmp_path_factory.mktemp("watch")
    jobs = {
        "killed": Job(root / "killed", size=3),
        "killed_main": Job(root / "killed_main"),
        "stopped": Job(root / "stopped"),
        "stopped_main": Job(root / "stopped_main"),
        "stuck": Job(root / "stuck", stall_timeout=TIMEOUT),
        "failed": Job(root / "failed"),
        "lost": Job(root / "lost", rank_timeout=LONG),
        "lost_main": Job(root / "lost_main", rank_timeout=LONG),
        "silent": Job(root / "silent"),
        "busy": Job(root / "busy", rank_timeout=3),
        "suspended": Job(root / "suspended", rank_timeout=3, stall_timeout=3),
        "suspended_ranks": Job(root / "suspended_ranks", rank_timeout=3),
        "waiting": Job(root / "waiting", rank_timeout=3, stall_timeout=1),
    }
    for job in jobs.values():
        job.wait_until_ready()
    watchers = {name: [watcher_of(rank.pid) for rank in job.ranks] for name, job in jobs.items()}
    jobs["killed"].ranks[1].kill()
    jobs["killed_main"].ranks[0].kill()
    jobs["stopped"].ranks[1].send_signal(signal.SIGSTOP)
    jobs["stopped_main"].ranks[0].send_signal(signal.SIGSTOP)
    jobs["stuck"].tell("wait", "think")
    jobs["failed"].tell("wait", "leave 1")
    for name, rank in (("lost", 1), ("lost_main", 0)):
        os.killpg(jobs[name].ranks[rank].pid, signal.SIGKILL)  # the watcher too, as when a host goes down
    os.kill(watchers["silent"][1], signal.SIGSTOP)  # as when a host hangs
    jobs["busy"].tell("hold 6", "wait")
    for job in (jobs["suspended"], jobs["suspended_ranks"]):
        job.tell("wait", "wait")
        for rank in job.ranks:
            stop = os.killpg if job is jobs["suspended"] else os.kill
            stop(rank.pid, signal.SIGSTOP)
    jobs["waiting"].tell("wait", "wait")
    yield jobs, watchers, time.monotonic()
    for job in jobs.values():
        for rank in job.ranks:
            try:
                os.killpg(rank.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            rank.wait()
            for pipe in (rank.stdin, rank.stdout, rank.stderr):
                pipe.close()


def watcher_of(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        (watcher,) = file.read().split()
    return int(watcher)


@pytest.mark.parametrize(
    "name, rank, what, codes",
    [
        ("killed", 1, "died: killed, out of memory, or crashed", [EXIT_RANK_LOST, -9, EXIT_RANK_LOST]),
        ("killed_main", 0, "died: killed, out of memory, or crashed", [-9, EXIT_RANK_LOST]),
        ("stopped", 1, r"has not answered for \d+ s: its process is stopped \(SIGSTOP\)", [EXIT_RANK_LOST, -9]),
        ("stopped_main", 0, r"has not answered for \d+ s: its process is stopped \(SIGSTOP\)", [-9, EXIT_RANK_LOST]),
        ("stuck", 1, r"has made no progress for \d+ s while others wait for it", [EXIT_RANK_LOST] * 2),
        ("lost", 1, "can't be reached: its host, or the process that watches it, is gone", [EXIT_RANK_LOST, -9]),
        ("lost_main", 0, r"has not answered for \d+ s", [-9, EXIT_RANK_LOST]),
    ],
)
def test_lost_rank_ends_the_job_with_its_name(jobs, name, rank, what, codes):
    job = jobs[0][name]
    got, lines = job.end()
    assert len(lines) == 1 and re.fullmatch(message(job, rank, what), lines[0]), lines
    assert got == codes


def test_silent_host_ends_the_job(jobs):
    """Its own watcher can't end it; here the test does, on a cluster its scheduler."""
    job, watchers = jobs[0]["silent"], jobs[1]["silent"]
    assert job.ranks[0].wait(timeout=600) == EXIT_RANK_LOST
    os.kill(watchers[1], signal.SIGCONT)  # it finds the verdict
    codes, lines = job.end()
    assert codes == [EXIT_RANK_LOST] * 2
    assert len(lines) == 1 and re.fullmatch(message(job, 1, r"has not answered for \d+ s"), lines[0]), lines


def test_rank_that_left_with_an_error_takes_the_others_along(jobs):
    codes, lines = jobs[0]["failed"].end()
    assert (codes, lines) == ([1, 1], [])  # it has said itself why


def start_ranks(code, port):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]


def wait_for_an_empty_line(ranks):
    for rank in ranks:
        while (line := rank.stdout.readline()) != "\n":  # libraries say something first
            assert line, rank.stderr.read()


def test_second_job_on_the_port_of_a_running_one_leaves_it_alone():
    """Its rank 1 would find the first job's store, and be that job's rank 1 until it ends."""
    code = (
        "from ds_embed.job.ranks import initialize, run_recipe\n"
        "def main():\n    world = initialize()\n    print(flush=True)\n    input()\n    world.barrier()\n"
        "raise SystemExit(run_recipe(main))"
    )
    port = free_port()
    first = start_ranks(code, port)
    wait_for_an_empty_line(first)
    for rank in start_ranks(code, port):
        assert f"error: MASTER_PORT {port} is in use on this machine" in rank.communicate(timeout=600)[1]
        assert rank.returncode == 2
    time.sleep(6.5)  # a rank whose watcher has gone is given up after 5 seconds
    for rank in first:
        rank.stdin.write("\n")
        rank.stdin.flush()
    ends = [rank.communicate(timeout=60)[1] for rank in first]
    assert [rank.returncode for rank in first] == [0, 0], ends


@pytest.mark.parametrize("has_failed", [True, False])
def test_launcher_that_ends_the_others_does_not_hide_the_failure(has_failed):
    """As srun does with --kill-on-bad-exit, a moment before the others hear of it; else a stop is a stop."""
    code = (
        "import time\nfrom ds_embed.job.ranks import initialize, run_recipe\n"
        "from ds_embed.settings.errors import UserError\n"
        "def main():\n    rank = initialize().rank\n    print(flush=True)\n"
        f"    if rank == 1 and {has_failed}:\n        raise UserError('no such file')\n    time.sleep(600)\n"
        "raise SystemExit(run_recipe(main))"
    )
    ranks = start_ranks(code, free_port())
    wait_for_an_empty_line(ranks)
    if has_failed:
        ranks[1].wait(timeout=600)
    for rank in ranks[:1] if has_failed else ranks:
        rank.send_signal(signal.SIGTERM)
    said = "".join(rank.communicate(timeout=600)[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [2 if has_failed else EXIT_REQUEUE] * 2, said
    reason = "error: no such file" if has_failed else f"SIGTERM: stopped (exit code {EXIT_REQUEUE})"
    assert said.count(reason) == 1 and said.count("stopped") == (not has_failed), said


def test_nobody_is_accused(jobs):
    """A rank in a long call that keeps the interpreter; a job stopped as a whole; one whose ranks all wait."""
    time.sleep(max(0.0, jobs[2] + 4.1 - time.monotonic()))
    for number in range(2):
        for name, resume in (("suspended", os.killpg), ("suspended_ranks", os.kill)):
            resume(jobs[0][name].ranks[number].pid, signal.SIGCONT)
        time.sleep(1)  # one rank later than the other
    time.sleep(2.5)  # longer than the timeout of a rank, and so were they stopped
    for name in ("busy", "suspended", "suspended_ranks", "waiting"):
        job = jobs[0][name]
        assert [rank.poll() for rank in job.ranks] == [None, None], name
        job.tell("end", "end")
        assert job.end() == ([0, 0], []), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_signal_before_the_first_step_is_not_swallowed(ranks):
    """Nor, where a launcher ends the other ranks of one that failed, taken for a wish to go on later."""
    code = (
        "import time\nfrom ds_embed.job.ranks import run_recipe\n"
        "def main():\n    print(flush=True)\n    while True:\n"
        "        try:\n            time.sleep(0.01)\n        except:\n            pass\n"  # as libraries do
        "raise SystemExit(run_recipe(main))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"WORLD_SIZE": str(ranks)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "\n"
    process.send_signal(signal.SIGUSR1)
    said = f"SIGUSR1: stopped (exit code {EXIT_REQUEUE})\n" if ranks == 1 else ""
    assert process.communicate(timeout=600) == ("", said)
    assert process.returncode == (EXIT_REQUEUE if ranks == 1 else -signal.SIGUSR1)


def test_no_watcher_stays(jobs):
    watchers = [watcher for job in jobs[1].values() for watcher in job]
    deadline = time.monotonic() + 20
    while (left := [w for w in watchers if is_running(w)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
