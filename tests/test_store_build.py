"""Building token stores: killed, at once, without room, flat in memory."""

import contextlib
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc

import psutil
import pytest
from store_material import DOCUMENT, RECORDS, build, contents, make_tokenizer, small_chunks, tokenizer, write_jsonl  # noqa: F401
from tiny import leave_out_when_fast

from ds_embed.artifact import durable, shared
from ds_embed.artifact.durable import hold_lock
from ds_embed.data import store_writer
from ds_embed.data.store import TrainingStore, build_text_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.settings.errors import UserError

CHILD = """
import json, logging, os, signal, sys, time, types
import tokenizers
from ds_embed.data import store_writer
from ds_embed.data.store import build_training_store
from ds_embed.data.tokenize import TextFormat

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
store_writer._CHUNK_TEXTS = 4
backend = tokenizers.Tokenizer.from_file(sys.argv[1])
tokenizer = types.SimpleNamespace(backend_tokenizer=backend, eos_token_id=0)
if sys.argv[4] == "orphan":
    store_writer._WORKERS_FROM_TEXTS, os.environ["RAYON_NUM_THREADS"] = 0, "2"
def orphan(_):
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        print("children", file.read(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
deeds = {"orphan": orphan, "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL), "linger": lambda _: time.sleep(0.3)}
formats = TextFormat("query: ", 12, True), TextFormat("passage: ", 16, True)
print("store", build_training_store([sys.argv[2]], tokenizer, *formats, 2, sys.argv[3], deeds[sys.argv[4]]))
"""


def start_child(tmp_path, tokenizer, path, cache_dir, deed):
    saved = tmp_path / "tokenizer.json"
    if not saved.exists():
        tokenizer.backend_tokenizer.save(str(saved))
    command = [sys.executable, "-c", CHILD, str(saved), str(path), str(cache_dir), deed]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_never_taken_for_whole_and_the_next_clears_it(tmp_path, tokenizer, small_chunks):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    cache_dir = tmp_path / "cache"
    child = start_child(tmp_path, tokenizer, path, cache_dir, "kill")
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    (left,) = cache_dir.glob(".unfinished-*")
    assert (left / "tokens.npy").exists()
    assert list(cache_dir.glob("training-*")) == []
    with pytest.raises(ValueError, match="manifest.json is missing, so this is not a complete token store"):
        TrainingStore.open(left)

    store = build(path, tokenizer, cache_dir)
    assert [entry for entry in cache_dir.iterdir() if entry.is_dir()] == [store]
    assert store.name in left.name
    assert contents(store) == contents(build(path, tokenizer, tmp_path / "other"))


