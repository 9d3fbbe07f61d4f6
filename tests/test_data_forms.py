"""What another framework trains on, trains here: every form and container gives the store of our own form."""

import functools
import json
import os
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_forms import OWN, jsonl, write_containers, write_forms
from mining_material import run
from store_material import make_tokenizer

from ds_embed.data.forms import Reading, TrainingFile, parse_training_record, read_training_records
from ds_embed.data.store import TrainingStore, build_text_store, build_training_store
from ds_embed.data.tokenize import TextFormat, encode_texts
from ds_embed.settings import DataArguments, StepArguments
from ds_embed.settings.errors import UserError
from ds_embed.training.prepare import sample_order

FORMAT = TextFormat("", 32, True)
ARRAYS = ("tokens", "offsets", "first_text", "text_keys")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def build(entry, tokenizer, cache, columns=(), corpus_files=(), **more):
    reading = Reading(tuple(columns), tuple(corpus_files))
    entries = entry if isinstance(entry, list) else [entry]
    return TrainingStore.open(
        build_training_store(entries, tokenizer, FORMAT, FORMAT, None, cache, reading=reading, **more)
    )


@pytest.fixture(scope="module")
def own(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("own")
    return build(str(jsonl(folder / "own.jsonl", OWN)), tokenizer, folder / "cache")


def assert_same(store, own):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(store, name), getattr(own, name), err_msg=name)


def test_every_form_gives_the_store_of_our_own(tmp_path, tokenizer, own):
    for name, (entry, settings) in write_forms(tmp_path).items():
        store = build(entry, tokenizer, tmp_path / "cache", **settings)
        try:
            assert_same(store, own)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        read = store.manifest["files"][0]["read"]
        form = next(
            form
            for start, form in {
                "own": "our own",
                "automodel_lists": "our own",
                "automodel": "Automodel",
                "flag": "FlagEmbedding",
                "gritlm": "FlagEmbedding",
                "tevatron": "Tevatron",
                "ms_swift": "ms-swift",
                "f2llm": "F2LLM",
                "columns": "mapped (query=ask pos_doc=good neg_doc=bad,worse)",
                "in_order": "mapped (query=a pos_doc=b neg_doc=c,d, by the order of the columns, named in line 1)",
                "": "sentence-transformers",
            }.items()
            if name.startswith(start)
        )
        assert read == f"{form} records, 4", name
    # The scores of FlagEmbedding's teacher, and Tevatron's ids, are kept.
    scored = build(str(tmp_path / "flag_embedding_scored.jsonl"), tokenizer, tmp_path / "cache")
    np.testing.assert_array_equal(scored.scores[:4], np.float32([np.nan, 1, 0.5, 0.25]))
    for name, settings in (
        ("tevatron1", Reading()),
        ("tevatron2", Reading((), (str(tmp_path / "tevatron_corpus.jsonl"),))),
    ):
        samples = [sample for _, sample in read_training_records([tmp_path / f"{name}.jsonl"], settings)]
        assert [(s.query_id, s.doc_id) for s in samples] == [(str(i), str(10 * i)) for i in range(4)]


def test_every_container_gives_the_same_store(tmp_path, tokenizer, own, monkeypatch):
    containers = write_containers(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    jsonl(tmp_path / "hub" / "train.jsonl", OWN)
    containers |= {"named": "hub:train", "named_config": "hub:default:train"}
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://forms/a.jsonl.gz", "wb") as file:
        file.write((tmp_path / "lines.jsonl.gz").read_bytes())
    containers |= {"url": "memory://forms/a.jsonl.gz", "url_pattern": "memory://forms/*.gz"}
    for name, entry in containers.items():
        store = build(entry, tokenizer, tmp_path / "cache")
        for array in ARRAYS:
            np.testing.assert_array_equal(getattr(store, array), getattr(own, array), err_msg=name)
        reused = build(entry, tokenizer, tmp_path / "cache")
        assert reused.path == store.path, name
    places = {
        "array.json": "array.json:record 3",
        "lines.jsonl.gz": "lines.jsonl.gz:3",
        "table.csv": "table.csv:4",
        "table.parquet": "table.parquet:row 3",
        "folder": "shards/2.parquet:row 1",
        "saved_split": "saved_splits:train:row 3",
    }
    for name, place in places.items():
        assert build(containers[name], tokenizer, tmp_path / "cache").location(2) == f"{tmp_path}/{place}"


def test_a_changed_part_gives_another_store(tmp_path, tokenizer):
    entry = write_containers(tmp_path)["folder"]
    first = build(entry, tokenizer, tmp_path / "cache")
    jsonl(tmp_path / "shards" / "3.jsonl", OWN[:1])
    second = build(entry, tokenizer, tmp_path / "cache")
    assert (first.num_records, second.num_records) == (4, 5)
    assert second.file_sizes == (5,)  # a folder is one file to sampling_probabilities and prefixes


SEVERAL = [
    {"query": "w1", "pos": ["w2", "w3 w4", "w5"], "neg": ["w6", "w7"], "pos_scores": [1, 2, 3], "neg_scores": [0, 0]},
    {"query": "w8", "pos": ["w9"], "neg": []},
    {"query": "w10", "pos": ["w11", "w12"], "neg": None},
]


def test_several_positives_are_samples_of_one_query(tmp_path, tokenizer):
    path = str(jsonl(tmp_path / "a.jsonl", SEVERAL))
    samples = [sample for _, sample in read_training_records([path])]
    assert [(s.query, s.pos_doc, s.neg_docs, s.pos_score) for s in samples] == [
        ("w1", "w2", ("w6", "w7"), 1),
        ("w1", "w3 w4", ("w6", "w7"), 2),
        ("w1", "w5", ("w6", "w7"), 3),
        ("w8", "w9", (), None),
        ("w10", "w11", (), None),
        ("w10", "w12", (), None),
    ]
    file = TrainingFile(path)
    assert len(list(file.read())) == 3
    assert file.facts()["read"] == "FlagEmbedding records, 3 with 1 to 3 positives"
    store = build(path, tokenizer, tmp_path / "cache")
    assert store.lines.tolist() == [1, 1, 1, 2, 3, 3]
    own = [
        {"query": row["query"], "pos_doc": positive, "neg_doc": row["neg"]}
        for row in SEVERAL
        for positive in row["pos"]
    ]
    apart = build(str(jsonl(tmp_path / "own.jsonl", own)), tokenizer, tmp_path / "cache")
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(store, name), getattr(apart, name))


