"""Token stores: equal to direct tokenization, reused or rebuilt as they should be, whole or not there."""

import errno
import hashlib
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ds_embed.data import store_files, store_writer
from ds_embed.data.store import TextStore, TrainingStore, build_text_store, build_training_store, content_key
from ds_embed.data.tokenize import TextFormat, encode_texts

QUERY = TextFormat("query: ", 12, True)
DOCUMENT = TextFormat("passage: ", 16, True)
RECORDS = [
    {
        "query": "where is the lake",
        "pos_doc": "behind the hill",
        "neg_doc": ["a b", "c", "d"],
        "query_id": "q0",
        "doc_id": "d0",
    },
    {"query": "how deep", "pos_doc": "x " * 40, "neg_doc": "c"},
    {"query": "a b", "pos_doc": "c", "neg_doc": ["where is the lake", "how deep"], "doc_id": "d0"},
    {"query": "how deep", "pos_doc": "behind the hill", "query_id": "q0"},
    {"query": "é 丘", "pos_doc": "</s> x", "neg_doc": []},
]


def make_tokenizer(vocab_size=280):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["query passage the lake hill"] * 3,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(store_writer, "_CHUNK_TEXTS", 4)


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def build(files, tokenizer, cache_dir, query=QUERY, document=DOCUMENT, num_negatives=2, **more):
    return build_training_store(files, tokenizer, query, document, num_negatives, cache_dir, **more)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected_texts(record, num_negatives):
    negatives = record.get("neg_doc", [])
    negatives = [negatives] if isinstance(negatives, str) else negatives
    return [record["query"], record["pos_doc"], *negatives[:num_negatives]]


@pytest.mark.parametrize("num_negatives", [0, 1, 2, None])
@pytest.mark.parametrize("chunk_texts", [1, 4, 10_000])
def test_a_training_store_equals_direct_tokenization(
    tmp_path, monkeypatch, tokenizer, num_negatives, chunk_texts
):
    monkeypatch.setattr(store_writer, "_CHUNK_TEXTS", chunk_texts)
    lines = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    array = tmp_path / "b.json"
    array.write_text(json.dumps(RECORDS[1:3]), encoding="utf-8")
    store = TrainingStore.open(build([lines, str(array)], tokenizer, tmp_path, num_negatives=num_negatives))

    records = RECORDS + RECORDS[1:3]
    assert store.num_records == len(records)
    next_text = 0
    for index, record in enumerate(records):
        texts = expected_texts(record, num_negatives)
        assert store.text_range(index) == range(next_text, next_text + len(texts))
        wanted = encode_texts(tokenizer, texts[:1], QUERY) + encode_texts(tokenizer, texts[1:], DOCUMENT)
        for text, raw, tokens in zip(store.text_range(index), texts, wanted):
            assert store.tokens_of(text).tolist() == tokens.tolist()
            assert store.lengths[text] == len(tokens)
            assert store.text_keys[text] == content_key(raw)
        for keys, name in ((store.query_keys, "query_id"), (store.document_keys, "doc_id")):
            assert keys[index] == (content_key(record[name]) if name in record else 0)
        next_text += len(texts)
    assert store.num_texts == next_text == len(store.lengths)
    assert store.num_tokens == len(store.tokens) == store.lengths.sum()
    assert [store.location(index) for index in range(7)] == [
        *(f"{lines}:{line}" for line in range(1, 6)),
        f"{array}:record 1",
        f"{array}:record 2",
    ]
    with pytest.raises(IndexError):
        store.location(7)

    first, counts = store.text_ranges(np.array([3, 0]))
    assert [range(a, a + n) for a, n in zip(first, counts)] == [store.text_range(3), store.text_range(0)]
    assert store.lengths_of(np.array([[1], [0]])).tolist() == [[store.lengths[1]], [store.lengths[0]]]
    with pytest.raises(ValueError, match="read-only"):
        store.tokens_of(0)[0] = 1


