"""Records: both file forms read alike, a bounded memory, and errors that name file, line and key."""

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc

import pytest

from ds_embed.data.files import Records, read_records
from ds_embed.data.forms import parse_training_record
from ds_embed.data.records import parse_document_record, parse_query_record
from ds_embed.settings.errors import UserError

RECORDS = [
    {"query": "what is a lake?", "pos_doc": "water, inland", "neg_doc": ["a hill", "ein Hügel 丘"], "n": 0.1},
    {"query": 'a "quoted" one\n', "pos_doc": "[", "item": [{"item": [1, None, True]}], "neg_doc": "x"},
    {"query": "\u2028 and \x00", "pos_doc": "]", "query_id": "q 3", "doc_id": "d3", "big": 2**53},
]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_error(path):
    with pytest.raises(ValueError) as caught:
        list(read_records(path))
    return str(caught.value)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("before", [b"", b"\xef\xbb\xbf", b" \r\n\t", b"\xef\xbb\xbf\n"])
def test_array_and_jsonl_give_the_same_records(tmp_path, indent, before):
    lines = write(tmp_path / "a.jsonl", before + jsonl(RECORDS).encode())
    array = write(tmp_path / "a.json", before + json.dumps(RECORDS, indent=indent).encode())
    assert [record for _, record in read_records(lines)] == RECORDS
    assert list(read_records(array)) == [
        (f"{array}:record {number}", record) for number, record in enumerate(RECORDS, 1)
    ]


def test_the_content_decides_not_the_name(tmp_path):
    assert list(read_records(write(tmp_path / "a.json", '{"a": 1}\n'))) == [(f"{tmp_path}/a.json:1", {"a": 1})]
    assert Records(write(tmp_path / "a.jsonl", '[{"a": 1}]')).unit == "record"


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\n{"a": 1}\r\n  \t\n\r\n{"a": 2}')
    assert list(read_records(path)) == [(f"{path}:2", {"a": 1}), (f"{path}:5", {"a": 2})]


def test_files_joined_with_cat_keep_their_byte_order_marks(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n')
    assert [record for _, record in read_records(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("content", "place", "words"),
    [
        ('{"a": 1}\n\n{"a": }\n', ":3: not JSON", "one whole JSON object a line"),
        ('{"a": 1}\n{"a": 2', ":2: not JSON", "end of data"),
        ('{\n "a": 1\n}\n', ":1: not JSON", "one whole JSON object a line"),
        ('{"a": 1} {"a": 2}\n', ":1: not JSON", ""),
        ('{"a": NaN}\n', ":1: not JSON", ""),
        ('{"a": 1}\n[{"a": 2}]\n', ":2: found a list", "expected a JSON object"),
        ('{"a": 1}\n"text"\n', ":2: found a string", "expected a JSON object"),
        ('{"a": 1}\nnull\n', ":2: found null", "expected a JSON object"),
        ('{"a": 1}\n12\n', ":2: found a number", "expected a JSON object"),
        ('{"a": 1}\ntrue\n', ":2: found a boolean", "expected a JSON object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2: not UTF-8", "save the file as UTF-8"),
        ('[{"a": 1}, 7]', ":record 2: found a number", "expected a JSON object"),
        ('[{"a": 1}, null]', ":record 2: found null", "expected a JSON object"),
        ('[{"a": 1},\n [{"a": 2}]]', ":record 2: found a list", "expected a JSON object"),
        ('[{"a": 1}, {"a": }]', ":record 2: not JSON", "read as one JSON array"),
        ('[{"a": 1}, {"a": 2}', ":record 3: the file ends before", "cut short"),
        ('[{"a": 1}, {"a": 2', ":record 2: the file ends before", "cut short"),
        ('[{"a": 1}]\n[{"a": 2}]\n', ":record 2: not JSON", "trailing garbage"),
        (b'[{"a": 1}, {"a": "\xff"}]', ":record 2: not UTF-8", "save the file as UTF-8"),
    ],
)
def test_a_bad_place_is_named(tmp_path, content, place, words):
    path = write(tmp_path / "bad.jsonl", content)
    message = read_error(path)
    assert message.startswith(f"{path}{place}")
    assert words in message


def test_records_before_the_bad_one_are_given(tmp_path):
    for content in ('{"a": 1}\n{"a": 2}\nx\n', '[{"a": 1}, {"a": 2}, x]'):
        records = read_records(write(tmp_path / "a", content))
        assert [next(records)[1], next(records)[1]] == [{"a": 1}, {"a": 2}]
        with pytest.raises(ValueError, match=":(record )?3: not JSON"):
            next(records)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty; remove it"),
        (b"\n \t\r\n", "is empty; remove it"),
        (b"\xef\xbb\xbf", "is empty; remove it"),
        (b" [ ]\n", "holds no record; remove it"),
        ('{"a": 1}\n'.encode("utf-16"), "is not UTF-8 text (it may be UTF-16, or not text at all); save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", "its gzip data is cut short or damaged"),
        (b"PAR1....", "not a whole Parquet file"),
    ],
)
def test_a_file_without_records_is_named_with_a_cure(tmp_path, content, words):
    path = write(tmp_path / "bad.jsonl", content)
    assert read_error(path).startswith(f"{path}: {words}")