def test_random_positives_are_one_of_each_row_in_every_pass(tmp_path, tokenizer):
    files = [str(jsonl(tmp_path / "a.jsonl", SEVERAL)), str(jsonl(tmp_path / "b.jsonl", SEVERAL[:1]))]
    store = build(files, tokenizer, tmp_path / "cache")
    rows, sizes = store.rows()
    assert (rows.tolist(), sizes) == ([0, 3, 4, 6, 9], (3, 1))
    step = StepArguments(global_batch_size=1)
    drawn = []
    for options in ({}, {"sampling_probabilities": [1, 1]}, {"batching": "homogeneous"}):
        order = sample_order(store, DataArguments(train_files=files, positives="random", **options), step, seed=7)
        assert order.samples_per_pass == 4
        records = order.records(0, 1200)
        # A sample's record is the same whatever batches it is asked for in.
        np.testing.assert_array_equal(np.concatenate([order.records(0, 13), order.records(13, 1187)]), records)
        assert set(records.tolist()) == set(range(9))
        drawn.append(records)
    passes = np.searchsorted(rows, drawn[0].reshape(-1, 4), side="right") - 1
    assert (np.sort(passes, axis=1) == np.arange(4)).all()
    for row in (0, 3):  # each of the three positives about equally often
        counts = np.bincount(drawn[0][(drawn[0] >= rows[row]) & (drawn[0] < rows[row + 1])] - rows[row])
        assert counts.sum() == 300 and abs(counts - 100).max() < 30
    with pytest.raises(UserError, match="--hard_negatives_sampling random: has no effect without --hard_negatives 1"):
        sample_order(store, DataArguments(train_files=files, hard_negatives_sampling="random"), step, seed=7)
    other = sample_order(store, DataArguments(train_files=files, positives="random"), step, seed=8)
    assert (other.records(0, 1200) != drawn[0]).any()
    every = sample_order(store, DataArguments(train_files=files), step, seed=7)
    assert every.samples_per_pass == 9


def test_instructions_and_titles_are_joined_as_their_makers_do(tmp_path):
    def read(row, **settings):
        path = jsonl(tmp_path / "a.jsonl", [row])
        (_, sample), *_ = read_training_records([path], Reading(**settings))
        return sample

    for key in ("prompt", "instruction"):
        for row in (
            {"query": "q", "pos": ["p"], "neg": ["n"]},
            OURS,
            ST,
            {"query_id": 1, "query": "q", "positive_passages": [{"docid": 1, "title": "", "text": "p"}]},
            SWIFT,
        ):
            sample = read(row | {key: "Find: "})
            assert (sample.query, sample.prompt) == ("Find: q", "Find: ")
            assert parse_training_record("f:1", sample.as_json()) == [sample]
            assert (sample.as_json()["query"], sample.as_json()["prompt"]) == ("q", "Find: ")
            assert read(row | {key: ""}) == read(row | {key: None}) == read(row)
    sample = read({"ask": "q", "good": "p", "task": "Find: "}, columns=("query=ask", "pos_doc=good", "prompt=task"))
    assert (sample.query, sample.prompt) == ("Find: q", "Find: ")
    sample = read({"query": ["Find", "q"], "pos": [["", "p"]], "neg": [["Doc", "n"]]})
    assert (sample.query, sample.pos_doc, sample.neg_docs) == ("Find\nq", "p", ("Doc\nn",))
    passage = {"docid": 7, "title": "T", "text": "p"}
    sample = read({"query_id": 1, "query": "q", "positive_passages": [passage], "negative_passages": []})
    assert (sample.pos_doc, sample.query_id, sample.doc_id) == ("T p", "1", "7")
    assert read({"query": "q", "pos_doc": {"title": "T", "text": "p"}}).pos_doc == "p"  # Automodel takes the text


