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

from ds_embed.data.store import TextStore, build_text_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError
from ds_embed.vectors import corpus_plan, encode, shards, vectors_writer
from ds_embed.vectors.corpus_plan import rows_of_shard
from ds_embed.vectors.vectors import read_vectors
from ds_embed.vectors.vectors_folder import is_finished, unfinished_folder

WORLD = World.alone()
MADE_FROM = {"doc_files": "aa (100 records)", "base_model": "bb", "micro_batch_tokens": "60"}
TEXTS, DIMS = 200, 3


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
def small_blocks(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of them, and only a crash of the machine needs them
    for module in (corpus_plan, encode, vectors_writer):
        monkeypatch.setattr(module, "BLOCK_TEXTS", 24)
    monkeypatch.setattr(corpus_plan, "MIN_MICRO_BATCHES", 2)
    monkeypatch.setattr(encode, "GROUP_ROUNDS", 2)


def run(store, target, encoder=None, rows=None, made_from=MADE_FROM, save_seconds=0.0):
    encoder = encoder or Encoder()
    encode.encode_store(
        store,
        encoder,
        WORLD,
        micro_batch_tokens=int(made_from["micro_batch_tokens"]),
        target=target,
        name="doc",
        rows=rows,
        made_from=made_from,
        save_seconds=save_seconds,
    )
    return encoder.num_passes


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
    with pytest.raises(ValueError, match="is not finished; start the same recipes/generate.py command again"):
        read_vectors(target.parent, "doc")


def test_rows_are_right(store, straight, tmp_path):
    rows = read_vectors(tmp_path / "straight", "doc")
    assert list(rows.ids) == [f"d{i}" for i in range(TEXTS)]
    expected = [[store.tokens_of(i).sum(), len(store.tokens_of(i))] for i in range(TEXTS)]
    assert np.array_equal(rows.rows[:, :2], np.array(expected, np.float32))


def test_killed_at_any_pass(store, straight, tmp_path):
    num_passes, whole = straight
    assert num_passes > 40
    for number in [2, 3, *range(8, num_passes - 2, 8), num_passes - 1, num_passes]:
        target = tmp_path / str(number) / "test_docs"
        killed_at(store, target, number)
        (unfinished_folder(target) / ".progress.json.1.part").write_text("cut off")  # as SIGKILL leaves it
        # Passes since the last save are made again: those of one group, and the one that died.
        assert run(store, target) <= num_passes - number + 4
        assert contents(target) == whole
    target = tmp_path / "often" / "test_docs"
    for _ in range(4):
        killed_at(store, target, 12)
    run(store, target)
    assert contents(target) == whole


def test_killed_while_publishing(store, straight, tmp_path, monkeypatch):
    _, whole = straight
    for number, call in enumerate(["rename", "fsync", "replace", "pwrite", "unlink"] * 2):
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
        if not is_finished(target, "doc", MADE_FROM, []):
            run(store, target, save_seconds=1e9)
        assert contents(target) == whole and os.listdir(target.parent) == ["test_docs"], (call, number)


@pytest.mark.parametrize("loss", ["cut", "zero tail", "bit", "no rows", "no header"])
def test_saved_rows_that_got_lost_are_encoded_again(store, straight, tmp_path, caplog, loss):
    _, whole = straight
    target = tmp_path / "out" / "test_docs"
    killed_at(store, target, 30)
    path = unfinished_folder(target) / "doc.npy"
    content = bytearray(path.read_bytes())
    # The rows of the last save, not just the end of the file: they are scattered in their block.
    last = json.loads((path.parent / "progress.json").read_text())["saves"][-1]
    plan = corpus_plan.CorpusPlan(store, range(TEXTS), 60)
    texts = np.concatenate([b.texts for b in plan.batches(*(corpus_plan.Position(*last[n]) for n in ("start", "end")))])
    start, end = 128 + int(texts[0]) * 4 * DIMS, 128 + (int(texts[0]) + 1) * 4 * DIMS
    if loss == "cut":
        del content[start:]
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
    assert "the rows saved last are not as they were written" in caplog.text


def test_the_word_follows_the_rows(store, tmp_path, monkeypatch):
    """A crash of the machine can't be had here: so the order of the calls that make it harmless."""
    events = []
    for module, name in ((os, "pwrite"), (os, "fsync"), (vectors_writer, "write_json")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: (events.append((name, a)), real(*a))[1])
    run(store, tmp_path / "test_docs")
    dirty, num_saves = False, 0
    rows_file = next(arguments[0] for name, arguments in events if name == "pwrite")
    for name, arguments in events:
        if name == "pwrite":
            dirty = True
        elif name == "fsync" and arguments[0] == rows_file:
            dirty = False
        elif name == "write_json":
            assert not dirty
            num_saves += 1
    assert num_saves > 10


def test_saves_are_few_and_small(store, tmp_path):
    target = tmp_path / "test_docs"
    killed_at(store, target, 40, save_seconds=1e9)
    assert not (unfinished_folder(target) / "progress.json").exists()
    killed_at(store, target, 40)
    assert len(json.loads((unfinished_folder(target) / "progress.json").read_text())["saves"]) == 8


def test_other_inputs_are_refused(store, straight, tmp_path):
    target = tmp_path / "out" / "test_docs"
    killed_at(store, target, 30)
    for path in (unfinished_folder(target), tmp_path / "straight" / "test_docs"):
        whole = path.with_name("test_docs")
        with pytest.raises(ValueError) as caught:
            is_finished(whole, "doc", MADE_FROM | {"doc_files": "cc (100 records)"}, ["micro_batch_tokens"])
        assert f"{path} was made from something else: doc_files was aa (100 records) and is cc" in str(caught.value)
        assert f"remove {path} to encode again, or choose another --output_prefix" in str(caught.value)
        assert "accept_changes" not in str(caught.value)
    with pytest.raises(ValueError, match="micro_batch_tokens was 60 and is 40.*--accept_changes micro_batch_tokens"):
        is_finished(target, "doc", MADE_FROM | {"micro_batch_tokens": "40"}, [])
    assert is_finished(tmp_path / "straight" / "test_docs", "doc", MADE_FROM, [])
    (tmp_path / "straight" / "test_docs" / "doc.ids").write_bytes(b"")
    with pytest.raises(ValueError, match="doc.ids: has 0 bytes and was written with 890; remove"):
        is_finished(tmp_path / "straight" / "test_docs", "doc", MADE_FROM, [])


def test_another_micro_batch_goes_on_at_a_block(store, straight, tmp_path, caplog):
    num_passes, whole = straight
    other = MADE_FROM | {"micro_batch_tokens": "90"}
    target = tmp_path / "out" / "test_docs"
    killed_at(store, target, num_passes - 13)
    assert not is_finished(target, "doc", other, ["micro_batch_tokens"])
    killed_at(store, target, 9, made_from=other, save_seconds=1e9)  # some rows written, none saved
    killed_at(store, target, 5, made_from=other)
    run(store, target, made_from=other)
    old, new = (
        np.frombuffer(files["doc.npy"][128:], np.float32).reshape(TEXTS, DIMS) for files in (whole, contents(target))
    )
    assert np.array_equal(old[:, :2], new[:, :2])
    assert "not as they were written" not in caplog.text
    changed = np.flatnonzero((old != new).any(axis=1))
    assert len(changed) and changed.min() >= 120  # whole blocks of 24 before it stay


def test_full_disk_keeps_what_was_saved(store, straight, tmp_path):
    _, whole = straight
    target = tmp_path / "out" / "test_docs"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 60 * 4 * DIMS, hard))
    try:
        with pytest.raises(UserError, match=r"could not be written \(File too large; .*4\d of 200 rows are kept"):
            run(store, target, made_from={"micro_batch_tokens": "60"})
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
    rows = [rows_of_shard(TEXTS, index, num_shards) for index in range(num_shards)]
    assert [row for part in rows for row in part] == list(range(TEXTS))
    for index in reversed(range(num_shards)):
        with pytest.raises(ValueError, match=f"{index + 1} of {num_shards} shards of .* are missing or unfinished"):
            shards.merge_shards(target, "doc", store, num_shards, MADE_FROM, [])
        part = shards.shard_folder(target.parent, index, num_shards) / "test_docs"
        if len(rows[index]) > 12:
            killed_at(store, part, 5, rows=rows[index])
        run(store, part, rows=rows[index])
    with pytest.raises(ValueError, match="was made from something else: base_model was bb and is cc"):
        shards.merge_shards(target, "doc", store, num_shards, MADE_FROM | {"base_model": "cc"}, [])
    shards.merge_shards(target, "doc", store, num_shards, MADE_FROM, [])
    assert contents(target) == whole
    parts = [shards.shard_folder(target.parent, index, num_shards) / "test_docs" for index in range(num_shards)]
    assert b"".join((part / "doc.ids").read_bytes() for part in parts) == whole["doc.ids"]
    with open(part / "doc.npy", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="doc.npy: has .* bytes and was written with"):
        shards.merge_shards(target, "doc", store, num_shards, MADE_FROM, [])
