"""recipes/generate.py killed as a whole job and started again on other numbers of ranks, with the real launcher.

KILLS=30 kills the job thirty times instead of twice.
"""

import functools
import itertools
import json
import operator
import os
import random
import signal
import time

import pytest
from tiny import check, launch, make_model, sentence, start

from ds_embed.job.ranks import World
from ds_embed.models.cpu import WAY
from ds_embed.settings import EncodeArguments, ModelArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.vectors.generate import generate

KILLS = int(os.environ.get("KILLS", 2))
NUM_DOCS = 2500 * max(KILLS, 2)  # a kill takes about a second of the job's encoding
ZERO3 = ["--deepspeed", "ds_configs/zero3.json"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("restart")
    make_model(root / "llama", "llama")
    rng = random.Random(2)

    def write(name, text_key, id_key, number):
        lines = [json.dumps({text_key: sentence(rng), id_key: f"{text_key}{i}"}) + "\n" for i in range(number)]
        (root / name).write_text("".join(lines))

    write("q.jsonl", "query", "query_id", 30)
    write("d.jsonl", "pos_doc", "doc_id", NUM_DOCS)
    return root


def settings(root, name, **changes):
    return {
        "query_files": [root / "q.jsonl"],
        "doc_files": [root / "d.jsonl"],
        "output_prefix": root / name,
        "cache_dir": root / "cache",
        "micro_batch_tokens": 64,
        "save_seconds": 0.2,
        **changes,
    }


def here(root, name, model="llama", **changes):
    """generate in this process: one rank, whose mistakes are plain exceptions."""
    values = settings(root, name, **changes)
    strings = {key: [str(v) for v in value] if isinstance(value, list) else value for key, value in values.items()}
    world = World.alone()
    return generate(world, ModelArguments(str(root / model)), TextArguments(), EncodeArguments(**strings))


def flags(root, name, **changes):
    values = settings(root, name, **changes)
    listed = [[f"--{key}", *(value if isinstance(value, list) else [value])] for key, value in values.items()]
    return ["--model_name_or_path", root / "llama", *functools.reduce(operator.iadd, listed, [])]


@pytest.fixture(scope="module")
def straight(place):
    return here(place, "straight")


# Float32 is packed on every CPU that oneDNN knows; bfloat16 through float32 is computed alike on every CPU.
WAYS = {"packed": (dict(bf16=False), {}), "through float32": ({}, {WAY: "float32"})}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def runs(group):
    """Whether a process of the group is there that has not ended."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            state, _, its_group = open(f"/proc/{entry}/stat").read().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def saved_rows(path):
    """Rows that whole lines of parts.jsonl tell of: 16,384 a block, and those computed of the block behind it."""
    lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    num_blocks = sum(part["file"] == "doc.npy" and part["start"] > 0 for part in lines)
    ends = [p["start"] + p["num_bytes"] for p in lines if p["name"].startswith(f"{num_blocks}+")]
    return num_blocks, max(ends, default=0)


def kill_while_encoding(root, name, num_ranks, rng, while_it_runs, changes, environment):
    """Start the job, let it save some rows, and kill -9 all of its processes; returns how far it saved."""
    path = root / name / "consumed_samples0" / ".unfinished-test_docs" / "parts.jsonl"
    before = path.read_bytes() if path.exists() else b""
    log = root / f"{name}.log"
    process = start(num_ranks, "recipes/generate.py", *flags(root, name, **changes), log=log, environment=environment)
    deadline = time.monotonic() + 240
    try:
        while not path.exists() or path.read_bytes() == before:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(
                    f"nothing was saved; exit code {process.returncode}\n{log.read_text(errors='replace')[-4000:]}"
                )
            time.sleep(0.01)
        if while_it_runs is not None:
            while_it_runs()
        time.sleep(rng.uniform(0, 0.3))
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        while runs(process.pid):  # the launcher is gone, its ranks may hold their locks for another moment
            time.sleep(0.01)
    assert path.exists(), "the job was quicker than its end"
    return saved_rows(path)


@pytest.mark.parametrize("way", WAYS)
def test_killed_jobs_end_in_the_bytes_of_an_uninterrupted_one(place, way):
    changes, environment = WAYS[way]
    rng = random.Random(os.environ.get("KILLS_SEED", 1))
    name, reference = f"broken {way}", f"straight {way}"

    def run(num_ranks, output, *more):
        return launch(
            num_ranks, "recipes/generate.py", *flags(place, output, **changes), *more, environment=environment
        )

    def second_job():
        with pytest.raises(UserError, match=r"--output_prefix .*broken.*: in use by another job \(process \d+ on "):
            here(place, name, **changes)

    done = []
    for number in range(KILLS):
        meanwhile = None if number else second_job
        done.append(kill_while_encoding(place, name, (2, 0, 4)[number % 3], rng, meanwhile, changes, environment))
    assert all(before < after for before, after in itertools.pairwise(done)), done
    if way == "packed":  # what is there on this CPU alone, whatever it multiplies with
        make_model(place / "other", "llama", seed=1)
        with pytest.raises(UserError, match="base_model was .* and is "):
            here(place, name, model="other", **changes)
        unlike = r"bf16 was False and is True.*Put that back, remove .*\.unfinished-test_docs"
        with pytest.raises(UserError, match=unlike):
            here(place, name, query_files=[], bf16=True)
        # Under ZeRO-3 nothing is packed, and other kernels round otherwise.
        refused = run(2, name, *ZERO3)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert "kernels was cpu, packed linear layers and is cpu, torch's linear layers" in refused.stderr
        assert "--accept_changes kernels goes on with rows that differ by rounding" in refused.stderr
        ended = check(run(4, name))
    else:
        ended = check(run(4, name, *ZERO3))
    assert "going on after" in ended.stderr and "30 query vectors finished already" in ended.stderr
    check(run(0, reference))
    whole, got = (contents(place / output / "consumed_samples0") for output in (reference, name))
    assert set(got) == set(whole)
    assert [name for name in whole if not name.endswith(".lock") and whole[name] != got[name]] == []


def test_finished_output_stays_and_changed_input_is_refused(place, straight, caplog):
    caplog.set_level("INFO")
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*.npy")}
    here(place, "straight")
    assert f"{NUM_DOCS:,} doc vectors finished already, they are in" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*.npy")} == before
    lines = (place / "d.jsonl").read_text().splitlines(keepends=True)
    (place / "changed.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    changes = {
        "doc_files was .* and is ": dict(doc_files=[place / "changed.jsonl"]),
        "micro_batch_tokens was 64 and is 65.*--accept_changes micro_batch_tokens": dict(micro_batch_tokens=65),
    }
    for message, change in changes.items():
        with pytest.raises(ValueError, match=message):
            here(place, "straight", **change)
    here(place, "straight", micro_batch_tokens=65, accept_changes=["micro_batch_tokens"])


def test_shards_through_the_recipe(place):
    """A corpus below one block: one shard has all rows, the others none, and the merge gives the whole."""
    (place / "few.jsonl").write_text("".join((place / "d.jsonl").read_text().splitlines(keepends=True)[:50]))
    few = dict(doc_files=[place / "few.jsonl"])
    whole = here(place, "whole", **few)
    for index in (1, 0):
        here(place, "parts", num_shards=2, shard_index=index, **few)
    embeddings = here(place, "parts", num_shards=2, merge_shards=True, **few)
    for name, content in contents(whole).items():
        assert (embeddings / name).read_bytes() == content or name.endswith(".lock")
    assert (embeddings / "test_doc").is_symlink()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_shards=3), "--num_shards 3: give --shard_index 0 to 2, or --merge_shards true"),
        (dict(num_shards=3, shard_index=3), "--shard_index 3: must be from 0 to 2"),
        (dict(shard_index=0), "--num_shards 1: give the number of shards, 2 or more"),
        (dict(num_shards=2, shard_index=0, merge_shards=True), "--merge_shards true: encodes no shard"),
        (
            dict(accept_changes=["bf16"]),
            "--accept_changes bf16: only micro_batch_tokens, attn_implementation, kernels may",
        ),
        (dict(output_prefix="/proc/nowhere"), "/proc"),
    ],
)
def test_mistakes_are_named(place, changes, message):
    with pytest.raises(UserError, match=message):
        here(place, "mistakes", **changes)