def test_keys_of_later_rows_count(tmp_path):
    rows = [{"query": "q1", "pos_doc": "d one"}, {"query": "q2", "pos_doc": "d two", "neg_doc": ["n1", "n2"]}]
    for entry, settings in (
        (jsonl(tmp_path / "a.jsonl", rows), {}),
        (jsonl(tmp_path / "b.jsonl", rows), {"columns": ("neg_doc=neg_doc",)}),
        (
            jsonl(
                tmp_path / "c.jsonl", [{"q": "q1", "p": "d one"}, {"q": "q2", "p": "d two", "negative": ["n1", "n2"]}]
            ),
            {"columns": ("query=q", "pos_doc=p", "neg_doc=negative")},
        ),
        (
            jsonl(
                tmp_path / "d.jsonl",
                [
                    {"anchor": "q1", "positive": "d one"},
                    {"anchor": "q2", "positive": "d two", "negative_1": "n1", "negative_2": "n2"},
                ],
            ),
            {},
        ),
    ):
        negatives = [sample.neg_docs for _, sample in read_training_records([entry], Reading(**settings))]
        assert negatives == [(), ("n1", "n2")]


FE, TV = {"query": "q", "pos": ["p"], "neg": []}, {"query": "q", "positive_passages": [{"docid": "1", "text": "p"}]}
ST, OURS = {"anchor": "q", "positive": "p"}, {"query": "q", "pos_doc": "p"}
IDS = {"query_id": 1, "query_text": "q", "positive_document_ids": ["1"], "negative_document_ids": []}
SWIFT = {"messages": [{"role": "user", "content": "q"}], "positive_messages": [[{"role": "user", "content": "p"}]]}
BAD = [
    (OURS, FE, ":2: a record of FlagEmbedding, and those before it are our own"),
    (FE, OURS, ":2: a record of our own, and those before it are FlagEmbedding"),
    (TV, ST, ":2: a record of sentence-transformers, and those before it are Tevatron"),
    (FE, {"query": "q", "pos": []}, ":2: pos is empty, expected at least one document"),
    (FE, {"query": "q", "pos": ["p", ""]}, ":2: pos[1] is blank"),
    (FE, {"query": "q", "pos": ["p", 7]}, ":2: pos[1] is a number, expected a string"),
    (FE, {"query": "q", "pos": {"p": 1}}, ":2: pos.text is null, expected a string"),
    (FE, {"query": "q", "pos": ["p"], "neg": ["p"]}, ":2: neg[0] is the text of pos"),
    (FE, {"query": "q", "pos": ["p"], "pos_scores": [1, 2]}, ":2: pos_scores has 2 values and pos 1 texts"),
    (FE, {"query": "q", "pos": ["p"], "pos_scores": ["1"]}, ":2: pos_scores is a string, expected a finite number"),
    (FE, {"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": []}, ":2: neg_scores has 0 numbers and neg 1 texts"),
    (FE, {"query": "q", "pos": ["p"], "prompt": 3}, ":2: prompt is a number, expected a string"),
    (FE, FE | {"prompt": " \n"}, ":2: prompt is blank"),
    (OURS, OURS | {"prompt": ["a"]}, ":2: prompt is a list, expected a string"),
    (OURS, OURS | {"instruction": 1}, ":2: instruction is a number, expected a string"),
    (
        OURS,
        OURS | {"prompt": "a ", "instruction": "b "},
        ":2: prompt and instruction could both be in front of the query",
    ),
    (FE, {"query": ["a", "b", "c"], "pos": ["p"]}, ":2: query is a list, expected a string, or [instruction, text]"),
    (FE, {"query": None, "pos": ["p"]}, ":2: query is null, expected a string"),
    (FE, {"question": "q"}, ":2: query is missing, expected a string; the keys here are 'question'"),
    (TV, {"query": "q", "positive_passages": "p"}, ":2: positive_passages is a string, expected a list of objects"),
    (TV, {"query": "q", "positive_passages": None}, ":2: positive_passages is empty"),
    (TV, {"query": "q", "positive_passages": [{"docid": "1"}]}, ":2: positive_passages[0].text is null"),
    (TV, {"query": "q", "positive_passages": [{"title": 1, "text": "p"}]}, ":2: title is a number"),
    (
        TV,
        {"query": "q", "positive_passages": [{"docid": 1.5, "text": "p"}]},
        ":2: docid is a number, expected a whole number",
    ),
    (TV, TV | {"query_id": True}, ":2: query_id is a boolean"),
    (OURS, {"query": "q", "pos_doc": [{"text": "p"}, 3]}, ":2: pos_doc[1] is a number, expected a string"),
    (ST, {"anchor": "q", "positive": None}, ":2: positive is null, expected a string"),
    (ST, {"anchor": "q", "positive": "p", "answer": "a"}, ":2: positive and answer could both be the right document"),
    (ST, ST | {"score": 0.4}, ":2: score is not 1: a graded pair is no pair of a query and its right document"),
    (ST, ST | {"label": 0}, ":2: label is not 1"),
    (ST, ST | {"negative": "n", "label": 3.5}, ":2: label is not 1: .*write the scores of a teacher as a list"),
    (ST, ST | {"label": [1.0]}, ":2: label has 1 numbers beside 1 positives and 0 negatives; expected a teacher's"),
    (ST, ST | {"negative": "n", "score": [3, 2, 1]}, ":2: score has 3 numbers beside 1 positives and 1 negatives"),
    (ST, ST | {"negative": "n", "score": [3, "2"]}, r":2: score\[1\] is a string, expected a finite number"),
    # Whose margin is it?
    (
        ST,
        ST | {"negative_1": "n", "negative_2": None, "label": [2, 3]},
        ":2: label has 2 numbers .* none of them empty",
    ),
    (ST, ST | {"negative_2": "n", "negative_1": "m", "label": [2, 3]}, ":2: label has 2 numbers .* the order of their"),
    (ST, ST | {"negative": 5}, ":2: negative[0] is a number, expected a string"),
    (SWIFT, SWIFT | {"messages": []}, ":2: messages holds 0 messages; expected one"),
    (SWIFT, SWIFT | {"messages": SWIFT["messages"] * 2}, ":2: messages holds 2 messages; expected one"),
    (SWIFT, SWIFT | {"positive_messages": [{"role": "user"}]}, ":2: positive_messages is no list of lists"),
    (SWIFT, SWIFT | {"positive_messages": [[{"role": "user"}]]}, ":2: content is missing, expected a string"),
    (SWIFT, SWIFT | {"label": 0.5}, ":2: label is not 1"),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD, ids=range(len(BAD)))