def test_what_is_not_a_file_is_named_with_a_cure(tmp_path):
    assert read_error(tmp_path / "none.jsonl").startswith(f"{tmp_path}/none.jsonl: no such file; check the path")
    assert read_error(tmp_path).startswith(f"{tmp_path}: no data file there; expected files that end in .jsonl")
    os.mkfifo(tmp_path / "pipe")
    assert read_error(tmp_path / "pipe").startswith(f"{tmp_path}/pipe: is not a regular file; write the records")


def test_many_blanks_before_the_array(tmp_path):
    path = write(tmp_path / "a", b"\n" * 3_000_000 + b'[{"a": 1}]')
    assert list(read_records(path)) == [(f"{path}:record 1", {"a": 1})]


@pytest.mark.parametrize("content", ["\ufeff" + jsonl(RECORDS) + "\n\n", json.dumps(RECORDS) + "\n \n"])
def test_the_observer_sees_every_byte_once(tmp_path, content):
    path = write(tmp_path / "a", content)
    digest = hashlib.sha256()
    assert len(list(Records(path, digest.update))) == len(RECORDS)
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("wrapped", [False, True])
def test_half_a_surrogate_pair_in_an_array_is_named(tmp_path, wrapped):
    """The quick parser makes "?" of it; whole pairs, as json.dump writes an emoji, stay with that parser."""
    texts = ["😀", "a\ud800", "\udc00", "\ud800\ud800", "\\ud800", "😀" * 30_000, "\udfffb", "z"]
    content = json.dumps([{"a": text} for text in texts])
    path = write(tmp_path / "a.json", '{"corpus": {}, "data": ' + content + "}" if wrapped else content)
    bad, digest = [], hashlib.sha256()
    values = [value["a"] for _, value in Records(path, digest.update, on_bad=bad.append)]
    assert values == ["😀", "\\ud800", "😀" * 30_000, "z"]
    problem = "not Unicode text: half of a surrogate pair (\\ud800 to \\udfff) stands alone"
    assert [str(error) for error in bad] == [f"{path}:record {number}: {problem}" for number in (2, 3, 4, 7)]
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    write(path, json.dumps([{"a": "😀" * number} for number in range(900)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ijson.get_backend", None)
        assert [len(value["a"]) for _, value in Records(path)] == list(range(900))


@pytest.mark.parametrize("form", ["array", "jsonl"])
def test_reading_holds_one_record_at_a_time(tmp_path, form):
    record = json.dumps({"query": "q" * 50, "pos_doc": "d" * 400, "neg_doc": ["n" * 400] * 2})
    num_records = 16_000
    parts = [record] * num_records
    content = "[" + ",\n".join(parts) + "]" if form == "array" else "\n".join(parts)
    path = write(tmp_path / "big", content)
    size = path.stat().st_size
    del parts, content
    assert size > 20_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == num_records
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000


def training(**keys):
    return {"query": "q", "pos_doc": "p", **keys}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (training(), ("q", "p", (), None, None)),
        (training(neg_doc="abc"), ("q", "p", ("abc",), None, None)),
        (training(neg_doc=[]), ("q", "p", (), None, None)),
        (training(neg_doc=["a", "b", "c"]), ("q", "p", ("a", "b", "c"), None, None)),
        (training(query_id="1", doc_id="é", more=[1], title=None), ("q", "p", (), "1", "é")),
        (training(query=" q\n"), (" q\n", "p", (), None, None)),
        # null is nothing, and a number is an id.
        (training(neg_doc=None, query_id=None, doc_id=None, pos_score=None), ("q", "p", (), None, None)),
        (training(query_id=12, doc_id=12.0), ("q", "p", (), "12", "12")),
        (training(query_id=-1, doc_id=2**60), ("q", "p", (), "-1", str(2**60))),
    ],
)
def test_training_records(record, expected):
    assert parse_training_record("f:1", record) == [(*expected, None, None, None, None)]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (training(pos_score=0.5), (0.5, None)),
        (training(pos_score=2, neg_doc="a", neg_scores=[-1]), (2, (-1,))),
        (training(neg_doc=["a", "b"], neg_scores=[0.25, 1]), (None, (0.25, 1))),
        (training(neg_scores=[], pos_score=None), (None, ())),
    ],
)
def test_teacher_scores(record, expected):
    assert parse_training_record("f:1", record)[0][5:7] == expected


