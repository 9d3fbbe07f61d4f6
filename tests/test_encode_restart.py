"""Encoding that stops at any place and goes on: the same bytes, whatever was lost, and never from other inputs.

In one process, with vectors that depend on the micro-batch they were computed in, as real ones do in their last bits.
"""

import json
import os
import random
import resource
import signal

import numpy as np
import pytest
import torch
from tiny import make_tokenizer, sentence

from ds_embed.artifact.identity import check_unchanged
from ds_embed.data.store import TextStore, build_text_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError
from ds_embed.vectors.corpus import Corpus, check_one_dtype, merge_shards, shard_path
from ds_embed.vectors.corpus_plan import CorpusPlan, rows_of_shard
from ds_embed.vectors.encode import encode_store
from ds_embed.vectors.vectors import read_vectors, stored_numbers

WORLD = World.alone()
MADE_FROM = {"doc_files": "aa (100 records)", "base_model": "bb", "micro_batch_tokens": "60"}
TEXTS, DIMS, BLOCK = 200, 3, 24


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Encoder:
    """Rows that tell text and micro-batch apart; is killed at its `dies_at`th pass."""

    def __init__(self, dies_at=None):
        self.dies_at, self.num_passes = dies_at, 0

    def __call__(self, ids, lengths, has_padding):
        self.num_passes += 1
        if self.num_passes == self.dies_at:
            raise Killed
        kept = ids * (torch.arange(ids.shape[1])[None] < lengths[:, None])
        return torch.stack([kept.sum(1), lengths, torch.full_like(lengths, ids.numel())], dim=1).float()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("restart")
    make_tokenizer(root, bert=True)
    from transformers import AutoTokenizer

    rng = random.Random(1)
    lines = [json.dumps({"pos_doc": sentence(rng), "doc_id": f"d{i}"}) + "\n" for i in range(TEXTS)]
    (root / "d.jsonl").write_text("".join(lines))
    tokenizer = AutoTokenizer.from_pretrained(root)
    return TextStore.open(
        build_text_store([root / "d.jsonl"], "pos_doc", "doc_id", tokenizer, TextFormat("", 30, False), root / "cache")
    )


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them, and only a crash of the machine needs them


def run(store, target, encoder=None, rows=None, made_from=MADE_FROM, save_seconds=0.0, dtype="float32"):
    encoder = encoder or Encoder()
    encode_store(
        store,
        encoder,
        WORLD,
        Corpus(target, "doc", made_from, dtype),
        micro_batch_tokens=int(made_from["micro_batch_tokens"]),
        rows=rows,
        goes_on=True,
        save_seconds=save_seconds,
        block_texts=BLOCK,
    )
    return encoder.num_passes


def is_finished(target, made_from=MADE_FROM, accepted=()):
    return Corpus(target, "doc", made_from).is_finished(accepted)


def begun(target):
    return Corpus(target, "doc").begun