def test_bad_records_of_other_forms(tmp_path, tokenizer, good, bad, message):
    path = jsonl(tmp_path / "a.jsonl", [good, bad, good])
    with pytest.raises(UserError) as caught:
        build(str(path), tokenizer, tmp_path / "cache")
    text = str(caught.value)
    exact = message if ".*" in message or "\\" in message else re.escape(message)
    assert re.match(re.escape(str(path)) + exact, text) and "\n" not in text
    assert not list((tmp_path / "cache").glob("training-*")) and not list((tmp_path / "cache").glob(".building*"))
    store = build(str(path), tokenizer, tmp_path / "cache", skip_bad_records=True)
    assert store.num_records == 2
    assert [entry["number"] for entry in store.manifest["skipped_records"].values()] == [1]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_scores_of_a_table_are_numbers(tmp_path, tokenizer, suffix):
    def table(header, *rows):
        path = tmp_path / f"a.{suffix}"
        lines = (line.replace(",", "\t") if suffix == "tsv" else line for line in (header, *rows))
        path.write_text("".join(f"{line}\n" for line in lines))
        return str(path)

    def scores(path, **settings):
        return [(record.pos_score, record.neg_scores) for _, record in read_training_records([path], **settings)]

    header = "query,pos_doc,neg_doc,pos_score,neg_scores"
    assert scores(table(header, "w1,w2,w3,0.75,-1e-2", "w1,w4,w3,2,")) == [(0.75, (-0.01,)), (2.0, None)]
    columns = ("query=q", "pos_doc=p", "neg_doc=n,m", "pos_score=s", "neg_scores=a,b")
    path = table("q,p,n,m,s,a,b", "w1,w2,w3,w4,7,1.5,-2", "w1,w4,w3,,7,1.5,")
    assert scores(path, reading=Reading(columns)) == [(7.0, (1.5, -2.0)), (7.0, (1.5,))]
    for cells, message in (
        ("x,1", "pos_score is 'x', expected a finite number"),
        ("nan,1", "pos_score is a number, expected a finite number"),
        ("1,0;5", "neg_scores is '0;5', expected a finite number"),
        ("1,inf", r"neg_scores\[0\] is a number, expected a finite number"),
    ):
        with pytest.raises(UserError, match=f"a.{suffix}:3: {message}"):
            scores(table(header, "w1,w2,w3,1,2", f"w1,w2,w3,{cells}"))
    jsonl(tmp_path / "a.jsonl", [{"query": "w1", "pos_doc": "w2", "pos_score": "1"}])  # says that it is a text
    with pytest.raises(UserError, match="a.jsonl:1: pos_score is a string, expected a finite number"):
        scores(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("separator", [";", "\t", ","])
def test_a_csv_is_split_where_its_header_is(tmp_path, separator):
    lines = [["Frage", '"Antwort, kurz"'], ["Größe?", '"1,5 m; ""so"" etwa"'], ["x", "y"]]
    (tmp_path / "a.csv").write_text("\ufeff" + "".join(separator.join(line) + "\n" for line in lines), "utf-8")
    reading = Reading(("in_order",))
    records = [record for _, record in read_training_records([str(tmp_path / "a.csv")], reading=reading)]
    assert [(record.query, record.pos_doc) for record in records] == [("Größe?", '1,5 m; "so" etwa'), ("x", "y")]


FILES = [
    ("a.parquet", b"PAR1" + b"x" * 50, {}, "a.parquet: not a whole Parquet file"),
    ("a.jsonl.gz", b"\x1f\x8b\x08\x00garbage", {}, "a.jsonl.gz: its gzip data is cut short or damaged"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfdgarbage", {}, "a.jsonl.zst: its zstd data is cut short or damaged"),
    ("a.jsonl.xz", b"\xfd7zXZ\x00garbage", {}, "a.jsonl.xz: its xz data is cut short or damaged"),
    ("a.csv", b"anchor,positive\nx\n", {}, "a.csv:2: 1 columns, and the header has 2"),
    ("a.csv", b'anchor,positive\nx,"y\n', {}, "a.csv:2: not CSV"),
    ("a.tsv", b"anchor\tpositive\n\xff\ty\n", {}, "a.tsv:2: not UTF-8 text"),
    ("a.csv", b"a,a\n1,2\n", {}, "a.csv: has two columns named 'a'"),
    ("a.csv", "anchor,positive\nx,y\n".encode("utf-16-le"), {}, "a.csv: is not UTF-8 text"),
    ("a.zip", b"PK\x03\x04\x14\0\0\0", {}, "a.zip: is not UTF-8 text"),
    (
        "a.csv",
        b"anchor,positive\rx,y\r",
        {},
        "a.csv:1: not CSV (new-line character seen in unquoted field); end lines in",
    ),
    (
        "a.csv",
        b"query,pos,neg\nq,p,\"['n', 'm']\"\n",
        {},
        "a.csv:2: neg looks like a list and is no JSON; write a column",
    ),
    (
        "a.csv",
        b"a\nx\n",
        {"columns": ["in_order"]},
        "a.csv:2: --columns in_order: expected two columns of texts or more, found 'a'",
    ),
    (
        "a.csv",
        b"what is a lake,A lake is water.\nx,y\n",
        {"columns": ["in_order"]},
        "a.csv:2: --columns in_order: the first line must hold the names of the columns, and 'A lake is water.' seems to be",
    ),
    (
        "a.csv",
        b"query,pos_doc\na,b\nquery,pos_doc\nc,d\n",
        {},
        "a.csv:3: is the header again, of a file that was joined",
    ),
    ("a.tsv", b"a\tb\nc\td\n\xef\xbb\xbfa\tb\n", {"columns": ["in_order"]}, "a.tsv:3: is the header again"),
    ("a.csv", b"a,b,label\nx,y,1\nx,z,0\n", {"columns": ["in_order"]}, "a.csv:3: label is not 1: a graded pair is no"),
    ("a.csv", b"query,pos_doc,label\nx,y,0\n", {}, "a.csv:2: label is not 1: a graded pair is no pair"),
    ("a.csv", b"query,pos_doc\nq,\"['n', 'm']\"\n", {}, "a.csv:2: pos_doc looks like a list and is no JSON"),
    ("a.tsv", b'query\tpos_doc\nq\t"say ""so"""\n', {}, "a.tsv:2: a cell is quoted as CSV is ("),
    (
        "a.jsonl",
        b'{"query": ["find", "q"], "pos": ["read", "p"], "neg": [["read", "n"]]}',
        {},
        "a.jsonl:1: pos is a list of two strings beside a query [instruction, text]; write it as [[instruction, text]]",
    ),
    (
        "a.jsonl",
        b'{"query": "q", "pos_doc": "p", "doc_id": 9007199254740993.0}',
        {},
        "a.jsonl:1: doc_id is 9007199254740992.0, which is too large to be exact; write it as a string",
    ),
    (
        "a.jsonl",
        b'{"query": "q", "pos_doc": "p", "x": NaN}',
        {},
        "a.jsonl:1: not JSON (NaN is no number there; leave such a value out, character 37",
    ),
    ("a.csv", b"a,b\n1,2\n", {}, "a.csv:2: query is missing, expected a string; the keys here are 'a', 'b'"),
    ("a.csv", b"a,b\n", {"columns": ["in_order"]}, "a.csv: holds no record"),
    ("a.jsonl", b'{"a": "b"}\n', {"columns": ["in_order"]}, "a.jsonl: --columns in_order: JSON keys have no order"),
    ("a.jsonl", b'{"a": "b"}\n', {"columns": ["query=a", "pos_doc=c"]}, "a.jsonl:1: --columns pos_doc=c: there is no"),
    (
        "a.csv",
        b"Frage,Antwort\n1,2\n",
        {"columns": ["query=Frage"]},
        "a.csv:2: pos_doc is missing, expected a string; the keys here are 'Frage', 'Antwort'; if another key holds it: "
        "--columns pos_doc=KEY",
    ),
    ("a.jsonl", b'{"a": "b", "c": "d"}\n', {"columns": ["query=a", "pos_doc=c", "neg_doc=e"]}, "no record has 'e'"),
    (
        "a.jsonl",
        b"{}",
        {"columns": ["Frage=query"]},
        "--columns Frage=query (did you mean query=Frage?): expected KEY=COL",
    ),
    (
        "a.jsonl",
        b"{}",
        {"columns": ["ask=a"]},
        "--columns ask=a: expected KEY=COLUMN, where KEY is one of query, pos_doc",
    ),
    ("a.jsonl", b"{}", {"columns": ["query=a", "query=b"]}, "--columns query=b: query is given twice"),
    (
        "a.jsonl",
        json.dumps(IDS).encode(),
        {},
        "a.jsonl:1: names its documents by id; give their texts with --corpus_files",
    ),
    ("a.json", b'{"corpus": [{"path": "none"}], "data": [{}]}', {}, "none is not a folder"),
    ("a.json", b'{"corpus": [{"path": "."}], "data": [{}]}', {}, "has no merlin_metadata.json with a corpus_id"),
    ("a.json", b'{"corpus": ["none"], "data": [{}]}', {}, 'corpus holds something other than {"path": "..."}'),
    ("a.json", b'{"data": [{"query": "q", "pos_doc": "p"}, 5]}', {}, "a.json:record 2: found a number"),
    ("a.json", b'{"data": [{"query": "q", "pos_doc": "p"}', {}, "a.json:record 2: the file ends before"),
    ("a.json", b'{"data": []}', {}, "a.json: holds no record"),
]


@pytest.mark.parametrize(("name", "content", "settings", "message"), FILES, ids=range(len(FILES)))
def test_bad_files(tmp_path, tokenizer, name, content, settings, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        build(str(tmp_path / name), tokenizer, tmp_path / "cache", **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*raining-*/"))


def test_a_data_set_may_be_sliced_as_its_library_does(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(OWN)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for entry in ("me/pairs:train[:1000]", "pairs:v1.0:train[10%:20%]", "me/pairs:train[-5:]+test"):
        assert len(list(read_training_records([entry]))) == 4
    assert asked[0] == ("me/pairs", None, "train[:1000]") and asked[-1] == ("me/pairs", None, "train[-5:]+test")
    assert ("pairs", "v1.0", "train[10%:20%]") in asked


def test_columns_by_order_are_the_same_in_every_part(tmp_path):
    (tmp_path / "1.csv").write_text("a,b\nw1,w2\n")
    (tmp_path / "2.csv").write_text("w3,w4\nw5,w6\n")  # has no header
    with pytest.raises(UserError, match="2.csv:2: --columns in_order: the columns are 'w3', 'w4', and before 'a', 'b'"):
        list(read_training_records([tmp_path], Reading(("in_order",))))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "in_order.csv"])
def test_a_list_of_labels_is_a_teachers(tmp_path, name):
    """As sentence-transformers has it: the scores of MarginMSE and of the KL divergence, or the margins of MarginMSE."""
    columns = ("in_order",) if name == "in_order.csv" else ()
    for labels, scores, said in (
        ([9.5, 2, 0.5], (9.5, (2, 0.5)), "label is read as a teacher's scores"),
        ([7.5, 9], (0, (-7.5, -9)), "label is read as a teacher's margins, the positive's score minus each negative's"),
    ):
        row = {"anchor": "q", "positive": "p", "negative_1": "n", "negative_2": "m", "label": labels}
        if name == "a.jsonl":
            jsonl(tmp_path / name, [row])
        else:
            (tmp_path / name).write_text(f'{",".join(row)}\nq,p,n,m,"{labels}"\n')
        file = TrainingFile(tmp_path / name, Reading(columns))
        ((_, _, (record,)),) = file.read()
        assert (record.pos_score, record.neg_scores) == scores and record.neg_docs == ("n", "m")
        assert file.facts()["notes"][0].startswith(said)


def test_bad_entries(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_containers(tmp_path)
    datasets.DatasetDict({}).save_to_disk(tmp_path / "no_split")
    datasets.Dataset.from_dict({"query": [], "pos_doc": []}).save_to_disk(tmp_path / "no_row")
    columns = [pyarrow.array([text]) for text in "qps"]
    twice = pyarrow.Table.from_arrays(columns, names=["query", "pos_doc", "pos_doc"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for entry, message in (
        (tmp_path / "no_split", "name one of its splits: it has none"),
        (tmp_path / "no_row", "can't be loaded as a data set ("),
        (tmp_path / "twice.parquet", "has two columns named 'pos_doc'"),
        ("hf://datasets/nobody/nothing/a.jsonl", "cannot be "),
        (tmp_path / "empty", "no data file there; expected files that end in .jsonl"),
        (tmp_path / "none-*.jsonl", "no data file there"),
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path / "saved_splits", "name one of its splits: "),
        (f"{tmp_path}/saved_splits:dev", "name one of its splits: "),
        (f"{tmp_path}/saved:train", "holds one data set, without splits"),
        (f"{tmp_path}/saved_splits:train[:2]", "name one of its splits: "),
        (tmp_path / "link", "no such file"),
        ("memory://none.jsonl", "no such file"),
        ("nowhere://none.jsonl", "cannot be opened (Protocol not known"),
    ):
        with pytest.raises(UserError) as caught:
            build(str(entry), tokenizer, tmp_path / "cache")
        assert str(caught.value).startswith(f"{entry}") and message in str(caught.value)


@pytest.mark.parametrize(
    "name, content, columns, texts",
    [
        ("a.csv", ",query,pos_doc\n0,q,p\n", ["in_order"], ("q", "p")),  # pandas' index
        ("a.csv", "Unnamed: 0,a,b,label\n0,q,p,1\n", ["in_order"], ("q", "p")),
        ("a.csv", 'anchor,positive\nq,"[""p""]"\n', [], ("q", "p")),
        ("a.jsonl", '{"query": "q", "positive": ["p"], "negative": ["n"]}\n', [], ("q", "p", "n")),
        ("a.tsv", 'query\tpos_doc\nq\t"a" lake\n', [], ("q", '"a" lake')),
        # Not labelled texts, and not scored pairs either.
        ("a.csv", "ask,say,text,label\nq,p,t,1\n", ["query=ask", "pos_doc=say"], ("q", "p")),
        ("a.jsonl", '{"query": "q", "pos_doc": "p", "neg_doc": ["n"], "score": 0.5}\n', [], ("q", "p", "n")),
    ],
)
def test_which_columns_are_texts(tmp_path, name, content, columns, texts):
    (tmp_path / name).write_text(content)
    reading = Reading(tuple(columns), kinds=("scored", "labels"))
    ((_, record),) = read_training_records([tmp_path / name], reading)
    assert (record.query, record.pos_doc, *record.neg_docs) == texts and record.label is record.pos_score is None


def test_what_looks_odd_and_is_read(tmp_path, tokenizer):
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0pzst"  # a frame that parallel zstd writes first
    rows = [{"query": "w1", "pos": ["w2", "w3"], "neg": ["w4", "w5"], "neg_scores": [0.5, 1]}]
    expected = build(str(jsonl(tmp_path / "a.jsonl", rows)), tokenizer, tmp_path / "cache")
    for name, content in (
        ("lists.csv", b'query,pos,neg,neg_scores\nw1,"[""w2"", ""w3""]","[""w4"", ""w5""]","[0.5, 1]"\n'),
        ("lines.csv", json.dumps(rows[0]).encode()),
        ("a.jsonl.zst", skippable + pyarrow.compress(json.dumps(rows[0]).encode(), codec="zstd", asbytes=True)),
    ):
        (tmp_path / name).write_bytes(content)
        store = build(str(tmp_path / name), tokenizer, tmp_path / "cache")
        assert_same(store, expected)
        np.testing.assert_array_equal(store.scores, expected.scores)


def test_what_is_not_taken_as_it_might_be_is_said(tmp_path, tokenizer):
    rows = [{"query": "w1", "pos": ["w2"], "prompt": "w9 ", "type": "x"}, {"query": "w3", "pos": ["w4"], "source": 1}]
    path = str(jsonl(tmp_path / "a.jsonl", rows))
    build_store = functools.partial(build_training_store, [path], tokenizer, num_negatives=None, cache_dir=tmp_path)
    for prefix in ("", "query: "):
        store = TrainingStore.open(
            build_store(query_format=TextFormat(prefix, 32, True), document_format=TextFormat("", 32, True))
        )
        said = store.describe()
        assert "not read: type, source" in said
        place = f"in place of the query prefix '{prefix}', such as 'w9 w1'"
        assert f"1 queries bring a prompt of their own, {place}" in said
        for text, expected in enumerate(
            encode_texts(tokenizer, ["w9 w1", "w2", f"{prefix}w3"], TextFormat("", 32, True))
        ):
            np.testing.assert_array_equal(store.tokens_of(text), expected)
    assert "--corpus_files is not read for it: its records hold the texts of their documents" in (
        build(path, tokenizer, tmp_path / "cache", corpus_files=[path]).describe()
    )
    forms = write_forms(tmp_path)
    metadata = {"corpus_id": "c", "query_instruction": "Find:\n", "passage_instruction": ""}
    (tmp_path / "corpus" / "merlin_metadata.json").write_text(json.dumps(metadata))
    said = build(forms["automodel_corpus"][0], tokenizer, tmp_path / "cache").describe()
    assert [line for line in said if "instruction" in line] == [
        "corpus 'c': its query_instruction 'Find:\\n' is used only when given as a prefix, with a blank behind it: "
        "--query_prefixes"
    ]


def test_a_changed_corpus_gives_another_store(tmp_path, tokenizer):
    forms = write_forms(tmp_path)
    for name, corpus in (("tevatron2", "tevatron_corpus.jsonl"), ("automodel_corpus", "corpus/train.parquet")):
        entry, settings = forms[name]
        before = build(entry, tokenizer, tmp_path / "cache", **settings)
        assert build(entry, tokenizer, tmp_path / "cache", **settings).path == before.path
        os.utime(tmp_path / corpus, ns=(1, 1))
        touched = build(entry, tokenizer, tmp_path / "cache", **settings)
        # A run goes on with a corpus that was touched, and not with one that was changed: it compares the hashes.
        assert touched.path != before.path
        assert touched.manifest["files"][0]["sha256"] == before.manifest["files"][0]["sha256"]
        more = {"docid": "999", "id": "999", "title": "", "text": "w1"}
        if corpus.endswith("jsonl"):
            (tmp_path / corpus).write_text((tmp_path / corpus).read_text() + json.dumps(more))
        else:
            table = pyarrow.parquet.read_table(tmp_path / corpus)
            rows = [*table.to_pylist(), {name: more[name] for name in table.column_names}]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / corpus)
        after = build(entry, tokenizer, tmp_path / "cache", **settings)
        assert after.manifest["files"][0]["sha256"] != before.manifest["files"][0]["sha256"]


def test_documents_that_a_corpus_lacks(tmp_path, tokenizer):
    forms = write_forms(tmp_path)
    corpus = jsonl(tmp_path / "short.jsonl", [{"docid": "0", "text": "w1"}])
    with pytest.raises(
        UserError, match=r"tevatron2.jsonl:1: negative_document_ids\[0\] names document '5', which is not"
    ):
        build(forms["tevatron2"][0], tokenizer, tmp_path / "cache", corpus_files=[str(corpus)])
    path = forms["automodel_corpus"][0]
    content = json.loads((tmp_path / "automodel_corpus.json").read_text())
    content["data"][1]["pos_doc"] = [{"id": 99}]
    (tmp_path / "automodel_corpus.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r":record 2: pos_doc\[0\] names document '99', which is not in the corpus"):
        build(path, tokenizer, tmp_path / "cache")
    content["data"][0]["corpus_id"] = "other"
    (tmp_path / "automodel_corpus.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=":record 1: corpus_id 'other' is none of c"):
        build(path, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([{"pos_doc": "T one", "doc_id": "1"}, {"pos_doc": "two", "doc_id": "2"}], ()),
        ([{"_id": 1, "title": "T", "text": "one"}, {"_id": 2, "title": None, "text": "two"}], ()),
        ([{"docid": "1", "title": "T", "text": "one"}, {"docid": "2", "title": "", "text": "two"}], ()),
        ([{"id": 1.0, "text": "T one"}, {"id": 2.0, "text": "two"}], ()),
        ([{"n": 1, "head": "T", "body": "one"}, {"n": 2, "body": "two"}], ("pos_doc=body", "doc_id=n", "title=head")),
    ],
)
def test_documents_of_other_names(tmp_path, tokenizer, rows, columns):
    path = jsonl(tmp_path / "d.jsonl", rows)
    store = build_text_store(path, "pos_doc", "doc_id", tokenizer, FORMAT, tmp_path / "cache", columns=columns)
    own = jsonl(tmp_path / "own.jsonl", [{"pos_doc": "T one", "doc_id": "1"}, {"pos_doc": "two", "doc_id": "2"}])
    expected = build_text_store(own, "pos_doc", "doc_id", tokenizer, FORMAT, tmp_path / "cache")
    for name in ("tokens.npy", "ids.txt"):
        assert (store / name).read_bytes() == (expected / name).read_bytes()


def test_mining_reads_what_training_reads(tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [{"query": f"w{i} x", "pos": [f"x w{i} p", f"x w{i} r"], "neg": [], "source": i} for i in range(4)]
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "0.jsonl", rows[:2])
    jsonl(tmp_path / "data" / "1.jsonl", rows[2:])
    mined, _ = run(tmp_path, "mined.jsonl", method="bm25", num_negatives=2, train_files=[str(tmp_path / "data")])
    assert [(record["query"], record["pos_doc"]) for record in mined] == [
        (r["query"], p) for r in rows for p in r["pos"]
    ]
    said = [entry.getMessage() for entry in caplog.records if "not read" in entry.getMessage()]
    assert said == [f"{tmp_path}/data: FlagEmbedding records, 4 with 2 positives\n{tmp_path}/data: not read: source"]
    for record in mined:
        assert len(record["neg_doc"]) == 2 and not any(
            text.startswith(record["query"][:2]) for text in record["neg_doc"]
        )
    again, _ = run(tmp_path, "again.jsonl", method="bm25", num_negatives=2, train_files=[str(tmp_path / "mined.jsonl")])
    assert [record["neg_doc"] for record in again] == [record["neg_doc"] for record in mined]
