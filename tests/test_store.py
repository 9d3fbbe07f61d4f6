"""Token stores: equal to direct tokenization, reused or rebuilt as they should be."""

import hashlib
import json
import logging
import os
from dataclasses import replace

import numpy as np
import pytest
from store_material import (  # noqa: F401
    DOCUMENT,
    QUERY,
    RECORDS,
    build,
    contents,
    expected_texts,
    make_tokenizer,
    small_chunks,
    tokenizer,
    write_jsonl,
)

from ds_embed.data import identity, store_files, store_writer
from ds_embed.data.identity import content_key, token_keys
from ds_embed.data.store import TextStore, TrainingStore, build_text_store, build_training_store, check_texts_fit
from ds_embed.data.tokenize import TextFormat, encode_texts
from ds_embed.settings.errors import UserError


def text_range(store, record):
    """The texts of a record: its query first, its positive second, its negatives after them."""
    return range(*store.first_text[record : record + 2].tolist())


@pytest.mark.parametrize("num_negatives", [0, 1, 2, None])
@pytest.mark.parametrize("chunk_texts", [1, 4, 10_000])
def test_a_training_store_equals_direct_tokenization(tmp_path, monkeypatch, tokenizer, num_negatives, chunk_texts):
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
        assert text_range(store, index) == range(next_text, next_text + len(texts))
        wanted = encode_texts(tokenizer, texts[:1], QUERY) + encode_texts(tokenizer, texts[1:], DOCUMENT)
        for text, tokens in zip(text_range(store, index), wanted):
            assert store.tokens_of(text).tolist() == tokens.tolist()
            assert store.lengths[text] == len(tokens)
            assert store.text_keys[text] == token_keys(tokens, [len(tokens)])[0]
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

    assert store.lengths_of(np.array([[1], [0]])).tolist() == [[store.lengths[1]], [store.lengths[0]]]
    with pytest.raises(ValueError, match="read-only"):
        store.tokens_of(0)[0] = 1


