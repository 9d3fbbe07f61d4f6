"""recipes/convert.py between our files and those of others: round trips, and mistakes that leave nothing behind."""

import csv
import json
import subprocess
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from tiny import REPOSITORY, launch_environment, load_recipe

from ds_embed.data.identity import text_id
from ds_embed.settings.errors import UserError

RECIPE = REPOSITORY / "recipes" / "convert.py"
TRAINING = [
    {
        "query": "what is a lake",
        "pos_doc": "water",
        "neg_doc": ["a hill", '丘 "x", y'],
        "query_id": "q1",
        "doc_id": "d1",
    },
    {
        "query": "what is a lake",
        "pos_doc": "a hole\nwith water",
        "neg_doc": ["a hill", '丘 "x", y'],
        "query_id": "q1",
        "doc_id": "d2",
    },
    {"query": "a hill?", "pos_doc": "a hill", "neg_doc": ["water"], "query_id": "q2", "doc_id": "d3"},
    {"query": "no negative", "pos_doc": "so", "query_id": "q3", "doc_id": "d4"},
]


recipe = load_recipe("convert")


def convert(source, target, output, *flags):
    recipe.main(["--input_format", source, "--output_format", target, "--output", str(output), *map(str, flags)])
    return output


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def beir_folder(folder, split="test"):
    """Three documents, a query with graded judgments, one judged 0 alone, and one of another split."""
    jsonl(
        folder / "corpus.jsonl",
        [
            {"_id": "d1", "title": "Lakes", "text": "are water"},
            {"_id": "d2", "title": "", "text": "a hill "},
            {"_id": "d3", "title": "Empty", "text": "", "metadata": {}},
        ],
    )
    queries = {"q1": "what is a lake", "q2": "what is a hill", "q9": "of another split"}
    jsonl(folder / "queries.jsonl", [{"_id": name, "text": text} for name, text in queries.items()])
    (folder / "qrels").mkdir()
    (folder / "qrels" / f"{split}.tsv").write_text(
        "query-id\tcorpus-id\tscore\r\nq1\td1\t2\r\nq1\td2\t0\r\nq1\td3\t1\r\nq2\td1\t0\r\n"
    )
    return folder


