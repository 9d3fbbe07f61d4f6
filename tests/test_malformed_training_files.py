"""Malformed training files: each is one error with file and record, or a counted warning where skipping was asked for."""

import json
import logging
import random

import pytest
from store_material import build, tokenizer, write_jsonl  # noqa: F401

from ds_embed.data import store_conflicts
from ds_embed.data.store import TrainingStore
from ds_embed.data.tally import describe_skipped
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.settings import DataArguments, StepArguments, parse_arguments
from ds_embed.training.prepare import prepare_store

GOOD = [
    {"query": f"how deep {i}", "pos_doc": f"so deep {i}", "neg_doc": ["c d"], "query_id": f"q{i}", "doc_id": f"d{i}"}
    for i in range(4)
]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def good_but(**changes):
    """Two good records, then one with these changes, then a good one."""
    return lines(*GOOD[:2], GOOD[2] | changes, GOOD[3])


# name: (content, place and words of the error, reason when skipped)
BAD = {
    "wrong type": (good_but(query=7), ":3: query is a number, expected a string", "query is a number"),
    "no object": (lines(*GOOD[:2], ["a", "b"], GOOD[3]), ":3: found a list, expected a JSON object", "found a list"),
    "mixed types": (good_but(neg_doc=["a", 5]), ":3: neg_doc[1] is a number, expected a string", "neg_doc is a number"),
    "half a number as id": (
        good_but(doc_id=2.5),
        ":3: doc_id is a number, expected a whole number",
        "doc_id is a number",
    ),
    "not JSON": (lines(*GOOD[:2]) + b'{"query": "a", \n' + lines(GOOD[3]), ":3: not JSON (", "not JSON"),
    "invalid UTF-8": (
        lines(*GOOD[:2]) + b'{"query": "a\xff", "pos_doc": "b"}\n' + lines(GOOD[3]),
        ":3: not UTF-8 (",
        "not UTF-8",
    ),
    "empty text": (good_but(pos_doc=" \n"), ":3: pos_doc is blank; remove", "pos_doc is blank"),
    "empty negative": (good_but(neg_doc=["a", ""]), ":3: neg_doc[1] is blank; remove", "neg_doc is blank"),
    "negative is the positive": (
        good_but(neg_doc=["a", "so deep 2"]),
        ":3: neg_doc[1] is the text of pos_doc",
        "neg_doc is the text of pos_doc",
    ),
    "doc_id of two texts": (
        good_but(doc_id="d1"),
        ":3: doc_id names another pos_doc than at {}:2; give",
        "doc_id names another pos_doc",
    ),
    "query_id of two texts": (
        good_but(query_id="q0"),
        ":3: query_id names another query than at {}:1; give",
        "query_id names another query",
    ),
    "scores of another number": (
        good_but(neg_scores=[1, 2]),
        ":3: neg_scores has 2 numbers and neg_doc 1 texts",
        "neg_scores has N numbers and neg_doc N texts",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_an_error_or_a_counted_warning(name, tmp_path, tokenizer):
    content, message, reason = BAD[name]
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        build([path], tokenizer, tmp_path / "cache")
    assert str(caught.value).startswith(f"{path}{message.format(path)}")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]

    store = TrainingStore.open(build([path], tokenizer, tmp_path / "cache", skip_bad_records=True))
    assert [store.location(record) for record in range(3)] == [f"{path}:{line}" for line in (1, 2, 4)]
    assert store.manifest["skipped_records"] == {reason: {"number": 1, "first": [f"{path}:3"]}}
    assert describe_skipped(store.manifest["skipped_records"]) == [f"1 skipped: {reason} (at {path}:3)"]
    good = TrainingStore.open(
        build(write_jsonl(tmp_path / "good", [*GOOD[:2], GOOD[3]]), tokenizer, tmp_path / "cache")
    )
    for array in ("tokens", "offsets", "text_keys", "first_text"):
        assert (getattr(store, array) == getattr(good, array)).all()
    assert "skipped_records" not in good.manifest


def test_files_that_look_odd_and_are_good(tmp_path, tokenizer):
    long = {"query": "q", "pos_doc": "deep lake " * 10_000, "page": "x" * 10_000_000}  # a line of 10 MB
    path, plain = tmp_path / "odd.jsonl", write_jsonl(tmp_path / "plain.jsonl", [*GOOD, long])
    path.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    odd, store = (TrainingStore.open(build([name], tokenizer, tmp_path / "cache")) for name in (path, plain))
    assert odd.num_records == store.num_records == 5
    assert (odd.tokens == store.tokens).all() and (odd.text_keys == store.text_keys).all()
    path.write_bytes(lines(GOOD[0]) + json.dumps(long).encode()[:-3])
    with pytest.raises(ValueError, match="odd.jsonl:2: not JSON") as caught:
        build([path], tokenizer, tmp_path / "cache")
    assert len(str(caught.value)) < 500


def test_an_array_cut_short_is_an_error_even_when_skipping(tmp_path, tokenizer):
    path = tmp_path / "train.json"
    path.write_text(json.dumps(GOOD)[:-10])
    for skip in (False, True):
        with pytest.raises(ValueError, match="train.json:record 4: the file ends before the array is closed"):
            build([path], tokenizer, tmp_path / "cache", skip_bad_records=skip)
    path.write_text(json.dumps([GOOD[0], 7, GOOD[1]]))
    store = TrainingStore.open(build([path], tokenizer, tmp_path / "cache", skip_bad_records=True))
    assert store.num_records == 2 and store.location(1) == f"{path}:record 3"


def test_skipping_counts_by_reason_and_needs_a_record_that_is_left(tmp_path, tokenizer):
    bad = [{"query": "a", "pos_doc": "b", "neg_doc": ["x"] * i + [""]} for i in range(5)]
    path = write_jsonl(tmp_path / "a.jsonl", [*bad, GOOD[0], {"query": ""}])
    other = write_jsonl(tmp_path / "b.jsonl", [GOOD[1], GOOD[0] | {"pos_doc": "not the d0 of the other file"}])
    store = TrainingStore.open(build([path, other], tokenizer, tmp_path / "cache", skip_bad_records=True))
    assert store.file_sizes == (1, 2)
    assert describe_skipped(store.manifest["skipped_records"]) == [
        f"5 skipped: neg_doc is blank (at {path}:1, {path}:2, {path}:3, ...)",
        f"1 skipped: pos_doc is missing (at {path}:7)",
    ]
    write_jsonl(path, bad)
    with pytest.raises(ValueError, match=r"a.jsonl: holds no record that can be used; the last one: .*a.jsonl:5: neg_"):
        build([path], tokenizer, tmp_path / "cache", skip_bad_records=True)


@pytest.mark.parametrize("rows_at_once", [3, 1 << 21])
def test_conflicts_of_ids_are_those_of_a_dictionary(tmp_path, tokenizer, monkeypatch, rows_at_once):
    monkeypatch.setattr(store_conflicts, "_ROWS_AT_ONCE", rows_at_once)
    rng = random.Random(1)
    paths, kept = [], []
    for name in ("a", "b"):
        records, texts = [], {}
        for _ in range(60):
            record = {"query": f"q {rng.randrange(9)}", "pos_doc": f"p {rng.randrange(9)}"}
            record |= {key: f"{key} {rng.randrange(12)}" for key in ("query_id", "doc_id") if rng.random() < 0.7}
            records.append(record)
        for record in records:  # the first text of each id counts, dropped with its record or not
            pairs = [(key, text) for key, text in (("query_id", "query"), ("doc_id", "pos_doc")) if key in record]
            same = [texts.setdefault((key, record[key]), record[text]) == record[text] for key, text in pairs]
            kept += [all(same)]
        paths.append(write_jsonl(tmp_path / name, records))
    store = TrainingStore.open(build(paths, tokenizer, tmp_path / "cache", skip_bad_records=True))
    expected = [f"{paths[i // 60]}:{i % 60 + 1}" for i in range(120) if kept[i]]
    assert [store.location(record) for record in range(store.num_records)] == expected
    assert 20 < len(expected) < 100
    with pytest.raises(ValueError, match="names another"):
        build(paths[1:], tokenizer, tmp_path / "cache")


def test_the_flag_reaches_the_store_and_every_run_is_told(tmp_path, tokenizer, caplog):
    path = tmp_path / "train.jsonl"
    path.write_bytes(good_but(query=" "))
    flags = ["--train_files", str(path), "--cache_dir", str(tmp_path / "cache")]
    card = EmbeddingCard("last", "", "", 16, 16, append_eos=True, base_model="none", consumed_samples=0)
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=None, store=None)

    def prepare(*more):
        (data,) = parse_arguments(DataArguments, argv=[*flags, *more])
        return prepare_store(world, data.train_files, data, StepArguments(), tokenizer, card.text_formats())

    with pytest.raises(ValueError, match="train.jsonl:3: query is blank"):
        prepare()
    for _ in range(2):  # the second run reuses the store
        caplog.clear()
        assert prepare("--skip_bad_records", "true").num_records == 3
        warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
        assert warnings == [f"training data: 1 skipped: query is blank (at {path}:3)"]
    with pytest.raises(ValueError, match="train.jsonl:3: query is blank"):
        prepare()  # the store that skipped is not taken for one that did not
