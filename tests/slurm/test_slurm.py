"""The job scripts on a real Slurm: two nodes, preempted, signalled, a node lost, and jobs that cannot work."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from cluster import Cluster
from tiny import REPOSITORY, launch_environment, make_model, make_training_file, sentence

from ds_embed.vectors.corpus_plan import BLOCK_TEXTS

STEPS = 40
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


class Job:
    """A submitted job and its log."""

    def __init__(self, cluster: Cluster, place, name: str, *words, environment=None):
        self.cluster, self.log = cluster, place / f"{name}.log"
        variables = launch_environment() | cluster.environment | {"DS_EMBED_ENV": str(place / "env.sh")}
        variables |= environment or {}
        # Signals reach a job sooner than a user would see its first step: no need to hold it for long.
        done = subprocess.run(
            ["sbatch", "--parsable", "--output", str(self.log), "--job-name", name, *map(str, words)],
            cwd=REPOSITORY,
            env=variables,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    def state(self) -> str:
        return self.cluster.ask("squeue", "-h", "-j", self.id, "-t", "all", "-o", "%T").strip()

    def wait(self, is_reached, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not is_reached():
            if time.monotonic() > deadline:
                job = self.cluster.ask("scontrol", "show", "job", self.id)
                pytest.fail(f"job {self.id} is {self.state()}: {job}\n{self.output()[-3000:]}")
            time.sleep(0.1)

    def wait_for_end(self, seconds: float = 600) -> str:
        self.wait(lambda: self.state() in ENDED, seconds)
        return self.state()

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for_restart(self, number: int) -> None:
        """Wait for start `number`, without most of the pause that Slurm puts between two starts of a job."""
        pending_since = None

        def is_started() -> bool:
            nonlocal pending_since
            if self.state() != "PENDING":
                pending_since = None
            elif pending_since is None:
                pending_since = time.monotonic()
            elif (
                time.monotonic() > pending_since + 2
            ):  # within a second of the end nodes take the new start for the old
                self.cluster.ask("scontrol", "update", f"jobid={self.id}", "starttime=now")
            return f", start {number}\n" in self.output()

        self.wait(is_started, 60)


@pytest.fixture(scope="module")
def place(tmp_path_factory, cluster):
    root = tmp_path_factory.mktemp("jobs")
    make_model(root / "llama", "llama")
    make_training_file(root / "train.jsonl", 200, num_negatives=1)
    settings = {
        "DS_EMBED_PYTHON": sys.executable,
        "DS_EMBED_MAX_REQUEUES": 5,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": 1,
        "PYTHONPATH": REPOSITORY,
    }
    (root / "env.sh").write_text("".join(f"export {name}={value}\n" for name, value in settings.items()))
    return root


def train_flags(place, name):
    return [
        "recipes/train_gpt.py",
        "--deepspeed",
        "ds_configs/zero2.json",
        "--model_name_or_path",
        place / "llama",
        "--train_files",
        place / "train.jsonl",
        "--output_dir",
        place / name,
        "--cache_dir",
        place / "cache",
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
        "--report_to",
        "none",
        "--bf16",
        "false",
        "--save_interval",
        1,
    ]


def trace(run) -> list[tuple[int, int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["consumed_samples"], line["loss"]) for line in lines]


def last_step(run) -> int:
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (FileNotFoundError, IndexError, ValueError):
        return 0


def test_interrupted_job_gives_the_losses_of_an_uninterrupted_one(cluster, place):
    whole = Job(
        cluster, place, "whole", "--nodes=2", "--gpus-per-node=2", "slurm/train.sh", *train_flags(place, "whole")
    )
    assert whole.wait_for_end() == "COMPLETED", whole.output()
    assert re.search(r"2 node\(s\) \(node\[1-2\]\) x 2 rank\(s\), node1:\d+, start 1\n", whole.output())
    assert "4 rank(s)" in whole.output()
    assert [line[0] for line in trace(place / "whole")] == list(range(1, STEPS + 1))

    run = place / "torn"
    torn = Job(cluster, place, "torn", "--nodes=2", "--gpus-per-node=1", "slurm/train.sh", *train_flags(place, "torn"))

    # A signal before srun has started the ranks, or while they load: there is nothing to save, and nothing lost.
    torn.wait(lambda: ", start 1\n" in torn.output())
    cluster.ask("scancel", "--batch", "--signal=USR1", torn.id)
    torn.wait_for_restart(2)
    assert last_step(run) == 0

    # Another job with more right to the nodes.
    torn.wait(lambda: last_step(run) >= 4)
    urgent = Job(cluster, place, "urgent", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 1")
    assert urgent.wait_for_end() == "COMPLETED"
    torn.wait_for_restart(3)
    seen = last_step(run)
    assert 4 <= seen < STEPS

    # Its time is nearly up.
    torn.wait(lambda: last_step(run) >= seen + 4)
    cluster.ask("scancel", "--batch", "--signal=USR1", torn.id)
    torn.wait_for_restart(4)
    seen = last_step(run)
    assert seen < STEPS

    # A node goes down with all that runs on it.
    torn.wait(lambda: last_step(run) >= seen + 4)
    daemon = cluster.running.pop("node2")
    for pid in ranks_on("node2"):
        os.kill(pid, signal.SIGKILL)
    os.killpg(daemon.pid, signal.SIGKILL)
    daemon.wait()
    cluster.ask("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    torn.wait(lambda: torn.state() != "RUNNING")
    assert last_step(run) < STEPS
    cluster.start_node("node2")
    cluster.ask("scontrol", "update", "nodename=node2", "state=resume")
    torn.wait_for_restart(5)

    assert torn.wait_for_end() == "COMPLETED", torn.output()
    steps, samples, losses = zip(*trace(run))
    whole_steps, whole_samples, whole_losses = zip(*trace(place / "whole"))
    assert (steps, samples) == (whole_steps, whole_samples)
    assert losses == pytest.approx(whole_losses, rel=1e-4)  # 4 ranks and 2: sums in another order, 40 times over
    starts = re.findall(r", start (\d)", torn.output())
    assert starts == ["1", "2", "3", "4", "5"]
    assert torn.output().count("resuming from") == 3


def ranks_on(node: str) -> list[int]:
    """Process ids of recipes that run on a node: it has a host name of its own."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = open(f"/proc/{entry}/environ").read().split("\0")
            program = os.readlink(f"/proc/{entry}/exe")
        except (OSError, UnicodeDecodeError):
            continue
        if f"SLURMD_NODENAME={node}" in words and "python" in program:
            found.append(int(entry))
    return found


