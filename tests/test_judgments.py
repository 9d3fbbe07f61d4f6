"""Judgments and queries as the field writes them: forms of files, queries that are documents, many right documents."""

import json
import random

import ir_measures
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny import load_recipe, make_tokenizer
from transformers import AutoTokenizer

from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.settings import EncodeArguments
from ds_embed.vectors.generate import build_stores
from ds_embed.vectors.metrics import (
    SearchRun,
    hint_at_identical,
    read_qrels,
    read_qrels_from_queries,
    without_identical,
)

CARD = EmbeddingCard("last", "", "", 24, 24, True, "base", 0)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_vectors(folder, kind, rows, ids):
    target = folder / {"query": "test_queries", "doc": "test_docs"}[kind]
    target.mkdir(parents=True)
    np.save(target / f"{kind}.npy", np.asarray(rows, dtype=np.float32))
    (target / f"{kind}.ids").write_text("".join(f"{name}\n" for name in ids))


FORMS = {
    "TREC, blanks": "q1 0 d1 1\nq1 0  d2   0\nq2\t0\td9\t2\nq2 0 d1 -1\n",
    "three columns": "q1 d1 1\nq1 d2 0\nq2\td9\t2\nq2 d1 -1\n",
    "BEIR": "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td9\t2\nq2\td1\t-1\n",
    "BEIR, decimals": "query-id\tcorpus-id\tscore\nq1\td1\t1.0\nq1\td2\t0.0\nq2\td9\t2.0\nq2\td1\t-1\n",
    "JSON": '{"query_id": "q1", "doc_id": "d1", "score": 1}\n{"query_id": "q1", "doc_id": "d2", "score": 0}\n'
    '{"query-id": "q2", "corpus-id": "d9", "score": 2.0}\n{"query_id": "q2", "doc_id": "d1", "relevance": -1}\n',
    "array": '[{"query-id": "q1", "corpus-id": "d1", "score": 1}, {"query-id": "q1", "corpus-id": "d2", "score": 0},\n'
    '{"query-id": "q2", "corpus-id": "d9", "score": 2}, {"query-id": "q2", "corpus-id": "d1", "score": -1}]',
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_judgments(tmp_path, form):
    (tmp_path / "qrels").write_text(FORMS[form])
    assert read_qrels(tmp_path / "qrels") == {"q1": {"d1": 1, "d2": 0}, "q2": {"d9": 2, "d1": -1}}


@pytest.mark.parametrize("line", ["a query\td 1\t1\n", "a query\t0\td 1\t1\n"])
def test_between_tabs_an_id_may_hold_blanks(tmp_path, line):
    (tmp_path / "qrels").write_text(line)
    assert read_qrels(tmp_path / "qrels") == {"a query": {"d 1": 1}}


def test_judgments_in_parquet_as_mteb_publishes_them(tmp_path):
    table = pyarrow.table({"query-id": ["q1", "q1"], "corpus-id": ["d1", "d2"], "score": [1.0, 0.5]})
    pyarrow.parquet.write_table(table.slice(0, 1), tmp_path / "qrels.parquet")
    assert read_qrels(tmp_path / "qrels.parquet") == {"q1": {"d1": 1}}
    pyarrow.parquet.write_table(table, tmp_path / "qrels.parquet")
    with pytest.raises(ValueError, match="qrels.parquet:row 2: relevance '0.5', expected a whole number"):
        read_qrels(tmp_path / "qrels.parquet")


def test_numbers_are_names_in_judgments(tmp_path):
    (tmp_path / "qrels").write_text('{"query_id": 1, "doc_id": 7, "score": 1}\n')
    assert read_qrels(tmp_path / "qrels") == {"1": {"7": 1}}


@pytest.mark.parametrize(
    "content, words",
    [
        ("q1 0 d1 1\nq1 d2 1\n", [":2: 3 columns, and the lines before have 4"]),
        ("q1 d1\n", [":1: 2 columns; expected"]),
        ("q1 0 d1 high\n", [":1: relevance 'high', expected a whole number"]),
        ("q1 0 d1 0.5\n", [":1: relevance '0.5', expected a whole number"]),
        ("q1 0 d1 1699999999\n", [":1: relevance '1699999999', expected a whole number of at most 1,000,000"]),
        ("q1 0 d1 nan\n", [":1: relevance 'nan', expected a whole number"]),
        ('{"query_id": "q", "doc_id": "d", "score": true}\n', [":1: relevance 'True', expected a whole number"]),
        ('{"query_id": "q", "score": 1}\n', [":1: doc_id is missing"]),
        ('{"query_id": "q", "doc_id": "d", "score": 1}\nq 0 d 1\n', [":2: not JSON"]),
        ("q1 0 d1 1\nq1 0 d1 2\n", [":2: document 'd1' has relevance 2 for query 'q1' and had 1 further up"]),
        ("q1 0 d1 0\nq2 0 d1 -1\n", ["judges no document relevant"]),
        ("", ["judges no document relevant"]),
    ],
)
def test_bad_judgments_are_one_line(tmp_path, content, words):
    (tmp_path / "qrels").write_text(content)
    with pytest.raises(ValueError) as caught:
        read_qrels(tmp_path / "qrels")
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in [f"{tmp_path}/qrels", *words]), caught.value