def test_the_manifest_says_what_was_stored(tmp_path, tokenizer, small_chunks):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    manifest = TrainingStore.open(build(path, tokenizer, tmp_path)).manifest
    (file,) = manifest["files"]
    assert (
        file.items()
        >= {
            "path": str(path),
            "parts": [{"path": str(path), "unit": "line", "records_before": 0}],
            "stamps": [{"path": str(path), "bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}],
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "num_records": 5,
            "negatives": [0, 3],
            "num_repeated": 0,
            "max_positives": 2,
            "read": "our own records, 5",
        }.items()
    )
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
    for side, lengths, limit in (("queries", query_lengths, 12), ("documents", document_lengths, 16)):
        cut = sum(length > limit for length in lengths)
        assert file[side] == {"num_texts": len(lengths), "num_cut": cut, "longest": max(lengths)}
    assert 0 < file["queries"]["num_cut"] < 5
    assert manifest["num_texts"] == sum(map(len, texts))
    assert manifest["num_tokens"] == sum(min(n, 12) for n in query_lengths) + sum(min(n, 16) for n in document_lengths)
    assert manifest["records_without_negatives"] == 2
    assert manifest["first_record_without_negatives"] == f"{path}:4"
    assert manifest["settings"]["query_format"] == {
        "prefix": "query: ",
        "max_length": 12,
        "append_eos": True,
        "include_prompt": True,
        "strip": True,
    }


def test_keys_of_queries_and_documents_that_nobody_reads_are_told(tmp_path, tokenizer):
    queries = [{"query": "x", "query_id": "q", "doc_id": "d", "language": "en"}, {"text": "y", "_id": "p", "url": "u"}]
    documents = [{"pos_doc": "x", "doc_id": "d", "title": "T"}, {"text": "y", "_id": "e", "title": "T", "source": "s"}]
    for text, id_key, records, unread in (
        ("query", "query_id", queries, "language, url"),
        ("pos_doc", "doc_id", documents, "title, source"),
    ):
        path = write_jsonl(tmp_path / f"{text}.jsonl", records)
        folder = build_text_store([path], text, id_key, tokenizer, TextFormat("", 9, True), tmp_path / "cache")
        assert f"not read: {unread}" in TextStore.open(folder).describe()


def test_the_longest_text_is_the_longest_that_is_kept(tmp_path, tokenizer):
    """Not one that was longer before it was cut: a query too long for a micro-batch is found beside it."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": "x " * 10, "pos_doc": "x " * 40}, RECORDS[0]])
    store = TrainingStore.open(build(path, tokenizer, tmp_path, TextFormat("", 64, True), TextFormat("", 8, True)))
    with pytest.raises(UserError, match=rf"--micro_batch_tokens 16: .* text of 2\d tokens at {path}:1; raise it to"):
        check_texts_fit(store, 16)
    check_texts_fit(store, int(store.lengths.max()))


def test_records_without_negatives_are_counted_in_the_data_not_in_the_store(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    manifest = TrainingStore.open(build(path, tokenizer, tmp_path, num_negatives=0)).manifest
    assert manifest["records_without_negatives"] == 2


def test_text_stores_hold_rows_and_ids_in_file_order(tmp_path, tokenizer, small_chunks):
    documents = [{"pos_doc": text, "doc_id": f"d {i} é"} for i, text in enumerate(["a b", "", "x " * 40, "a b", "c"])]
    files = [write_jsonl(tmp_path / "a.jsonl", documents[:3]), write_jsonl(tmp_path / "b.jsonl", documents[3:])]
    told = []
    path = build_text_store(files, "pos_doc", "doc_id", tokenizer, DOCUMENT, tmp_path, told.append)
    store = TextStore.open(path)
    wanted = encode_texts(tokenizer, [document["pos_doc"] for document in documents], DOCUMENT)
    assert [store.tokens_of(row).tolist() for row in range(5)] == [tokens.tolist() for tokens in wanted]
    assert list(store.ids()) == [document["doc_id"] for document in documents]
    assert store.ids_path.read_bytes() == "".join(document["doc_id"] + "\n" for document in documents).encode()
    assert (store.location(2), store.location(3)) == (f"{files[0]}:3", f"{files[1]}:1")
    assert sum(told) == store.num_records == 5
    assert store.manifest["kind"] == "documents"

    queries = write_jsonl(tmp_path / "q.jsonl", [{"query": "how deep", "query_id": "q", "doc_id": "d"}])
    store = TextStore.open(build_text_store([queries], "query", "query_id", tokenizer, QUERY, tmp_path))
    assert store.tokens_of(0).tolist() == encode_texts(tokenizer, ["how deep"], QUERY)[0].tolist()
    with pytest.raises(ValueError, match="holds documents, expected training"):
        TrainingStore.open(path)


def test_a_prompt_of_a_query_stands_in_place_of_the_prefix(tmp_path, tokenizer, small_chunks):
    """As if it had been the prefix of all, in text stores and in training stores; a model that leaves prompts out has one."""
    records = [{"query": f"how deep {n % 2}", "query_id": f"q{n}", "pos_doc": f"so {n}"} for n in range(6)]
    prompts = [None, None, "find ", "ask </s> ", "find ", ""]
    lines = [record | ({} if prompt is None else {"prompt": prompt}) for record, prompt in zip(records, prompts)]
    path = write_jsonl(tmp_path / "q.jsonl", lines)
    queries = TextStore.open(build_text_store([path], "query", "query_id", tokenizer, QUERY, tmp_path))
    training = TrainingStore.open(build_training_store([path], tokenizer, QUERY, DOCUMENT, 0, tmp_path))
    for row, (record, prompt) in enumerate(zip(records, prompts)):
        if prompt:
            (wanted,) = encode_texts(tokenizer, [prompt + record["query"]], replace(QUERY, prefix=""))
        else:
            (wanted,) = encode_texts(tokenizer, [record["query"]], QUERY)
        for tokens in (queries.tokens_of(row), training.tokens_of(2 * row)):
            assert tokens.tolist() == wanted.tolist()
    for store in (queries, training):
        assert any(line.startswith("3 queries bring a prompt of their own") for line in store.describe())
        assert store.facts()[0]["queries"]["num_texts"] == 6
    left_out = replace(QUERY, include_prompt=False)
    for attempt in (
        lambda: build_text_store([path], "query", "query_id", tokenizer, left_out, tmp_path),
        lambda: build_training_store([path], tokenizer, left_out, DOCUMENT, 0, tmp_path),
    ):
        with pytest.raises(
            ValueError, match="q.jsonl:3: brings a prompt of its own, and this model's pooling leaves out"
        ):
            attempt()


def test_keys_are_never_zero_and_tell_texts_apart():
    keys = {content_key(str(number)) for number in range(1000)}
    assert len(keys) == 1000 and 0 not in keys
    assert min(keys) < -(2**62) and max(keys) > 2**62


def test_a_digest_of_zeros_is_not_the_key_for_none(monkeypatch):
    class Zeros:
        def digest(self):
            return bytes(8)

    monkeypatch.setattr(identity.hashlib, "blake2b", lambda *_, **__: Zeros())
    assert content_key("any") == 1


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([RECORDS[0], {"query": "q", "pos_doc": 3}], "{path}:2: pos_doc is a number, expected a string"),
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
    with pytest.raises(ValueError, match="num_negatives=-1; expected 0 or more, or None for all"):
        build(path, tokenizer, tmp_path, num_negatives=-1)
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        build([path, tmp_path / "none.jsonl"], tokenizer, tmp_path)
    with pytest.raises(ValueError, match="query_max_length=1 leaves no room"):
        build(path, tokenizer, tmp_path, query=TextFormat("", 1, True))
    with pytest.raises(ValueError, match="doc_max_length=1 leaves no room"):
        build_text_store(path, "pos_doc", "doc_id", tokenizer, TextFormat("", 1, True), tmp_path)
    with pytest.raises(ValueError, match="text_key='query' with id_key='doc_id'; expected one of"):
        build_text_store(path, "query", "doc_id", tokenizer, QUERY, tmp_path)
    with pytest.raises(ValueError, match=r"--cache_dir .*a.jsonl: is a file; give a folder"):
        build(path, tokenizer, path)


def test_a_text_without_tokens_names_its_place(tmp_path, tokenizer, small_chunks):
    documents = [{"pos_doc": text, "doc_id": "d"} for text in ("a", "b", "c", "d", "e", "  ", "f")]
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    with pytest.raises(ValueError) as caught:
        build_text_store(path, "pos_doc", "doc_id", tokenizer, TextFormat("", 10, False), tmp_path)
    assert str(caught.value).startswith(f"{path}:6: pos_doc gives no token with this tokenizer; remove it, or set")


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
    caplog.set_level(logging.INFO, "ds_embed")
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