def test_beir_to_training_and_back(tmp_path, capsys):
    folder = beir_folder(tmp_path / "beir")
    plain = convert(
        "beir",
        "training",
        tmp_path / "plain.jsonl",
        "--input",
        folder,
        "--join_titles",
        "false",
        "--skip_bad_records",
        "true",
    )
    assert read_jsonl(plain) == [{"query": "what is a lake", "pos_doc": "are water", "query_id": "q1", "doc_id": "d1"}]
    assert f"1 skipped: pos_doc is blank (at {folder}/qrels/test.tsv:4)" in capsys.readouterr().out
    joined = convert("beir", "training", tmp_path / "joined.jsonl", "--input", folder, "--judged_negatives", "true")
    first = {"query": "what is a lake", "query_id": "q1", "neg_doc": ["a hill "]}
    expected = [first | {"pos_doc": "Lakes are water", "doc_id": "d1"}, first | {"pos_doc": "Empty", "doc_id": "d3"}]
    assert read_jsonl(joined) == expected
    # And ours to BEIR and back, negatives included.
    source = jsonl(tmp_path / "train.jsonl", TRAINING)
    made = convert("training", "beir", tmp_path / "made", "--input", source, "--split", "train")
    assert "4 documents written" not in capsys.readouterr().out  # 4 positives and one more negative
    assert len(read_jsonl(made / "corpus.jsonl")) == 5 and len(read_jsonl(made / "queries.jsonl")) == 3
    back = convert(
        "beir", "training", tmp_path / "back.jsonl", "--input", made, "--split", "train", "--judged_negatives", "true"
    )
    assert read_jsonl(back) == TRAINING
    # What is a positive of the query in one record is no negative of it in another.
    jsonl(source, [TRAINING[0], {"query": "what is a lake", "pos_doc": "sea", "neg_doc": ["water"], "query_id": "q1"}])
    made = convert("training", "beir", tmp_path / "made2", "--input", source)
    qrels = [line.split("\t") for line in (made / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    assert [relevance for *_, relevance in qrels] == ["1", "1", "0", "0"] and qrels[0][1] == "d1"


def test_pairs_to_test_files_in_one_step(tmp_path):
    """The same files as by way of a BEIR folder; pairs without ids get ids of their texts."""
    renamed = [{"question": "what is a sea", "answer": "Salt water"}]
    for name, records, flags in (
        ("ours", TRAINING, ()),
        ("renamed", renamed, ("--columns", "query=question", "pos_doc=answer")),
    ):
        folder = tmp_path / name
        folder.mkdir()
        source = jsonl(folder / "train.jsonl", records)
        test = convert("training", "test", folder / "test", "--input", source, *flags)
        beir = convert("training", "beir", folder / "beir", "--input", source, *flags)
        again = convert("beir", "test", folder / "again", "--input", beir)
        for name in ("docs.jsonl", "queries.jsonl", "qrels.tsv"):
            assert (again / name).read_bytes() == (test / name).read_bytes() != b""


def test_beir_to_test_files_and_back(tmp_path):
    folder = beir_folder(tmp_path / "beir")
    test = convert("beir", "test", tmp_path / "test", "--input", folder)
    assert read_jsonl(test / "docs.jsonl") == [
        {"pos_doc": "Lakes are water", "doc_id": "d1"},
        {"pos_doc": "a hill ", "doc_id": "d2"},
        {"pos_doc": "Empty", "doc_id": "d3"},
    ]
    lake = {"query": "what is a lake", "query_id": "q1"}
    assert read_jsonl(test / "queries.jsonl") == [
        lake | {"doc_id": ["d1", "d3"]},
        {"query": "what is a hill", "query_id": "q2"},
    ]
    qrels = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq1\td3\t1\nq2\td1\t0\n"
    assert (test / "qrels.tsv").read_text() == qrels
    files = "--query_files", test / "queries.jsonl", "--doc_files", test / "docs.jsonl"
    beir = convert("test", "beir", tmp_path / "again", *files, "--qrels", test / "qrels.tsv")
    assert (beir / "qrels" / "test.tsv").read_text() == qrels
    again = convert("beir", "test", tmp_path / "test2", "--input", beir)
    for name in ("docs.jsonl", "queries.jsonl", "qrels.tsv"):
        assert (again / name).read_bytes() == (test / name).read_bytes()
    # Without --qrels the queries' own doc_id are the judgments.
    jsonl(test / "queries.jsonl", [lake | {"doc_id": ["d1", "d3"]}])
    trec = convert("test", "trec_qrels", tmp_path / "qrels.trec", *files)
    assert trec.read_text() == "q1 0 d1 1\nq1 0 d3 1\n"
    back = convert("qrels", "beir_qrels", tmp_path / "qrels.tsv", "--input", trec)
    assert back.read_text() == "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td3\t1\n"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_pairs_and_triplets_round_trip(tmp_path, suffix):
    source = jsonl(tmp_path / "train.jsonl", TRAINING[:2])
    triplets = convert("training", "triplets", tmp_path / f"t{suffix}", "--input", source, "--num_negatives", 2)
    if suffix == ".parquet":
        rows = pyarrow.parquet.read_table(triplets).to_pylist()
    elif suffix == ".csv":
        rows = list(csv.DictReader(open(triplets, encoding="utf-8", newline="")))
    else:
        rows = read_jsonl(triplets)
    texts = [[r["query"], r["pos_doc"], *r["neg_doc"]] for r in TRAINING[:2]]
    assert rows == [dict(zip(["anchor", "positive", "negative_1", "negative_2"], row)) for row in texts]
    without_ids = [{k: v for k, v in record.items() if k in ("query", "pos_doc", "neg_doc")} for record in TRAINING[:2]]
    back = convert("table", "training", tmp_path / "back.jsonl", "--input", triplets)
    assert read_jsonl(back) == without_ids
    pairs = convert("training", "pairs", tmp_path / f"p{suffix}", "--input", source)
    back = convert("table", "training", tmp_path / "pairs.jsonl", "--input", pairs)
    assert read_jsonl(back) == [{k: v for k, v in record.items() if k != "neg_doc"} for record in without_ids]


def test_tables_with_columns_of_any_name(tmp_path):
    table = tmp_path / "t.parquet"
    columns = {
        "id": [7, 8],
        "question": ["a", "b"],
        "answer": ["c", "d"],
        "bad": [["x", "y"], None],
        "worse": ["", "z"],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    mapping = "--columns", "query=question", "pos_doc=answer", "neg_doc=bad,worse", "query_id=id"
    made = convert("table", "training", tmp_path / "a.jsonl", "--input", table, *mapping)
    assert read_jsonl(made) == [
        {"query": "a", "pos_doc": "c", "neg_doc": ["x", "y"], "query_id": "7"},
        {"query": "b", "pos_doc": "d", "neg_doc": ["z"], "query_id": "8"},
    ]
    tsv = tmp_path / "t.tsv"
    tsv.write_bytes('\ufeffid\ttitle\tbody\r\n1\tLakes\t"are" water\r\n1\tLakes\t"are" water\r\n2\t\tb\r\n'.encode())
    made = convert(
        "table", "documents", tmp_path / "docs.jsonl", "--input", tsv, "--columns", "pos_doc=body", "doc_id=id"
    )
    assert read_jsonl(made) == [{"pos_doc": 'Lakes "are" water', "doc_id": "1"}, {"pos_doc": "b", "doc_id": "2"}]
    made = convert("table", "queries", tmp_path / "q.jsonl", "--input", tsv, "--columns", "query=body", "query_id=id")
    assert len(read_jsonl(made)) == 3
    run = tmp_path / "run.trec"
    run.write_text("q1 Q0 d1 1 0.5 bm25\nq1 Q0 d2 2 0.25 bm25\nq2 Q0 d1 1 3 bm25\n")
    made = convert("run", "table", tmp_path / "run.csv", "--input", run)
    back = convert("table", "trec_run", tmp_path / "back.trec", "--input", made)
    assert back.read_text() == run.read_text().replace("bm25", "converted").replace(" 3 ", " 3.0 ")


def test_triples_of_texts_and_of_ids(tmp_path):
    texts = tmp_path / "triples.tsv"
    texts.write_text('what is "a" lake\twater\ta hill\n')
    made = convert("msmarco", "training", tmp_path / "a.jsonl", "--input", texts)
    expected = {"query": 'what is "a" lake', "pos_doc": "water", "neg_doc": ["a hill"]}
    assert read_jsonl(made) == [expected]
    (tmp_path / "ids.tsv").write_text("1\t10\t11\n1\t10\t12\n")
    (tmp_path / "queries.tsv").write_text('1\twhat is "a" lake\n2\tother\n')
    (tmp_path / "collection.tsv").write_text("10\twater\n11\ta hill\n")
    flags = ["--input", tmp_path / "ids.tsv", "--query_files", tmp_path / "queries.tsv"]
    flags += ["--doc_files", tmp_path / "collection.tsv"]
    with pytest.raises(ValueError, match="ids.tsv:2: the text of '12' is not in --query_files or --doc_files; add"):
        convert("msmarco", "training", tmp_path / "b.jsonl", *flags)
    made = convert("msmarco", "training", tmp_path / "b.jsonl", *flags, "--skip_unknown", "true")
    assert read_jsonl(made) == [expected | {"query_id": "1", "doc_id": "10"}]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for number in (300, 3000):
        folder = tmp_path / str(number)
        jsonl(folder / "corpus.jsonl", ({"_id": f"d{i}", "text": f"{i} " * 400} for i in range(number)))
        jsonl(folder / "queries.jsonl", [{"_id": "q", "text": "which"}])
        (folder / "qrels").mkdir()
        (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td7\t1\n")
        tracemalloc.start()
        convert("beir", "training", tmp_path / f"{number}.jsonl", "--input", folder)
        convert("beir", "test", tmp_path / f"{number}.test", "--input", folder)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < 4_000_000


HEADER = "query-id\tcorpus-id\tscore\n"
BEIR, TABLE = ("beir", "training"), ("table", "training")


def qrels(content):
    return lambda folder: (folder / "qrels" / "test.tsv").write_text(content)


def append(name, row):
    return lambda folder: open(folder / name, "a").write(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (qrels("q1\td1\n"), [], "test.tsv:1: 2 columns; expected 'query-id 0 doc-id relevance' (TREC)"),
        (qrels(HEADER + "q1\td1\n"), [], "test.tsv:2: 2 columns"),
        (qrels(HEADER + "q1\td1\t0.5\n"), [], "test.tsv:2: relevance '0.5', expected a whole number"),
        (
            qrels(HEADER + "q1\td1\t1\nq1\td1\t2\n"),
            [],
            "test.tsv:3: document 'd1' has relevance 2 for query 'q1' and had 1",
        ),
        (qrels(HEADER + "q1\td1\t1\nq1\td8\t1\n"), [], "test.tsv:3: document 'd8' is judged and has no text; add"),
        (qrels(HEADER + "q8\td1\t1\n"), [], "test.tsv:2: query 'q8' is judged and has no text; add"),
        (
            append("corpus.jsonl", {"_id": "d1", "text": "other"}),
            [],
            "corpus.jsonl:4: document id 'd1' stands with another text at ",
        ),
        (append("corpus.jsonl", {"_id": "d4"}), [], "corpus.jsonl:4: pos_doc is missing, expected a string"),
        (
            append("queries.jsonl", {"_id": "q1", "text": "other"}),
            [],
            "queries.jsonl:4: query id 'q1' stands with another text",
        ),
        (lambda folder: (folder / "corpus.jsonl").unlink(), [], "has no corpus.jsonl; a BEIR folder holds"),
        (
            lambda folder: jsonl(folder / "corpus.jsonl", [{"name": "d1", "text": ""}]),
            [],
            "corpus.jsonl:1: doc_id is missing, expected a string; the keys here are 'name', 'text'",
        ),
        (lambda folder: None, ["--split", "dev"], "--split dev: there is no "),
        (
            lambda folder: (folder / "qrels" / "test.tsv").write_bytes(HEADER.encode() + b"q\xff\td\t1\n"),
            [],
            "test.tsv:2: not UTF-8",
        ),
    ],
)
def test_mistakes_in_beir_folders(tmp_path, spoil, flags, message):
    folder = beir_folder(tmp_path / "beir")
    (folder / "qrels" / "test.tsv").write_text(HEADER + "q1\td1\t1\n")
    spoil(folder)
    for target in ("training", "test"):
        with pytest.raises(ValueError) as caught:
            convert("beir", target, tmp_path / "out", "--input", folder, *flags)
        assert message in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["beir"]


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("a.csv", b"anchor,positive\nx\n", [], "a.csv:2: 1 columns, and the header has 2 (anchor, positive)"),
        ("a.csv", b"anchor,positive\nx,y,z\n", [], "a.csv:2: 3 columns"),
        ("a.csv", b'anchor,positive\nx,"y\nz\n', [], "a.csv:2: not CSV (unexpected end of data)"),
        ("a.csv", b"anchor,positive\nx,y\n\xff,y\n", [], "a.csv:3: not UTF-8 text"),
        ("a.csv", b"anchor,positive\nx,\n", [], "a.csv:2: positive is null, expected a string"),
        ("a.csv", b"x,y\n1,2\n", [], "a.csv:2: query is missing, expected a string; the keys here are 'x', 'y'"),
        ("a.csv", b"anchor,anchor\n", [], "a.csv: has two columns named 'anchor'"),
        ("a.csv", b"", [], "a.csv: is empty; remove it"),
        ("a.tsv", b"anchor\tpositive\nx\ty\tz\n", [], "a.tsv:2: 3 columns"),
        (
            "a.csv",
            b"q,p\nx,y\n",
            ["--columns", "query=question", "pos_doc=p"],
            "a.csv:2: --columns query=question: there is no 'question' here; the keys are q, p",
        ),
        (
            "a.csv",
            b"q,p\nx,y\n",
            ["--columns", "question=q"],
            "--columns question=q: expected KEY=COLUMN, where KEY is one of query,",
        ),
        ("a.jsonl", b'{"anchor": "x", "positive": 3}\n', [], "a.jsonl:1: positive is a number, expected a string"),
        ("a.jsonl", b'{"anchor": "x", "positive": "y"}\n{"anchor": \n', [], "a.jsonl:2: not JSON"),
        ("a.parquet", b"PAR1xxxx", [], "a.parquet: not a whole Parquet file"),
        ("a.txt", b"x", [], "a.txt:1: not JSON"),
    ],
)
def test_mistakes_in_tables(tmp_path, name, content, flags, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        convert("table", "training", tmp_path / "out.jsonl", "--input", tmp_path / name, *flags)
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_is_skipped_is_counted(tmp_path, capsys):
    folder = beir_folder(tmp_path / "beir")
    qrels(HEADER + "q1\td8\t1\nq1\td1\t1\nq7\td1\t1\nq1\td9\t1\n")(folder)
    append("corpus.jsonl", {"_id": "d1", "text": "other"})(folder)
    append("corpus.jsonl", {"_id": 4, "text": "a number as id"})(folder)
    skip = ["--skip_unknown", "true", "--skip_bad_records", "true"]
    test = convert("beir", "test", tmp_path / "test", "--input", folder, *skip)
    where = f"{folder}/qrels/test.tsv"
    assert capsys.readouterr().out.splitlines() == [
        "4 documents written",
        "1 judgments written",
        "1 queries written",
        f"2 skipped: document is judged and has no text (at {where}:2, {where}:5)",
        f"1 skipped: document id stands with another text (at {folder}/corpus.jsonl:4)",
        f"1 skipped: query is judged and has no text (at {where}:4)",
        f"written to {test}",
    ]
    assert read_jsonl(test / "docs.jsonl")[-1] == {"pos_doc": "a number as id", "doc_id": "4"}
    bad = [TRAINING[0], {"query": ""}, TRAINING[3], TRAINING[3] | {"neg_doc": ["so"]}]
    source = jsonl(tmp_path / "bad.jsonl", bad)
    made = convert("training", "beir", tmp_path / "made", "--input", source, *skip)
    assert (
        "1 skipped: pos_doc is missing" in (out := capsys.readouterr().out) and "1 skipped: neg_doc is the text" in out
    )
    assert (made / "qrels" / "test.tsv").read_text().count("\n") == 5  # two positives, two negatives
    triplets = convert("training", "triplets", tmp_path / "t.csv", "--input", source, *skip)
    assert "1 rows written" in (out := capsys.readouterr().out) and "1 skipped: has N neg_doc" in out
    assert triplets.read_text().startswith("anchor,positive,negative\nwhat is a lake,water,a hill\n")


def test_what_is_refused_for_its_ids_is_not_judged(tmp_path):
    """Two files that both number their queries and documents from 0."""
    for name in ("rivers", "cooking"):
        rows = [{"query": f"{name} {n}", "pos_doc": f"{name} text {n}", "query_id": n, "doc_id": n} for n in (0, 1)]
        jsonl(tmp_path / f"{name}.jsonl", rows)
    rows[0]["doc_id"] = 1
    jsonl(tmp_path / "cooking.jsonl", rows)
    files = [tmp_path / "rivers.jsonl", tmp_path / "cooking.jsonl"]
    made = convert("training", "test", tmp_path / "made", "--input", *files, "--skip_bad_records", "true")
    queries = read_jsonl(made / "queries.jsonl")
    assert [(row["query"], row["doc_id"]) for row in queries] == [("rivers 0", "0"), ("rivers 1", "1")]


def test_as_a_user_runs_it(tmp_path):
    source = jsonl(tmp_path / "train.jsonl", TRAINING)

    def run(*flags):
        command = [sys.executable, RECIPE, "--input_format", "training", "--input", source, *flags]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=launch_environment())

    done = run("--output_format", "pairs", "--output", tmp_path / "pairs.csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{source}: our own records, 4\n4 rows written\nwritten to {tmp_path}/pairs.csv\n"
    failed = run("--output_format", "pairs", "--output", tmp_path / "pairs.csv")
    assert failed.returncode == 2
    assert failed.stderr == f"error: --output {tmp_path}/pairs.csv: already exists; delete it or choose another name\n"
    with pytest.raises(
        ValueError, match="--output_format queries: training can become training, pairs, triplets, texts, beir, test"
    ):
        convert("training", "queries", tmp_path / "x", "--input", source)
    for flags, message in (
        (["--query_files", source, "--doc_files", source], "--query_files .*: only test and msmarco read them"),
        (["--query_files", source], "--query_files and --doc_files go together"),
        (["--qrels", source], "--qrels .*: only test reads them"),
        (["--judged_negatives", "true"], "--judged_negatives true: only for training records out of a BEIR folder"),
        (
            ["--columns", "query=q"],
            "train.jsonl:1: --columns query=q: there is no 'q' here; the keys are query, pos_doc, ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            convert("training", "pairs", tmp_path / "x.csv", "--input", source, *flags)
    with pytest.raises(ValueError, match="holds a tab or a line break, which a TSV can't hold; write .csv"):
        convert("training", "pairs", tmp_path / "x.tsv", "--input", source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.csv", "train.jsonl"]


@pytest.mark.parametrize(
    ("source", "target", "content", "flags"),
    [
        ("run", "table", b"", []),
        ("qrels", "trec_qrels", b"query-id\tcorpus-id\tscore\n", []),
        ("msmarco", "training", b"\n", ["--skip_bad_records", "true"]),
        ("training", "triplets", b'{"query": "q", "pos_doc": "p"}', ["--skip_bad_records", "true"]),
    ],
)
def test_an_output_without_anything_in_it_is_refused(tmp_path, source, target, content, flags):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=f"--input {tmp_path}/a: nothing is left to write as {target}: "):
        convert(source, target, tmp_path / "out.csv", "--input", tmp_path / "a", *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_run_becomes_a_typed_table(tmp_path):
    (tmp_path / "run.trec").write_text("q1 Q0 7 1 0.5 x\n")
    table = convert("run", "table", tmp_path / "run.parquet", "--input", tmp_path / "run.trec")
    assert pyarrow.parquet.read_table(table).to_pylist() == [{"query_id": "q1", "doc_id": "7", "score": 0.5}]
    (tmp_path / "run.csv").write_text("query_id,doc_id,score\nq1,d1,0.5\nq2,d1,0.75\nq1,d2,0.75\n")
    with pytest.raises(UserError, match="document 'd2' of query 'q1' has score 0.75, behind 0.5; sort the lines"):
        convert("table", "trec_run", tmp_path / "other.trec", "--input", tmp_path / "run.csv")
    assert not (tmp_path / "other.trec").exists()
    with pytest.raises(UserError, match="run.trec: is a file; give a folder"):
        convert("run", "table", tmp_path / "run.trec" / "a.csv", "--input", tmp_path / "run.trec")


def test_what_was_read_and_what_was_left_out_is_told(tmp_path, capsys):
    rows = [
        {"query": "a", "pos_doc": "b", "neg_doc": ["c"], "pos_score": 2, "neg_scores": [1], "source": "x"},
        {"query": "d", "pos_doc": "e", "neg_doc": ["c"]},
    ]
    source = jsonl(tmp_path / "a.jsonl", rows)
    read = [f"{source}: our own records, 2", f"{source}: not read: source"]
    made = convert("training", "training", tmp_path / "again.jsonl", "--input", source)
    assert capsys.readouterr().out.splitlines() == [*read, "2 training records written", f"written to {made}"]
    assert read_jsonl(made) == [{key: value for key, value in row.items() if key != "source"} for row in rows]
    for target in ("triplets", "beir", "test"):
        convert("training", target, tmp_path / f"{target}.csv", "--input", source)
        assert capsys.readouterr().out.splitlines()[:3] == [*read, "1 records whose scores were left out"]
    (tmp_path / "d.csv").write_text("id,title,text,url\n1,T,one,u\n")
    convert("table", "documents", tmp_path / "d.jsonl", "--input", tmp_path / "d.csv")
    assert f"{tmp_path}/d.csv: not read: url" in capsys.readouterr().out
    (tmp_path / "o.csv").write_text("the question,the answer\na,b\n")
    flags = ("--columns", "in_order", "--input", tmp_path / "o.csv")
    convert("table", "training", tmp_path / "o.jsonl", *flags)
    taken = (
        "mapped (query='the question' pos_doc='the answer', by the order of the columns, named in line 1) records, 1"
    )
    assert f"{tmp_path}/o.csv: {taken}" in capsys.readouterr().out


def test_prompts_stay_beside_their_queries_where_there_is_a_place_for_them(tmp_path, capsys):
    pairs = [
        {"query": "a lake", "pos_doc": "water", "query_id": "q1", "doc_id": "d1", "prompt": "find "},
        {"query": "a hill", "pos_doc": "earth", "query_id": "q2", "doc_id": "d2"},
    ]
    source = jsonl(tmp_path / "a.jsonl", pairs)
    assert read_jsonl(convert("training", "training", tmp_path / "again.jsonl", "--input", source)) == pairs
    queries = read_jsonl(convert("training", "texts", tmp_path / "texts", "--input", source) / "queries.jsonl")
    assert [(row["query"], row.get("prompt")) for row in queries] == [("a lake", "find "), ("a hill", None)]
    assert queries[0]["query_id"] == text_id("find a lake")
    table = convert("table", "queries", tmp_path / "queries.jsonl", "--input", source)
    assert [(row["query"], row.get("prompt")) for row in read_jsonl(table)] == [("a lake", "find "), ("a hill", None)]
    capsys.readouterr()
    for target, output in (("pairs", "pairs.jsonl"), ("test", "test"), ("beir", "beir")):
        made = convert("training", target, tmp_path / output, "--input", source)
        assert "1 queries with a prompt of their own, which is now the start of their text" in capsys.readouterr().out
        path = made if target == "pairs" else made / "queries.jsonl"
        assert "find a lake" in path.read_text()