def test_jobs_that_cannot_work_say_why_at_once(cluster, place):
    flags = train_flags(place, "bad")
    no_config = [*flags[:2], "ds_configs/zero9.json", *flags[3:]]
    no_data = [place / "absent.jsonl" if word == place / "train.jsonl" else word for word in flags]
    one_node = ["--nodes=2", "--gpus-per-node=1"]
    jobs = {
        "recipe recipes/train_gtp.py: no such file": Job(
            cluster, place, "no-recipe", *one_node, "slurm/train.sh", "recipes/train_gtp.py", *flags[1:]
        ),
        "nothing to run: give a recipe": Job(cluster, place, "no-words", *one_node, "slurm/train.sh"),
        "--ntasks-per-node=3 with --gpus-per-node=2: each rank uses one GPU": Job(
            cluster, place, "tasks", "--nodes=1", "--gpus-per-node=2", "--ntasks-per-node=3", "slurm/train.sh", *flags
        ),
        "DS_EMBED_PYTHON=/no/python: no such program on node node": Job(
            cluster,
            place,
            "no-python",
            *one_node,
            "slurm/train.sh",
            *flags,
            environment={"DS_EMBED_ENV": str(no_python(place))},
        ),
        "is not the checkout of ds_embed": Job(
            cluster, place, "elsewhere", *one_node, "slurm/train.sh", *flags, environment={"DS_EMBED_HOME": str(place)}
        ),
        "error: --deepspeed ds_configs/zero9.json: no such file": Job(
            cluster, place, "no-config", *one_node, "slurm/train.sh", *no_config
        ),
        "absent.jsonl: no such file": Job(cluster, place, "no-data", *one_node, "slurm/train.sh", *no_data),
    }
    for reason, job in jobs.items():
        assert job.wait_for_end() == "FAILED", (reason, job.output())
        assert reason in job.output()
        assert job.output().count(reason) <= 2, job.output()  # once, or once a node
        assert "back into the queue" not in job.output()
        assert "Traceback" not in job.output()


def no_python(place):
    path = place / "no_python.sh"
    path.write_text("export DS_EMBED_PYTHON=/no/python DS_EMBED_MAX_REQUEUES=1\n")
    return path


def test_an_array_of_shards_and_its_merge_give_the_files_of_one_job(cluster, place):
    """Enough documents for two blocks of rows, which are what the shards divide among them."""
    words = random.Random(0)
    docs = [json.dumps({"pos_doc": sentence(words, 2, 9), "doc_id": f"d{i}"}) for i in range(BLOCK_TEXTS + 3000)]
    (place / "docs.jsonl").write_text("\n".join(docs) + "\n")
    queries = [json.dumps({"query": sentence(words), "query_id": f"q{i}"}) for i in range(9)]
    (place / "queries.jsonl").write_text("\n".join(queries) + "\n")

    def submit(name, *words, prefix):
        return Job(
            cluster,
            place,
            name,
            "--nodes=1",
            *words,
            "slurm/generate.sh",
            "--model_name_or_path",
            place / "llama",
            "--query_files",
            place / "queries.jsonl",
            "--doc_files",
            place / "docs.jsonl",
            "--max_length",
            24,
            "--cache_dir",
            place / "cache",
            "--bf16",
            "false",
            "--output_prefix",
            place / prefix,
            *(["--num_shards", 2, "--merge_shards", "true"] if "merge" in name else []),
        )

    shards = submit("shards", "--gpus-per-node=1", "--array=3-4", prefix="parts")
    after = [f"--dependency=afterok:{shards.id}", "--kill-on-invalid-dep=yes"]
    merge = submit("merge", "--gpus-per-node=0", *after, prefix="parts")
    one = submit("one", "--gpus-per-node=2", prefix="one")
    assert merge.wait_for_end() == "COMPLETED", shards.output() + merge.output()
    assert one.wait_for_end() == "COMPLETED", one.output()
    for index in range(2):
        part = place / "parts" / "consumed_samples0" / "shards" / f"{index:05d}_of_00002" / "test_docs" / "doc.npy"
        assert part.stat().st_size > 1000 * 32 * 4
    assert shards.output().count("x 1 rank(s)") == 2 and "x 2 rank(s)" in one.output()
    for name in ("test_queries/query", "test_docs/doc"):
        parts, whole = (place / prefix / "consumed_samples0" / name for prefix in ("parts", "one"))
        assert parts.with_suffix(".ids").read_text() == whole.with_suffix(".ids").read_text() != ""
        for file in (".ids", ".npy"):
            assert parts.with_suffix(file).read_bytes() == whole.with_suffix(file).read_bytes()