def test_the_manifest_says_what_was_stored(tmp_path, tokenizer, small_chunks):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    manifest = TrainingStore.open(build(path, tokenizer, tmp_path)).manifest
    assert manifest["files"] == [
        {
            "path": str(path),
            "bytes": path.stat().st_size,
            "mtime_ns": path.stat().st_mtime_ns,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "num_records": 5,
            "unit": "line",
        }
    ]
    texts = [expected_texts(record, 2) for record in RECORDS]
    untruncated = TextFormat("passage: ", 10_000, True)
    longest = len(encode_texts(tokenizer, [RECORDS[1]["pos_doc"]], untruncated)[0])
    assert manifest["longest_text"] == {
        "num_tokens_before_truncation": longest,
        "num_tokens": 16,
        "location": f"{path}:2",
        "key": "pos_doc",
    }
    query_lengths = [
        len(ids) for ids in encode_texts(tokenizer, [t[0] for t in texts], TextFormat("query: ", 99, True))
    ]
    document_lengths = [len(ids) for t in texts for ids in encode_texts(tokenizer, t[1:], untruncated)]
    assert manifest["num_truncated"] == {
        "queries": sum(n > 12 for n in query_lengths),
        "documents": sum(n > 16 for n in document_lengths),
    }
    assert 0 < manifest["num_truncated"]["queries"] < 5
    assert manifest["num_texts"] == sum(map(len, texts))
    assert manifest["num_tokens"] == sum(min(n, 12) for n in query_lengths) + sum(
        min(n, 16) for n in document_lengths
    )
    assert (manifest["max_tokens"], manifest["max_negatives"]) == (16, 2)
    assert manifest["records_without_negatives"] == 2
    assert manifest["first_record_without_negatives"] == f"{path}:4"
    assert manifest["settings"]["query_format"] == {"prefix": "query: ", "max_length": 12, "append_eos": True}