@pytest.fixture(scope="module")
def cranfield(tmp_path_factory):
    """225 queries with 1,611 judgments, a line each, in 1,400 documents; shape and names as in Cranfield."""
    root = tmp_path_factory.mktemp("cranfield")
    make_tokenizer(root / "llama", bert=False)
    rng = random.Random(0)
    counts = [1611 // 225 + (number < 1611 % 225) for number in range(225)]
    lines = [
        {"query": f"w{number % 90} w{number // 90}", "query_id": str(number), "doc_id": str(document)}
        for number, count in enumerate(counts)
        for document in rng.sample(range(1400), count)
    ]
    rng.shuffle(lines)
    write(root / "queries.jsonl", lines)
    write(root / "docs.jsonl", [{"pos_doc": f"w{n % 90}" * (n != 7), "doc_id": str(n)} for n in range(1400)])
    return root


def stores(root, cache, queries="queries.jsonl", docs="docs.jsonl"):
    arguments = EncodeArguments(
        query_files=[str(root / queries)] if queries else [], doc_files=[str(root / docs)], cache_dir=str(cache)
    )
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    return [store for _, _, store in build_stores(World.alone(), arguments, tokenizer, CARD)]


def test_each_query_is_one_row_however_many_judgments_it_has(cranfield, tmp_path, capsys):
    queries, documents = stores(cranfield, tmp_path / "cache")
    assert queries.num_texts == 225 and len(set(queries.ids())) == 225
    lines = [json.loads(line) for line in open(cranfield / "queries.jsonl")]
    first = list(dict.fromkeys(line["query_id"] for line in lines))
    assert list(queries.ids()) == first
    assert (
        queries.location(1) == f"{cranfield}/queries.jsonl:{[line['query_id'] for line in lines].index(first[1]) + 1}"
    )
    assert documents.facts()[0]["num_blank"] == 1 and "1 of them blank" in documents.describe()[0]
    qrels = read_qrels_from_queries([cranfield / "queries.jsonl"])
    assert sum(map(len, qrels.values())) == 1611

    generator = np.random.default_rng(0)
    rows = generator.normal(size=(225, 8)), generator.normal(size=(1400, 8))
    write_vectors(tmp_path / "out", "query", rows[0], first)
    write_vectors(tmp_path / "out", "doc", rows[1], map(str, range(1400)))
    load_recipe("evaluate").main(
        [f"--embeddings={tmp_path}/out", f"--query_files={cranfield}/queries.jsonl", "--top_k=1400"]
    )
    scores = rows[0].astype(np.float32) @ rows[1].astype(np.float32).T
    run = [
        ir_measures.ScoredDoc(query, str(number), float(score))
        for query, of_query in zip(first, scores)
        for number, score in enumerate(of_query)
    ]
    judged = [ir_measures.Qrel(query, document, 1) for query, documents in qrels.items() for document in documents]
    expected = ir_measures.pytrec_eval.calc_aggregate([ir_measures.nDCG @ 10], judged, run)[ir_measures.nDCG @ 10]
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["nDCG@10"] == pytest.approx(expected, abs=1e-9) and found["num_queries"] == 225


@pytest.mark.parametrize(
    "name, records, words",
    [
        (
            "queries",
            [("w1", "a", "1"), ("w2", "a", "2")],
            [".jsonl:2", "query_id 'a' names another query text at", ":1"],
        ),
        (
            "docs",
            [("w1", "a"), ("w2", "b"), ("w3", "a")],
            [".jsonl:3", "--doc_files", "doc_id 'a' stands more than once, at", ":1 already"],
        ),
    ],
)
def test_ids_that_measuring_would_refuse_are_found_before_encoding(cranfield, tmp_path, name, records, words):
    keys = {"queries": ("query", "query_id", "doc_id"), "docs": ("pos_doc", "doc_id")}[name]
    path = write(tmp_path / "bad.jsonl", [dict(zip(keys, record)) for record in records])
    with pytest.raises(ValueError) as caught:
        stores(cranfield, tmp_path / "cache", **{name: path})
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), caught.value


