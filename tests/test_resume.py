"""Runs that are killed, signalled, damaged and started again, with the real launcher.

KILLS=30 ends the run thirty times instead of twice: rank 0 killed, rank 1 stopped, the whole job killed, in turn.
"""

import json
import os
import random
import re
import signal
import time
from collections import Counter

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import check, launch, make_model, make_training_file, start

from ds_embed.job.ranks import EXIT_REQUEUE
from ds_embed.models.checkpoint import list_checkpoints
from ds_embed.settings.errors import UserError
from ds_embed.training.run_folder import RunFolder

KILLS = int(os.environ.get("KILLS", 2))
STEPS = 20 if KILLS <= 2 else 4 * KILLS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    make_model(root / "llama", "llama", attention_dropout=0.1)
    make_training_file(root / "train.jsonl", 100, num_negatives=1)
    return root


def flags(root, name, *extra):
    return [
        "--deepspeed",
        "ds_configs/zero2.json",
        "--model_name_or_path",
        root / "llama",
        "--train_files",
        root / "train.jsonl",
        "--output_dir",
        root / name,
        "--cache_dir",
        root / "cache",
        "--max_length",
        24,
        "--global_batch_size",
        8,
        "--hard_negatives",
        1,
        "--micro_batch_tokens",
        200,
        "--max_steps",
        STEPS,
        "--learning_rate",
        "5e-3",
        "--lora_dropout",
        0.1,
        "--report_to",
        "none",
        "--save_interval",
        1,
        "--save_total_limit",
        2,
        "--rank_timeout_seconds",
        2,
        *extra,
    ]


def train(root, name, *extra, num_ranks=2):
    return launch(num_ranks, "recipes/train_gpt.py", *flags(root, name, *extra))


class Job:
    """A 2-rank run in a process group of its own, to be killed or signalled while it runs."""

    def __init__(self, root, name, *extra):
        self.log, self.run = root / f"{name}.log", root / name
        self.log.write_text("")
        self.process = start(2, "recipes/train_gpt.py", *flags(root, name, *extra), log=self.log)

    def wait_until(self, condition, what):
        deadline = time.monotonic() + 240
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"no {what}; exit code {self.process.returncode}\n{self.output()[-4000:]}")
            time.sleep(0.02)

    def wait_for_step(self, step):
        self.wait_until(lambda: last_step(self.run) >= step, f"step {step}")

    def wait_for(self, words):
        self.wait_until(lambda: words in self.output(), words)

    def ranks(self):
        """Process ids of the ranks, in their order: the launcher's own process starts one for the node, and that the ranks."""
        try:
            (of_node,) = psutil.Process(self.process.pid).children()
            return sorted(rank.pid for rank in of_node.children())
        except (ValueError, psutil.NoSuchProcess):
            return []

    def end(self):
        try:
            return self.process.wait(timeout=600)
        finally:
            self.kill()

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def output(self):
        return self.log.read_text(errors="replace")  # it may end within a character


def last_step(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def losses(run):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, open(run / "metrics.jsonl"))]


@pytest.fixture(scope="module")
def straight(place):
    check(train(place, "straight"))
    return place / "straight"


def test_killed_signalled_and_resumed_run_is_bit_equal(place, straight):
    rng = random.Random(os.environ.get("KILLS_SEED", 1))
    run, instants, start_seconds = place / "broken", Counter(), 5.0
    for number in range(KILLS):
        job = Job(place, "broken")
        before = last_step(run)
        job.wait_until(lambda: len(job.ranks()) == 2, "ranks")
        rank, sign = [(0, signal.SIGKILL), (1, signal.SIGSTOP), (None, signal.SIGKILL)][number % 3]
        if number % 5 == 4:  # while it starts: joining, reading the data, loading, restoring
            sign = signal.SIGKILL  # a rank that is stopped before it has joined is waited for
            time.sleep(rng.uniform(0, start_seconds))
        else:  # while it trains: one save follows each step
            started = time.monotonic()
            job.wait_for_step(min(before + 1, STEPS - 8))
            start_seconds = time.monotonic() - started
            time.sleep(rng.uniform(0, 0.5))
        instants[end_suddenly(job, run, rank, sign)] += 1
        print("ended:", dict(instants), flush=True)

    job = Job(place, "broken")
    job.wait_for_step(min(last_step(run) + 1, STEPS - 4))
    with pytest.raises(UserError, match="in use by another job"):  # in this process: a second job starts too slowly
        RunFolder(str(run)).claim(True)
    while job.process.poll() is None and not list((run / "checkpoints").glob(".unfinished-*")):
        time.sleep(0.001)
    if job.process.poll() is None:  # a quick machine may have finished meanwhile
        os.kill(job.ranks()[1], signal.SIGUSR1)  # in the middle of a save
    code = job.end()
    if code != 0:
        assert code == EXIT_REQUEUE, job.output()[-4000:]
        assert "SIGUSR1: stopped after step" in job.output()
    check(train(place, "broken"))

    assert losses(run) == losses(straight)
    expected, got = (load_file(path / "model" / "adapter_model.safetensors") for path in (straight, run))
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert [step for step, _ in list_checkpoints(run / "checkpoints")] == [STEPS, STEPS - 1]
    assert len(list((run / "checkpoints").iterdir())) == 2