def test_processes_that_build_at_once_build_once(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    cache_dir = tmp_path / "cache"
    children = [start_child(tmp_path, tokenizer, path, cache_dir, "linger") for _ in range(3)]
    outputs = [child.communicate()[0].splitlines() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert len({lines[-1] for lines in outputs}) == 1
    words = " ".join(line.split()[0] for lines in outputs for line in lines)
    assert (words.count("building"), words.count("reusing"), words.count("store")) == (1, 2, 3)
    assert [entry.name for entry in cache_dir.iterdir() if entry.is_dir()] == [outputs[0][-1].rsplit("/", 1)[1]]


def test_without_locks_the_first_to_finish_wins(tmp_path, tokenizer, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(durable.fcntl, "flock", no_locks)
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    cache_dir = tmp_path / "cache"
    all_are_building = threading.Barrier(3)
    stores = []

    def run():
        stores.append(build(path, make_tokenizer(), cache_dir, progress=lambda _: all_are_building.wait(20)))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores) == 3 and len(set(stores)) == 1
    assert [entry for entry in cache_dir.iterdir() if entry.is_dir()] == stores[:1]
    TrainingStore.open(stores[0])


def test_without_locks_no_finished_folder_is_taken_for_a_damaged_one(tmp_path):
    looked, put_in_place = threading.Event(), threading.Event()
    final = tmp_path / "store"

    def problem_of(folder):
        seen = None if (folder / "whole").exists() else "is not whole"
        if threading.current_thread() is slow and folder == final:
            looked.set()
            put_in_place.wait(20)
        return seen

    slow = threading.Thread(target=shared.clear_damaged, args=(final, problem_of))
    slow.start()
    looked.wait(1)  # a look at what is not there must not be needed
    shared.obtain_folder(final, "store", "cache_dir", problem_of, lambda folder: (folder / "whole").touch())
    put_in_place.set()
    slow.join()
    assert problem_of(final) is None


def test_only_dead_builds_are_removed(tmp_path, tokenizer):
    cache_dir = tmp_path / "cache"
    cache_dir.mkdir()
    host = socket.gethostname()
    names = {
        "dead": f".unfinished-training-1@{host}@7-a",
        "alive": f".unfinished-training-2@{host}@8-b",
        "alive_but_silent": ".unfinished-training-3@elsewhere@9-c",
        "elsewhere": ".unfinished-training-1@elsewhere@10-d",
        "elsewhere_long_ago": ".unfinished-training-1@elsewhere@11-e",
        "elsewhere_still_writing": ".unfinished-training-1@elsewhere@12-f",
    }
    folders = {key: cache_dir / name for key, name in names.items()}
    two_days_ago = time.time() - 2 * 24 * 3600
    for key, folder in folders.items():
        folder.mkdir()
        (folder / "tokens.npy").write_bytes(b"x")
        if key in ("elsewhere_long_ago", "elsewhere_still_writing", "alive_but_silent"):
            os.utime(folder, (two_days_ago, two_days_ago))
        if key in ("elsewhere_long_ago", "alive_but_silent"):
            os.utime(folder / "tokens.npy", (two_days_ago, two_days_ago))
    with hold_lock(cache_dir / "training-2", "--cache_dir"), hold_lock(cache_dir / "training-3", "--cache_dir"):
        build(write_jsonl(tmp_path / "a.jsonl", RECORDS), tokenizer, cache_dir)
    left = {key for key, folder in folders.items() if folder.exists()}
    assert left == {"alive", "alive_but_silent", "elsewhere", "elsewhere_still_writing"}


def test_no_room_is_a_clear_error_and_leaves_nothing(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS * 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the nearest to a full disk without being root
    try:
        with pytest.raises(
            UserError,
            match="the token store .* could not be written .File too large; .* MiB are free there.; free space there or choose another --cache_dir",
        ):
            build(path, tokenizer, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []
    assert TrainingStore.open(build(path, tokenizer, tmp_path / "cache")).num_records == 2000


def test_memory_does_not_grow_with_the_number_of_records(tmp_path, tokenizer, monkeypatch):
    leave_out_when_fast()
    monkeypatch.setattr(store_writer, "_CHUNK_TEXTS", 500)
    monkeypatch.setattr(store_writer, "_WORKERS_FROM_TEXTS", 1000)
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")
    peaks = []
    for num_records in (1500, 9000):
        records = [
            {"query": f"how deep {i}", "pos_doc": f"so deep {i} " * 3, "doc_id": f"d{i}"} for i in range(num_records)
        ]
        path = write_jsonl(tmp_path / f"{num_records}.jsonl", records)
        del records
        TrainingStore.open(build(write_jsonl(tmp_path / "warm.jsonl", RECORDS), tokenizer, tmp_path / str(num_records)))
        tracemalloc.start()
        store = build(path, tokenizer, tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        TrainingStore.open(store)
        opening = tracemalloc.get_traced_memory()[1] - held
        tracemalloc.stop()
        assert opening < 100_000
    assert peaks[1] < 1.1 * peaks[0]


def test_long_texts_end_a_chunk_early(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(store_writer, "_CHUNK_DISTINCT_CHARACTERS", 100)
    monkeypatch.setattr(store_writer, "_CHUNK_CHARACTERS", 300)
    told = []
    distinct = [{"pos_doc": f"{i}" * 60, "doc_id": "d"} for i in range(4)]
    repeated = [{"pos_doc": ("a", "b")[i % 2] * 40, "doc_id": "d"} for i in range(9)]
    for name, documents in (("a", distinct), ("b", repeated)):
        path = write_jsonl(tmp_path / name, documents)
        build_text_store(path, "pos_doc", "doc_id", tokenizer, DOCUMENT, tmp_path, told.append)
    assert told == [2, 2, 8, 1]


def test_a_tilde_is_the_home_folder_also_where_no_shell_has_seen_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    store = build(path, tokenizer, "~/cache")
    documents = write_jsonl(tmp_path / "b.jsonl", [{"pos_doc": "a b", "doc_id": "d"}])
    texts = build_text_store(documents, "pos_doc", "doc_id", tokenizer, DOCUMENT, "~/cache")
    assert store.parent == texts.parent == tmp_path / "home" / "cache"
    assert not (tmp_path / "~").exists()


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.setattr(store_writer, "_WORKERS_FROM_TEXTS", 0)
    monkeypatch.setattr(store_writer, "_CHUNK_TEXTS", 16)
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")


def children():
    """Processes that encode: children of this one that run the workers' program."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
            found += [child.pid] * ("store_workers" in " ".join(child.cmdline()))
    return found


def test_a_store_is_the_same_whatever_number_of_processes_builds_it(tmp_path, tokenizer, workers, monkeypatch):
    blank = {"query": " ", "pos_doc": "a"}
    files = [
        write_jsonl(tmp_path / "a.jsonl", RECORDS * 4 + [blank] + RECORDS),
        write_jsonl(
            tmp_path / "b.jsonl", [blank] + [{"query": f"how {i % 7}", "pos_doc": "c " * i} for i in range(1, 60)]
        ),
    ]
    documents = write_jsonl(tmp_path / "c.jsonl", [{"pos_doc": "x" * (i % 5), "doc_id": i} for i in range(70)])
    other = TextFormat("other: ", 12, True)
    formats = {"query": [other, DOCUMENT], "document": [DOCUMENT, other], "skip_bad_records": True}
    stores = {}
    for number in ("1", "2"):
        seen = []
        monkeypatch.setenv("RAYON_NUM_THREADS", number)
        progress = lambda added: seen.append((added, len(children())))  # noqa: E731
        training = build(files, tokenizer, tmp_path / number, progress=progress, **formats)
        texts = build_text_store(documents, "pos_doc", "doc_id", tokenizer, DOCUMENT, tmp_path / number)
        stores[number] = contents(training), contents(texts)
        assert sum(added for added, _ in seen) == 84
        assert {processes for _, processes in seen} == {0 if number == "1" else 2}
    assert stores["1"] == stores["2"]
    assert children() == []


def test_the_first_error_of_the_data_is_told_whichever_process_meets_it(tmp_path, tokenizer, workers):
    documents = [{"pos_doc": f"x{i}", "doc_id": i} for i in range(40)]
    documents[20]["pos_doc"] = ""
    documents[30]["pos_doc"] = 7
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    nothing = TextFormat("", 12, False)
    with pytest.raises(UserError, match="a.jsonl:21: pos_doc gives no token"):
        build_text_store(path, "pos_doc", "doc_id", tokenizer, nothing, tmp_path / "cache")
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []
    assert children() == []


def test_a_worker_that_is_killed_is_one_clear_error(tmp_path, tokenizer, workers):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS * 40)

    def kill(_):
        for pid in children():
            with contextlib.suppress(ProcessLookupError):  # it ends by itself when another has been killed
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(UserError, match="a process that tokenizes was killed by SIGKILL"):
        build(path, tokenizer, tmp_path / "cache", progress=kill)
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []
    assert children() == []


def test_workers_end_when_the_build_is_killed(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS * 40)
    child = start_child(tmp_path, tokenizer, path, tmp_path / "cache", "orphan")
    output = child.communicate()[0]
    assert child.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in output.split("children")[1].split()]
    assert len(pids) == 2
    give_up = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < give_up
        time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