def test_records_without_negatives_are_counted_in_the_data_not_in_the_store(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    manifest = TrainingStore.open(build(path, tokenizer, tmp_path, num_negatives=0)).manifest
    assert (manifest["records_without_negatives"], manifest["max_negatives"]) == (2, 0)


def test_text_stores_hold_rows_and_ids_in_file_order(tmp_path, tokenizer, small_chunks):
    documents = [
        {"pos_doc": text, "doc_id": f"d {i} é"} for i, text in enumerate(["a b", "", "x " * 40, "a b", "c"])
    ]
    files = [
        write_jsonl(tmp_path / "a.jsonl", documents[:3]),
        write_jsonl(tmp_path / "b.jsonl", documents[3:]),
    ]
    told = []
    path = build_text_store(files, "pos_doc", "doc_id", tokenizer, DOCUMENT, tmp_path, told.append)
    store = TextStore.open(path)
    wanted = encode_texts(tokenizer, [document["pos_doc"] for document in documents], DOCUMENT)
    assert [store.tokens_of(row).tolist() for row in range(5)] == [tokens.tolist() for tokens in wanted]
    assert list(store.ids()) == [document["doc_id"] for document in documents]
    assert (
        store.ids_path.read_bytes() == "".join(document["doc_id"] + "\n" for document in documents).encode()
    )
    assert (store.location(2), store.location(3)) == (f"{files[0]}:3", f"{files[1]}:1")
    assert sum(told) == store.num_records == 5
    assert store.manifest["kind"] == "documents"

    queries = write_jsonl(tmp_path / "q.jsonl", [{"query": "how deep", "query_id": "q", "doc_id": "d"}])
    store = TextStore.open(build_text_store([queries], "query", "query_id", tokenizer, QUERY, tmp_path))
    assert store.tokens_of(0).tolist() == encode_texts(tokenizer, ["how deep"], QUERY)[0].tolist()
    with pytest.raises(ValueError, match="holds documents, want training"):
        TrainingStore.open(path)


def test_keys_are_never_zero_and_tell_texts_apart():
    keys = {content_key(str(number)) for number in range(1000)}
    assert len(keys) == 1000 and 0 not in keys
    assert min(keys) < -(2**62) and max(keys) > 2**62


def test_a_digest_of_zeros_is_not_the_key_for_none(monkeypatch):
    class Zeros:
        def digest(self):
            return bytes(8)

    monkeypatch.setattr(store_writer.hashlib, "blake2b", lambda *_, **__: Zeros())
    assert content_key("any") == 1


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([RECORDS[0], {"query": "q", "pos_doc": 3}], "{path}:2: pos_doc is a number, want a string"),
        ([*RECORDS, {"query": "q"}], "{path}:6: pos_doc is missing"),
    ],
)
def test_bad_data_leaves_nothing_behind(tmp_path, tokenizer, small_chunks, records, message):
    path = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(ValueError) as caught:
        build([path], tokenizer, tmp_path / "cache")
    assert str(caught.value).startswith(message.format(path=path))
    assert [entry.name for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []


def test_bad_arguments_name_themselves(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(ValueError, match="no data files were given"):
        build([], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="num_negatives=-1; want 0 or more, or None for all"):
        build(path, tokenizer, tmp_path, num_negatives=-1)
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        build([path, tmp_path / "none.jsonl"], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="query_max_length=1 leaves no room"):
        build(path, tokenizer, tmp_path, query=TextFormat("", 1, True))
    with pytest.raises(ValueError, match="doc_max_length=1 leaves no room"):
        build_text_store(path, "pos_doc", "doc_id", tokenizer, TextFormat("", 1, True), tmp_path)
    with pytest.raises(ValueError, match="text_key='query' with id_key='doc_id'; want one of"):
        build_text_store(path, "query", "doc_id", tokenizer, QUERY, tmp_path)
    with pytest.raises(ValueError, match=r"cache_dir=.*a.jsonl cannot be written .*; choose a folder"):
        build(path, tokenizer, path)


def test_a_text_without_tokens_names_its_place(tmp_path, tokenizer, small_chunks):
    documents = [{"pos_doc": text, "doc_id": "d"} for text in ("a", "b", "c", "d", "e", "  ", "f")]
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    with pytest.raises(ValueError) as caught:
        build_text_store(path, "pos_doc", "doc_id", tokenizer, TextFormat("", 10, False), tmp_path)
    assert str(caught.value).startswith(
        f"{path}:6: pos_doc gives no token with this tokenizer; remove it, set"
    )


def test_a_file_that_changes_under_the_build_is_refused(tmp_path, tokenizer, small_chunks):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)

    size = path.stat().st_size

    def append_once(_):
        if path.stat().st_size == size:
            with open(path, "a") as file:
                file.write(json.dumps(RECORDS[0]) + "\n")

    with pytest.raises(ValueError, match="a.jsonl: changed while it was read; run again"):
        build(path, tokenizer, tmp_path / "cache", progress=append_once)
    assert list((tmp_path / "cache").glob("training-*")) == []


def test_a_store_is_reused_until_something_that_decides_it_changes(tmp_path, tokenizer, caplog):
    caplog.set_level(logging.INFO, "ds_embed.data")
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    told = []
    first = build(path, tokenizer, tmp_path / "cache", progress=told.append)
    assert sum(told) == len(RECORDS)
    assert caplog.messages == [f"building the token store {first}"]
    caplog.clear()
    tokenizer(["a", "b c"], padding=True)  # using the tokenizer meanwhile changes nothing
    for same in ([path], path, str(path), tmp_path / "link" / "a.jsonl"):
        told.clear()
        assert build(same, make_tokenizer(), tmp_path / "cache", progress=told.append) == first
        assert told == []
    assert caplog.messages == [f"reusing the token store {first}"] * 4

    stores = {first}

    def is_new(*args, **kwargs):
        size = len(stores)
        stores.add(build(*args, **kwargs))
        return len(stores) == size + 1

    cache_dir = tmp_path / "cache"
    assert is_new(path, make_tokenizer(vocab_size=270), cache_dir)
    assert is_new(path, tokenizer, cache_dir, query=TextFormat("query: ", 11, True))
    assert is_new(path, tokenizer, cache_dir, document=TextFormat("passage: ", 15, True))
    assert is_new(path, tokenizer, cache_dir, document=TextFormat("document: ", 16, True))
    assert is_new(path, tokenizer, cache_dir, query=TextFormat("query: ", 12, False))
    assert is_new(path, tokenizer, cache_dir, num_negatives=1)
    assert is_new(path, tokenizer, cache_dir, num_negatives=None)
    assert is_new([path, path], tokenizer, cache_dir)
    status = path.stat()
    path.write_bytes(path.read_bytes().replace(b"lake", b"pond"))  # the same size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert is_new(path, tokenizer, cache_dir)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with open(path, "a") as file:
        file.write("\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert is_new(path, tokenizer, cache_dir)


def test_a_format_version_of_another_program_is_refused(tmp_path, monkeypatch, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    store = build(path, tokenizer, tmp_path)
    version = store_files.FORMAT_VERSION
    monkeypatch.setattr(store_files, "FORMAT_VERSION", version + 1)
    message = f"format version {version}, and this program reads {version + 1}; delete that folder"
    with pytest.raises(ValueError, match=message):
        TrainingStore.open(store)


def test_a_damaged_store_is_refused_on_opening_and_replaced_by_a_build(tmp_path, tokenizer, caplog):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    store = build(path, tokenizer, tmp_path / "cache")
    whole = contents(store)
    for name in whole:
        for damage in ("cut", "remove"):
            file = store / name
            file.write_bytes(whole[name][:-1]) if damage == "cut" else file.unlink()
            if (name, damage) == ("manifest.json", "cut"):
                continue  # only its last line break; the next round removes it
            with pytest.raises(ValueError) as caught:
                TrainingStore.open(store)
            assert str(caught.value).startswith(f"{store}: {name} ")
            assert "delete that folder and build the store again" in str(caught.value)
            caplog.clear()
            assert build(path, tokenizer, tmp_path / "cache") == store
            assert "it is replaced by a new build" in caplog.text
            assert contents(store) == whole
    with pytest.raises(ValueError, match="there is no token store here; delete"):
        TrainingStore.open(tmp_path / "nowhere")
    (store / "manifest.json").write_text('{"format_version": ')
    with pytest.raises(ValueError, match="manifest.json is not readable JSON; delete that folder"):
        TrainingStore.open(store)


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
deeds = {"kill": lambda _: os.kill(os.getpid(), signal.SIGKILL), "linger": lambda _: time.sleep(0.3)}
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
    (left,) = cache_dir.glob(".building-*")
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
    assert [entry.name for entry in cache_dir.iterdir() if entry.is_dir()] == [
        outputs[0][-1].rsplit("/", 1)[1]
    ]


def test_without_locks_the_first_to_finish_wins(tmp_path, tokenizer, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(store_files.fcntl, "flock", no_locks)
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


def test_only_dead_builds_are_removed(tmp_path, tokenizer):
    cache_dir = tmp_path / "cache"
    cache_dir.mkdir()
    host = socket.gethostname()
    names = {
        "dead": f".building-training-1@{host}@7-a",
        "alive": f".building-training-2@{host}@8-b",
        "alive_but_silent": ".building-training-3@elsewhere@9-c",
        "elsewhere": ".building-training-1@elsewhere@10-d",
        "elsewhere_long_ago": ".building-training-1@elsewhere@11-e",
        "elsewhere_still_writing": ".building-training-1@elsewhere@12-f",
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
    with (
        store_files._lock(cache_dir / ".training-2.lock", wait=False) as second,
        store_files._lock(cache_dir / ".training-3.lock", wait=False) as third,
    ):
        assert second and third
        build(write_jsonl(tmp_path / "a.jsonl", RECORDS), tokenizer, cache_dir)
    left = {key for key, folder in folders.items() if folder.exists()}
    assert left == {"alive", "alive_but_silent", "elsewhere", "elsewhere_still_writing"}


def test_no_room_is_a_clear_error_and_leaves_nothing(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS * 400)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the nearest to a full disk without being root
    try:
        with pytest.raises(OSError, match="no room for the token store in .*; free space there or choose"):
            build(path, tokenizer, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()] == []
    assert TrainingStore.open(build(path, tokenizer, tmp_path / "cache")).num_records == 2000


def test_memory_does_not_grow_with_the_number_of_records(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(store_writer, "_CHUNK_TEXTS", 500)
    peaks = []
    for num_records in (1500, 9000):
        records = [
            {"query": f"how deep {i}", "pos_doc": f"so deep {i} " * 3, "doc_id": f"d{i}"}
            for i in range(num_records)
        ]
        path = write_jsonl(tmp_path / f"{num_records}.jsonl", records)
        del records
        build(write_jsonl(tmp_path / "warm.jsonl", RECORDS), tokenizer, tmp_path / str(num_records))
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