OTHER_KEY = "; if another key holds it: --columns {}"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"pos_doc": "p"},
            "query is missing, expected a string; the keys here are 'pos_doc'" + OTHER_KEY.format("query=KEY"),
        ),
        (
            {"query": "q"},
            "pos_doc is missing, expected a string; the keys here are 'query'" + OTHER_KEY.format("pos_doc=KEY"),
        ),
        ({}, "query is missing, expected a string; the keys here are none" + OTHER_KEY.format("query=KEY pos_doc=KEY")),
        (training(query=7), "query is a number, expected a string"),
        (training(query=None), "query is null, expected a string"),
        (training(pos_doc=None), "pos_doc is null, expected a string or a list of strings"),
        (training(pos_doc=[]), "pos_doc is empty, expected at least one document; remove the record or give it one"),
        (training(pos_doc=["p", " "]), "pos_doc[1] is blank; remove it or give it text"),
        (training(pos_doc=["p", 1]), "pos_doc[1] is a number, expected a string"),
        (training(pos_doc={"txt": "p"}), "pos_doc.text is null, expected a string"),
        (training(pos_doc={"text": "p", "image": "i"}), "pos_doc holds an image; only texts can be embedded"),
        (training(pos_doc=["p", "r"], doc_id="d"), "doc_id has 1 values and pos_doc 2 texts; give one for each"),
        (training(pos_doc=["p", "r"], neg_doc="r"), "neg_doc[0] is the text of pos_doc; remove it, it is no negative"),
        (training(pos_score="1"), "pos_score is a string, expected a finite number (or leave the key out)"),
        (training(pos_score=True), "pos_score is a boolean, expected a finite number (or leave the key out)"),
        (
            training(neg_doc="a", neg_scores=1),
            "neg_scores is a number, expected a list of numbers, one for each neg_doc",
        ),
        (training(neg_doc=["a", "b"], neg_scores=[1, None]), "neg_scores[1] is null, expected a finite number"),
        (training(neg_doc=["a"], neg_scores=[1, 2]), "neg_scores has 2 numbers and neg_doc 1 texts; give one for each"),
        (training(query=""), "query is blank; remove the record or give it text"),
        (training(pos_doc=" \n\t\u3000"), "pos_doc is blank; remove the record or give it text"),
        (training(neg_doc=3), "neg_doc is a number, expected a string or a list of strings (or leave the key out)"),
        (training(neg_doc={"a": 1}), "neg_doc.text is null, expected a string"),
        (training(neg_doc=["a", ["b"]]), "neg_doc[1] is a list, expected a string"),
        (training(neg_doc=["a", "b", 5]), "neg_doc[2] is a number, expected a string"),
        (training(neg_doc=["a", ""]), "neg_doc[1] is blank; remove it or give it text"),
        (training(neg_doc=""), "neg_doc is blank; remove it or give it text"),
        (training(doc_id=1.5), "doc_id is a number, expected a whole number or a string"),
        (training(doc_id=True), "doc_id is a boolean, expected a string (or leave the key out)"),
        (training(doc_id=""), "doc_id is empty, expected a name on one line"),
        (training(query_id="a\nb"), "query_id holds a line break, expected a name on one line"),
    ],
)
def test_bad_training_records_name_place_key_and_type(record, message):
    with pytest.raises(UserError) as caught:
        parse_training_record("f:17", record)
    assert str(caught.value) == f"f:17: {message}"