def told(target):
    return [json.loads(line) for line in (begun(target) / "parts.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def straight(store, tmp_path):
    num_passes = run(store, tmp_path / "straight" / "test_docs", save_seconds=1e9)
    whole = contents(tmp_path / "straight" / "test_docs")
    assert sorted(whole) == ["doc.ids", "doc.npy", "manifest.json"]
    assert os.listdir(tmp_path / "straight") == ["test_docs"]
    return num_passes, whole


def killed_at(store, target, number, **options):
    with pytest.raises(Killed):
        run(store, target, Encoder(number), **options)
    assert not target.exists()
    with pytest.raises(ValueError, match="is not finished; start the same ds-embed generate command again"):
        read_vectors(target.parent, "doc")


def test_rows_are_right(store, straight, tmp_path):
    rows = read_vectors(tmp_path / "straight", "doc")
    assert list(rows.ids) == [f"d{i}" for i in range(TEXTS)]
    expected = [[store.tokens_of(i).sum(), len(store.tokens_of(i))] for i in range(TEXTS)]
    assert np.array_equal(rows.rows[:, :2], np.array(expected, np.float32))


def test_killed_at_any_pass(store, straight, tmp_path):
    num_passes, whole = straight
    assert num_passes > 100
    for number in [2, 3, *range(8, num_passes - 2, 11), num_passes - 1, num_passes]:
        target = tmp_path / str(number) / "test_docs"
        killed_at(store, target, number)
        with open(begun(target) / "parts.jsonl", "a") as file:
            file.write('{"file": "doc.npy", "sta')  # as SIGKILL leaves it
        # Passes since the last save are made again: those of one group, and the one that died.
        assert run(store, target) <= num_passes - number + 10
        assert contents(target) == whole
    target = tmp_path / "often" / "test_docs"
    for _ in range(8):
        killed_at(store, target, 12)
    run(store, target)
    assert contents(target) == whole


def test_killed_while_publishing(store, straight, tmp_path, monkeypatch):
    _, whole = straight
    for number, call in enumerate(["rename", "fsync", "replace", "pwrite", "unlink"] * 4):
        target = tmp_path / str(number) / "test_docs"
        real, left = getattr(os, call), [1 + number // 5]

        def die(*args, real=real, left=left, **options):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return real(*args, **options)

        monkeypatch.setattr(os, call, die)
        try:
            run(store, target, save_seconds=1e9)
        except Killed:
            pass
        monkeypatch.setattr(os, call, real)
        if not is_finished(target):
            run(store, target, save_seconds=1e9)
        assert contents(target) == whole and os.listdir(target.parent) == ["test_docs"], (call, number)


@pytest.mark.parametrize("loss", ["cut", "zero tail", "bit", "no rows", "no header"])
@pytest.mark.parametrize("file", ["doc.npy", "doc.computed"])
def test_saved_rows_that_got_lost_are_encoded_again(store, straight, tmp_path, caplog, file, loss):
    num_passes, whole = straight
    target = tmp_path / "out" / "test_docs"
    killed_at(store, target, 60)
    path = begun(target) / file
    content = bytearray(path.read_bytes())
    last = [part for part in told(target) if part["file"] == file][-1]
    start, end = last["start"], last["start"] + last["num_bytes"]
    if loss == "cut":
        del content[end - 1 :]
    elif loss == "zero tail":
        content[start:] = bytes(len(content) - start)
    elif loss == "bit":
        content[end - 1] ^= 1
    elif loss == "no rows":
        content = bytearray()
    else:
        content[:128] = bytes(128)
    path.write_bytes(content)
    run(store, target)
    assert contents(target) == whole
    assert f"{file}: saved rows are not as they were written" in caplog.text


def test_the_word_follows_the_rows(store, tmp_path, monkeypatch):
    """A crash of the machine can't be had here: so the order of the calls that make it harmless."""
    dirty, counts = set(), {"saves": 0, "writes": 0}
    real_write, lines = os.pwrite, []

    def path_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    def pwrite(descriptor, *arguments):
        dirty.add(path_of(descriptor))
        counts["writes"] += 1
        return real_write(descriptor, *arguments)

    def fsync(descriptor):
        name = path_of(descriptor)
        dirty.discard(name)
        if name == "parts.jsonl":
            lines.append(os.fstat(descriptor).st_size)
            assert not dirty  # what it tells of has reached the disk before
            counts["saves"] += 1

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(os, "fsync", fsync)
    run(store, tmp_path / "test_docs")
    assert counts["saves"] > 10 and counts["writes"] > 10 and lines == sorted(lines)


def test_saves_follow_the_clock(store, tmp_path):
    target = tmp_path / "test_docs"
    killed_at(store, target, 40, save_seconds=1e9)
    assert not (begun(target) / "parts.jsonl").exists()
    killed_at(store, target, 40)
    names = [part["name"] for part in told(target)]
    assert (
        names[0].startswith("header")
        and names.count("0") == 1
        and "1" not in names
        and "0+0@60, each text once" in names
    )


def test_other_inputs_are_refused(store, straight, tmp_path):
    target = tmp_path / "out" / "test_docs"
    killed_at(store, target, 30)
    for path in (begun(target), tmp_path / "straight" / "test_docs"):
        whole = path.with_name("test_docs")
        with pytest.raises(ValueError) as caught:
            is_finished(whole, MADE_FROM | {"doc_files": "cc (100 records)"}, ["micro_batch_tokens"])
        assert f"{path} was made from something else: doc_files was aa (100 records) and is cc" in str(caught.value)
        assert f"remove {path} to start afresh, or choose another --output_prefix" in str(caught.value)
        assert "accept_changes" not in str(caught.value)
    with pytest.raises(ValueError, match="micro_batch_tokens was 60 and is 40.*--accept_changes micro_batch_tokens"):
        is_finished(target, MADE_FROM | {"micro_batch_tokens": "40"})
    assert is_finished(tmp_path / "straight" / "test_docs")
    (tmp_path / "straight" / "test_docs" / "doc.ids").write_bytes(b"")
    with pytest.raises(ValueError, match="doc.ids has 0 bytes and was written with 890; remove"):
        is_finished(tmp_path / "straight" / "test_docs")


def test_folders_of_earlier_versions_are_refused(store, tmp_path):
    for path in (tmp_path / "test_docs", begun(tmp_path / "test_docs")):
        path.mkdir()
        (path / ("manifest.json" if path.name == "test_docs" else "progress.json")).write_text('{"format_version": 1}')
        with pytest.raises(
            UserError, match=f"{path}.*: holds what another version of ds_embed wrote.*; remove {path} "
        ):
            is_finished(tmp_path / "test_docs")
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def test_another_micro_batch_goes_on_at_a_block(store, straight, tmp_path, caplog):
    num_passes, whole = straight
    other = MADE_FROM | {"micro_batch_tokens": "90"}
    target = tmp_path / "out" / "test_docs"
    killed_at(store, target, num_passes - 26)
    assert not is_finished(target, other, ["micro_batch_tokens"])
    killed_at(store, target, 9, made_from=other, save_seconds=1e9)  # some rows written, none saved
    killed_at(store, target, 5, made_from=other)
    run(store, target, made_from=other)
    old, new = (
        np.frombuffer(files["doc.npy"][128:], np.float32).reshape(TEXTS, DIMS) for files in (whole, contents(target))
    )
    assert np.array_equal(old[:, :2], new[:, :2])
    assert "not as they were written" not in caplog.text
    changed = np.flatnonzero((old != new).any(axis=1))
    assert len(changed) == 0 or changed.min() >= 120  # whole blocks of 24 before it stay


def test_full_disk_keeps_what_was_saved(store, straight, tmp_path):
    _, whole = straight
    target = tmp_path / "out" / "test_docs"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 60 * 4 * DIMS, hard))
    try:
        with pytest.raises(UserError, match=r"could not be written \(File too large; .*; 3\d of 200 rows are kept"):
            run(store, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert run(store, target) < straight[0] - 10
    assert contents(target) == whole


def test_a_vector_that_is_no_number_names_its_text(store, tmp_path):
    class Bad(Encoder):
        def __call__(self, *inputs):
            vectors = super().__call__(*inputs)
            if self.num_passes == 20:
                vectors[0, 1] = float("nan")
            return vectors

    with pytest.raises(ValueError, match=r"d.jsonl:\d+: its vector holds NaN or infinity; try --bf16 false"):
        run(store, tmp_path / "test_docs", Bad())


@pytest.mark.parametrize("num_shards", [2, 3, 5, 7])
def test_shards_merge_to_the_same_bytes(store, straight, tmp_path, num_shards):
    _, whole = straight
    target = tmp_path / "out" / "test_docs"
    rows = [rows_of_shard(TEXTS, index, num_shards, BLOCK) for index in range(num_shards)]
    assert [row for part in rows for row in part] == list(range(TEXTS))

    def merge(made_from=MADE_FROM):
        merge_shards(Corpus(target, "doc", made_from), store, num_shards, [])

    for index in reversed(range(num_shards)):
        with pytest.raises(ValueError, match=f"{index + 1} of {num_shards} shards of .* are missing or unfinished"):
            merge()
        part = shard_path(target, index, num_shards)
        if len(rows[index]) > 12:
            killed_at(store, part, 5, rows=rows[index])
        run(store, part, rows=rows[index])
    with pytest.raises(ValueError, match="was made from something else: base_model was bb and is cc"):
        merge(MADE_FROM | {"base_model": "cc"})
    merge()
    assert contents(target) == whole
    parts = [shard_path(target, index, num_shards) for index in range(num_shards)]
    assert b"".join((part / "doc.ids").read_bytes() for part in parts) == whole["doc.ids"]
    content = bytearray((part / "doc.npy").read_bytes())
    content[-1] ^= 1
    (part / "doc.npy").write_bytes(content)
    with pytest.raises(ValueError, match="doc.npy: its rows are not as they were written; remove that shard"):
        merge()
    assert contents(target) == whole
    with open(part / "doc.npy", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="doc.npy has .* bytes and was written with"):
        merge()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_numbers_are_the_same_bytes_after_any_kill_and_in_shards(store, straight, tmp_path, dtype):
    num_passes, plain = straight
    run(store, tmp_path / "whole" / "test_docs", save_seconds=1e9, dtype=dtype)
    whole = contents(tmp_path / "whole" / "test_docs")
    rows = np.frombuffer(plain["doc.npy"][128:], np.float32).reshape(TEXTS, DIMS)
    files = ["doc.npy", "doc.scales.npy"][: 1 + (dtype == "int8")]
    assert sorted(whole) == sorted(["doc.ids", "manifest.json", *files])
    for file, numbers in zip(files, stored_numbers(rows, dtype)):
        found = np.load(tmp_path / "whole" / "test_docs" / file, allow_pickle=False)
        assert found.dtype == numbers.dtype and np.array_equal(found, numbers)
    assert np.array_equal(
        read_vectors(tmp_path / "whole", "doc").rows[5:7], read_back(stored_numbers(rows, dtype))[5:7]
    )
    for number in range(3, num_passes, 17):
        target = tmp_path / str(number) / "test_docs"
        killed_at(store, target, number, dtype=dtype)
        if number > 40:  # a block is taken up with all its files or not at all
            path = begun(target) / files[-1]
            path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        run(store, target, dtype=dtype)
        assert contents(target) == whole
    target = tmp_path / "out" / "test_docs"
    for index in range(3):
        run(store, shard_path(target, index, 3), rows=rows_of_shard(TEXTS, index, 3, BLOCK), dtype=dtype)
    merge_shards(Corpus(target, "doc", MADE_FROM, dtype), store, 3, [])
    assert contents(target) == whole
    # Of float32 begun or whole, by this version or by one that had no other numbers, nothing goes on.
    other = Corpus(tmp_path / "straight" / "test_docs", "doc", MADE_FROM, dtype)
    with pytest.raises(UserError, match=f"vector_dtype was float32 and is {dtype}"):
        other.is_finished([])
    with pytest.raises(UserError, match=f"vector_dtype was float32 and is {dtype}"):
        check_unchanged(target, MADE_FROM, other.made_from, (), "--output_prefix")
    with pytest.raises(UserError, match=f"--vector_dtype {dtype}: .* holds float32, and queries and documents .* one"):
        check_one_dtype(other)


def read_back(stored):
    return stored[0].astype(np.float32) * (stored[1][:, None] if len(stored) > 1 else 1)


def test_a_vector_beyond_float16_is_named(store, tmp_path):
    class Large(Encoder):
        def __call__(self, *inputs):
            return super().__call__(*inputs) * 1e4

    message = r"d.jsonl:\d+: its vector holds [\d,]+, and float16 at most 65,504; give --vector_dtype float32"
    with pytest.raises(UserError, match=message):
        run(store, tmp_path / "test_docs", Large(), dtype="float16")
    run(store, tmp_path / "test_docs2", Large(), dtype="int8")


@pytest.mark.parametrize("num_rows, block", [(48, 24), (1, 24), (200, 200), (0, 24)])
def test_blocks_that_end_with_the_corpus(store, tmp_path, num_rows, block):
    target = tmp_path / "test_docs"
    corpus = Corpus(target, "doc", MADE_FROM)
    options = dict(micro_batch_tokens=60, rows=range(num_rows), goes_on=True, save_seconds=0.0, block_texts=block)
    for _ in range(2 * num_rows // 10):
        with pytest.raises(Killed):
            encode_store(store, Encoder(11), WORLD, corpus, **options)
            raise Killed
    if not is_finished(target):
        encode_store(store, Encoder(), WORLD, corpus, **options)
    assert np.load(target / "doc.npy").shape == (num_rows, DIMS)
    plan = CorpusPlan(store, range(num_rows), 60, block)
    assert sorted(text for batch in plan.batches(0) for text in batch.rows) == list(range(num_rows))


def test_each_text_of_a_block_is_encoded_once(store, tmp_path):
    """Rows with the same tokens share a forward pass, are right wherever they stand, and survive a kill."""
    lines = []
    for row in range(TEXTS):
        text = store.tokens_of(row % 9 if row % 3 else row)
        lines.append(json.dumps({"pos_doc": " ".join(f"w{i}" for i in text.tolist()), "doc_id": f"d{row}"}) + "\n")
    (tmp_path / "d.jsonl").write_text("".join(lines))
    from transformers import AutoTokenizer

    make_tokenizer(tmp_path, bert=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text_format = TextFormat("", 30, False)
    path = build_text_store([tmp_path / "d.jsonl"], "pos_doc", "doc_id", tokenizer, text_format, tmp_path / "cache")
    repeated = TextStore.open(path)
    encoded = []

    class Counting(Encoder):
        def __call__(self, ids, lengths, has_padding):
            encoded.append(ids.shape[0])
            return super().__call__(ids, lengths, has_padding)

    num_passes = run(repeated, tmp_path / "once" / "test_docs", Counting(), save_seconds=1e9)
    tokens = [repeated.tokens_of(row).tobytes() for row in range(TEXTS)]
    distinct = sum(len(set(tokens[start : start + BLOCK])) for start in range(0, TEXTS, BLOCK))
    assert distinct < TEXTS * 2 / 3 and sum(encoded) == distinct + 1  # and a dummy that tells the dimensions
    whole = contents(tmp_path / "once" / "test_docs")
    rows = read_vectors(tmp_path / "once", "doc").rows
    expected = [[repeated.tokens_of(i).sum(), len(repeated.tokens_of(i))] for i in range(TEXTS)]
    assert np.array_equal(rows[:, :2], np.array(expected, np.float32))
    for number in range(3, num_passes, 7):
        killed_at(repeated, tmp_path / str(number) / "test_docs", number)
        run(repeated, tmp_path / str(number) / "test_docs")
        assert contents(tmp_path / str(number) / "test_docs") == whole