def end_suddenly(job, run, rank, sign):
    """Kill the job, or kill or stop one rank and see the job end by itself with its name; returns when that was."""
    process = dict(enumerate(job.ranks())).get(rank)
    if process is not None:
        os.kill(process, sign)
    saving = list((run / "checkpoints").glob(".unfinished-*"))
    # The job before it may have left a half-written checkpoint, which is removed before the first step.
    when = "while starting" if "training:" not in job.output() else "in a save" if saving else "in a step or between"
    if process is None:
        job.kill()
        return when
    code, output = job.end(), job.output()
    what = "died" if sign == signal.SIGKILL else r"has not answered for \d+ s: its process is stopped"
    message = rf"error: rank {rank} \(\S+, process {process}\) {what}.*; last seen in .*; the job is ended"
    # Before the ranks have joined, the launcher ends the job.
    assert code != 0 and (re.search(message, output) or when == "while starting"), output[-4000:]
    assert "Traceback" not in output, output[-4000:]
    return when


def test_signal_saves_and_asks_to_be_started_again(place):
    job = Job(place, "signalled", "--save_interval", "0", "--max_steps", "5000")
    job.wait_for_step(2)
    os.kill(job.ranks()[0], signal.SIGINT)
    assert job.end() == EXIT_REQUEUE, job.output()[-4000:]
    assert "Ctrl-C: the run stops after this step" in job.output() and "SIGINT: stopped after step" in job.output()
    step = last_step(place / "signalled")
    assert [path.name for path in (place / "signalled" / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    # A signal while the run is being restored, to one rank: nothing is lost, and all ranks agree on the code.
    job = Job(place, "signalled", "--max_steps", step + 1)
    job.wait_for("resuming from")
    os.kill(job.ranks()[1], signal.SIGTERM)
    assert job.end() == EXIT_REQUEUE, job.output()[-4000:]
    assert "SIGTERM: stopped" in job.output() and "Traceback" not in job.output(), job.output()[-4000:]
    assert last_step(place / "signalled") == step
    # One more step with other ranks: one line a step, and the samples go on.
    check(train(place, "signalled", "--max_steps", step + 1, num_ranks=0))
    lines = [json.loads(line) for line in open(place / "signalled" / "metrics.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, step + 2))
    assert lines[-1]["consumed_samples"] == 8 * (step + 1)


def test_finished_run_says_so_and_a_changed_one_is_refused(place, straight):
    again = check(train(place, "straight", num_ranks=0))
    assert f"already finished at step {STEPS}" in again.stderr
    assert losses(straight)[-1][0] == STEPS
    other = make_training_file(place / "other.jsonl", 100, num_negatives=1, seed=5)
    changed = [other if word == place / "train.jsonl" else word for word in flags(place, "straight")]
    other = launch(0, "recipes/train_gpt.py", *changed)
    assert other.returncode == 2
    assert "train_files was" in other.stderr and "--accept_changes train_files" in other.stderr


def test_losses_that_are_not_finite_are_skipped_and_counted(place):
    wild = ["--learning_rate", "1e30", "--bf16", "false", "--max_skipped_steps", 2]  # all weights are nan after step 1
    result = train(place, "wild", *wild, num_ranks=0)
    assert result.returncode == 2
    assert "step 2: the loss is nan" in result.stderr and "skipped, 2 of --max_skipped_steps 2" in result.stderr
    error = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "error: step 4: the loss is nan; samples 24 to 31, the first ones from" in error[0]
    lines = [json.loads(line) for line in open(place / "wild" / "metrics.jsonl")]
    assert [(line["step"], line["loss"], line.get("skipped_steps")) for line in lines[1:]] == [
        (2, None, 1),
        (3, None, 2),
    ]
    # The count goes on with the run: none is left.
    again = train(place, "wild", *wild, num_ranks=0)
    assert again.returncode == 2 and "resuming from" in again.stderr and "error: step 4" in again.stderr