def test_query_and_document_records():
    assert parse_query_record("f:1", {"query": "q", "query_id": "1"}) == ("q", "1", (), None)
    assert parse_query_record("f:1", {"query": "q", "query_id": "1", "doc_id": "2"}) == ("q", "1", ("2",), None)
    assert parse_query_record("f:1", {"text": "q", "_id": 7, "doc_id": [2, "3"]}) == ("q", "7", ("2", "3"), None)
    prompted = parse_query_record("f:1", {"question": "q", "qid": 1, "instruction": "find "})
    assert prompted == ("find q", "1", (), "find ")
    assert prompted.as_json() == {"query": "q", "query_id": "1", "prompt": "find "}
    assert parse_document_record("f:1", {"title": "T", "text": "p", "docid": 7}) == ("T p", "7")
    assert parse_document_record("f:1", {"title": None, "text": "p", "id": 7.0}) == ("p", "7")
    assert parse_document_record("f:1", {"pos_doc": "", "doc_id": "a b"}) == ("", "a b")


MAKE_IDS = "; give each text an id, or name its key (--columns {}=KEY); `convert --input_format training --output_format test` makes test files of pairs"


@pytest.mark.parametrize(
    ("parse", "record", "message"),
    [
        (parse_query_record, {"query": "", "query_id": "1"}, "query is blank; remove the record or give it text"),
        (
            parse_query_record,
            {"query": "q"},
            "query_id is missing, expected a string; the keys here are 'query'" + MAKE_IDS.format("query_id"),
        ),
        (
            parse_query_record,
            {"query": "q", "query_id": None},
            "query_id is missing, expected a string; the keys here are 'query', 'query_id'"
            + MAKE_IDS.format("query_id"),
        ),
        (
            parse_query_record,
            {"query": "q", "query_id": "1", "doc_id": True},
            "doc_id is a boolean, expected a string (or leave the key out)",
        ),
        (parse_query_record, {"query": "q", "query_id": "1", "prompt": 3}, "prompt is a number, expected a string"),
        (
            parse_query_record,
            {"query": "q", "query_id": "1", "instruction": " "},
            "instruction is blank; remove the record or give it text",
        ),
        (
            parse_query_record,
            {"query": "q", "query_id": "1", "prompt": "a ", "instruction": "b "},
            "prompt and instruction could both be in front of the query; leave one of them out",
        ),
        (
            parse_document_record,
            {"text": "t", "title": 3, "_id": "1"},
            "title is a number, expected a string (or leave the key out)",
        ),
        (parse_document_record, {"doc_id": "1"}, "pos_doc is missing, expected a string; the keys here are 'doc_id'"),
        (parse_document_record, {"pos_doc": None, "doc_id": "1"}, "pos_doc is null, expected a string"),
        (
            parse_document_record,
            {"pos_doc": "p"},
            "doc_id is missing, expected a string; the keys here are 'pos_doc'" + MAKE_IDS.format("doc_id"),
        ),
        (parse_document_record, {"pos_doc": "p", "doc_id": ""}, "doc_id is empty, expected a name on one line"),
        *(
            (
                parse_document_record,
                {"pos_doc": "p", "doc_id": f"a{end}"},
                "doc_id holds a line break, expected a name on one line",
            )
            for end in ("\n", "\r", "\u2028b", "\x85b")
        ),
    ],
)
def test_bad_query_and_document_records(parse, record, message):
    with pytest.raises(ValueError) as caught:
        parse("f:2", record)
    assert str(caught.value) == f"f:2: {message}"


def test_importing_is_light():
    code = (
        "import sys, ds_embed.data.records, ds_embed.data.tokenize, ds_embed.data.store\n"
        "print({'torch', 'transformers', 'deepspeed', 'tokenizers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