def identical_files(folder):
    """Queries that stand among the documents, each first in its own results, the right document behind it."""
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(5, 6))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    right = queries + 0.1 * rng.normal(size=(5, 6))
    ids = [f"q{n}" for n in range(5)]
    write_vectors(folder, "query", queries, ids)
    write_vectors(folder, "doc", np.concatenate([queries, 0.9 * right]), [*ids, *(f"d{n}" for n in range(5))])
    (folder / "qrels").write_text("".join(f"q{n} 0 d{n} 1\n" for n in range(5)))
    run = "".join(f"q{n} Q0 q{n} 1 0.99 x\nq{n} Q0 d{n} 2 0.80 x\n" for n in range(5))
    (folder / "run.trec").write_text(run)


@pytest.mark.parametrize("source", ["embeddings", "run_file", "compressed"])
def test_a_query_that_is_a_document_is_left_out_on_demand(tmp_path, capsys, source):
    identical_files(tmp_path)
    flags = [f"--qrels={tmp_path}/qrels", f"--output_dir={tmp_path}/results", "--measures", "nDCG@1", "R@1", "nDCG@10"]
    flags += [f"--run_file={tmp_path}/run.trec"] if source == "run_file" else [f"--embeddings={tmp_path}"]
    flags += ["--truncate_dims", "5"] if source == "compressed" else []
    evaluate = load_recipe("evaluate").main
    evaluate(flags)
    assert (
        "hint: 5 of 5 judged queries, such as 'q0', find the document of their own id first" in capsys.readouterr().out
    )
    found = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert found["R@1"] == 0 and found["nDCG@10"] == pytest.approx(0.6309, abs=1e-4)
    evaluate([*flags, "--ignore_identical_ids", "true"])
    assert "hint" not in capsys.readouterr().out
    found = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert found["R@1"] == found["nDCG@10"] == 1 and found["ignore_identical_ids"] is True
    if source == "compressed":
        assert [entry["R@1"] for entry in found["compressed_vectors"]] == [1, 1]
    lines = (tmp_path / "results" / "run.trec").read_text().splitlines() if source != "run_file" else []
    assert not [line for line in lines if line.split()[0] == line.split()[2]]


def test_one_more_is_searched_and_no_more_kept():
    queries, documents = ["a", "b"], ["x", "a", "y", "z"]
    scores = np.array([[4, 3, 2], [4, 3, 2]], np.float32)
    indices = np.array([[1, 0, 2], [1, 0, 2]])
    kept = without_identical(queries, documents, scores, indices, 2)
    assert kept[1].tolist() == [[0, 2], [1, 0]] and kept[0].tolist() == [[3, 2], [4, 3]]
    run = SearchRun(queries, documents, *without_identical(queries, documents, scores, indices, 3))
    assert [list(found) for _, found in run.items()] == [["x", "y"], ["a", "x", "y"]]
    own = {"a": {"a": 1}, "b": {"x": 1}}
    assert (
        hint_at_identical(SearchRun(queries, documents, scores, indices), own) is None
    )  # judged right, so no stranger
