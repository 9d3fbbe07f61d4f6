"""recipes/evaluate.py run as a user runs it, on small real files; every mistake is one line and code 2."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny import check, launch, load_recipe

from ds_embed.job import ranks
from ds_embed.vectors.vectors import stored_numbers

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "evaluate.py"


def run_recipe(*flags):
    return launch(0, RECIPE, *flags)


recipe = load_recipe("evaluate")


def write_vectors(folder, kind, rows, ids):
    subfolder = folder / {"query": "test_queries", "doc": "test_docs"}[kind]
    subfolder.mkdir(parents=True, exist_ok=True)
    np.save(subfolder / f"{kind}.npy", np.asarray(rows, dtype=np.float32))
    (subfolder / f"{kind}.ids").write_text("".join(f"{name}\n" for name in ids))


def write_queries(path, pairs):
    lines = [{"query": f"text of {name}", "query_id": name, "doc_id": document} for name, document in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def files(tmp_path):
    """120 documents on a quarter circle, the first nearest to every query; d0 and d1 are one vector.

    So q0, whose right document is d1, finds it first; q1 (d0) second, for ties rank by descending id;
    q2 (d5 and d11) at ranks 6 and 12; q3 (d119) at rank 120.
    """
    angles = np.linspace(0, np.pi / 2, 119)
    angles = np.concatenate([angles[:1], angles])
    documents = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1)
    folder = tmp_path / "OUT" / "consumed_samples640"
    write_vectors(folder, "doc", documents, [f"d{i}" for i in range(120)])
    write_vectors(folder, "query", [[1, 0, 0]] * 4, ["q0", "q1", "q2", "q3"])
    queries = tmp_path / "queries.jsonl"
    write_queries(queries, [("q0", "d1"), ("q1", "d0"), ("q2", "d5"), ("q2", "d11"), ("q3", "d119")])
    return folder, queries


def test_measures_are_right_and_written(files):
    folder, queries = files
    result = run_recipe("--embeddings", folder, "--query_files", queries)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((folder / "metrics.json").read_text())
    ideal = 1 + 1 / np.log2(3)  # of q2, which has two right documents
    expected = {
        "nDCG@10": (1 + 1 / np.log2(3) + (1 / np.log2(7)) / ideal + 0) / 4,
        "RR@10": (1 + 1 / 2 + 1 / 6 + 0) / 4,
        "R@1": (1 + 0 + 0 + 0) / 4,
        "R@10": (1 + 1 + 1 / 2 + 0) / 4,
        "R@100": (1 + 1 + 1 + 0) / 4,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    assert list(metrics)[:5] == list(expected)
    counts = {"num_queries": 4, "num_documents": 120, "num_queries_without_qrels": 0, "top_k": 100}
    assert {name: metrics[name] for name in counts} == counts
    per_query = [json.loads(line) for line in (folder / "per_query.jsonl").read_text().splitlines()]
    assert [line["query_id"] for line in per_query] == ["q0", "q1", "q2", "q3"]
    assert [line["RR@10"] for line in per_query] == pytest.approx([1, 1 / 2, 1 / 6, 0])
    run = (folder / "run.trec").read_text().splitlines()
    assert len(run) == 400
    assert run[:2] == ["q0 Q0 d1 1 1 ds_embed", "q0 Q0 d0 2 1 ds_embed"]
    assert f"nDCG@10  {expected['nDCG@10']:.4f}\nRR@10    0.4167\n" in result.stdout
    assert "documents  120, vectors of 3 dimensions" in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == [
        "metrics.json",
        "per_query.jsonl",
        "run.trec",
        "test_docs",
        "test_queries",
    ]


def test_a_tie_at_the_last_place_kept_goes_to_the_larger_id(files):
    folder, queries = files
    result = run_recipe("--embeddings", folder, "--query_files", queries, "--top_k", 1, "--measures", "R@1")
    assert result.returncode == 0, result.stderr
    assert {line.split()[2] for line in (folder / "run.trec").read_text().splitlines()} == {"d1"}
    assert json.loads((folder / "metrics.json").read_text())["R@1"] == 0.25


def test_qrels_file_measures_output_dir_and_small_corpus(files, tmp_path):
    folder, _ = files
    write_vectors(folder, "doc", [[1, 0, 0], [0.6, 0.8, 0], [0, 1, 0]], ["New York", "b", "c"])
    qrels = tmp_path / "test.tsv"
    qrels.write_text("query-id\tcorpus-id\tscore\nq0\tb\t2\nq2\tNew York\t1\n")
    flags = ["--embeddings", folder, "--qrels", qrels, "--output_dir", tmp_path / "new"]
    flags += ["--measures", "MRR@10", "R@2"]
    result = run_recipe(*flags)
    assert result.returncode == 2
    assert "doc.ids: id 'New York' holds white space" in result.stderr
    assert "--write_run false" in result.stderr
    result = run_recipe(*flags, "--write_run", "false")
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["metrics.json", "per_query.jsonl"]
    assert json.loads((tmp_path / "new/metrics.json").read_text()) == {
        "RR@10": 0.75,
        "R@2": 1.0,
        "num_queries": 2,
        "num_documents": 3,
        "num_queries_without_qrels": 2,
        "top_k": 3,
        "ignore_identical_ids": False,
    }
    assert "top_k      3 (all documents)" in result.stdout
    assert "2 without judgments, such as 'q1'" in result.stdout


def dimensions(folder, queries):
    write_vectors(folder, "query", np.ones((4, 5)), ["q0", "q1", "q2", "q3"])


def ids_without_rows(folder, queries):
    with open(folder / "test_docs/doc.ids", "a") as file:
        file.write("d120\n")


def unknown_documents(folder, queries):
    write_queries(queries, [("q0", "elsewhere"), ("q1", "d0")])


def unknown_queries(folder, queries):
    write_queries(queries, [("q0", "d0"), ("q9", "d0")])


def nan(folder, queries):
    rows = np.ones((120, 3))
    rows[77, 2] = np.nan
    write_vectors(folder, "doc", rows, [f"d{i}" for i in range(120)])


def empty_corpus(folder, queries):
    write_vectors(folder, "doc", np.ones((0, 3)), [])


def no_folder(folder, queries):
    folder.rename(folder.with_name("elsewhere"))


def no_right_document(folder, queries):
    queries.write_text('{"query": "x", "query_id": "q0"}\n')


def broken_queries(folder, queries):
    queries.write_text('{"query": "x", \n')


def nothing(folder, queries):
    pass


@pytest.mark.parametrize(
    "spoil, flags, message",
    [
        (dimensions, [], "query.npy has 5 dimensions and "),
        (ids_without_rows, [], "doc.ids has 121 ids and "),
        (unknown_documents, [], "1 of 2 relevant document ids are not in the corpus, such as 'elsewhere'"),
        (unknown_queries, [], "1 of 2 judged queries were not searched for, such as 'q9'"),
        (nan, [], "doc.npy: row 77 (id 'd77') holds NaN"),
        (empty_corpus, [], "doc.npy has no rows"),
        (no_folder, [], "consumed_samples640: no such folder"),
        (no_right_document, [], "queries.jsonl:1: doc_id is missing"),
        (broken_queries, [], "queries.jsonl:1: not JSON"),
        (nothing, ["--top_k", "50"], "measure R@100 looks at 100 documents but top_k keeps 50"),
        (nothing, ["--top_k", "0"], "--top_k 0: must be at least 1"),
        (nothing, ["--measures", "recall"], "measure 'recall': not known here"),
        (nothing, ["--qrels", "nowhere.tsv"], "nowhere.tsv: no such file"),
        (nothing, ["--device", "abacus"], "device 'abacus'"),
        (nothing, ["--topk", "10"], "--topk"),
    ],
)
def test_mistakes_are_one_clear_line_and_leave_nothing(files, spoil, flags, message, capsys):
    folder, queries = files
    spoil(folder, queries)
    before = sorted(folder.rglob("*"))
    argv = ["--embeddings", str(folder), "--query_files", str(queries), *flags]
    assert ranks.run_recipe(lambda: recipe.main(argv)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors
    assert "Traceback" not in errors and errors.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_judgments_are_required(files):
    result = run_recipe("--embeddings", files[0])
    assert result.returncode == 2 and "--query_files and --qrels are both missing" in result.stderr


def test_one_call_with_everything(files, tmp_path):
    """Graded judgments of another set, compressed vectors, and a comparison with a run file measured before."""
    folder, _ = files
    rng = np.random.default_rng(6)
    documents = rng.standard_normal((120, 16))
    queries = documents[[3, 40, 80, 99]] + 0.3 * rng.standard_normal((4, 16))
    for kind, rows, names in (("doc", documents, [f"d{i}" for i in range(120)]), ("query", queries, "wxyz")):
        write_vectors(folder, kind, rows / np.linalg.norm(rows, axis=1, keepdims=True), names)
    qrels = tmp_path / "test.tsv"
    qrels.write_text(
        "query-id\tcorpus-id\tscore\nw\td3\t2\nw\td5\t1\nx\td40\t1\nx\td9\t0\ny\td80\t1\nz\td99\t1\n"
        "z\tnowhere\t1\nu\td1\t1\n"
    )
    other, ours = tmp_path / "bm25", tmp_path / "ours"
    run_file = tmp_path / "bm25.trec"
    run_file.write_text("w Q0 d5 1 9 bm25\nx Q0 d40 1 7 bm25\ny Q0 d1 1 3 bm25\nz Q0 d1 1 3 bm25\nv Q0 d1 1 3 bm25\n")
    flags = ["--qrels", str(qrels), "--measures", "nDCG@10", "R@100"]
    with pytest.raises(
        ValueError, match="test.tsv: 1 of 5 judged queries were not searched for, such as 'u'.*--skip_unknown"
    ):
        recipe.main(["--embeddings", str(folder), *flags])
    flags += ["--skip_unknown", "true"]
    recipe.main(["--run_file", str(run_file), "--output_dir", str(other), *flags])
    assert sorted(path.name for path in other.iterdir()) == ["metrics.json", "per_query.jsonl"]
    measured = json.loads((other / "metrics.json").read_text())
    best = 2 + 1 / np.log2(3)
    assert measured["nDCG@10"] == pytest.approx((1 / best + 1 + 0 + 0) / 4) and measured["R@100"] == 1.5 / 4
    assert measured["num_queries_without_qrels"] == 1 and measured["num_judged_queries_without_vector"] == 1

    more = ["--compare", other, "--truncate_dims", 4, 8, "--quantize", "int8", "binary", "--rescore_multiplier", 2]
    result = run_recipe("--embeddings", folder, "--output_dir", ours, *flags, *more)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((ours / "metrics.json").read_text())
    assert metrics["num_relevant_documents_without_vector"] == 1
    assert metrics["R@100"] <= 0.875  # `nowhere` counts as not retrieved
    stored = [(entry["kind"], entry["dims"], entry["bytes_per_vector"]) for entry in metrics["compressed_vectors"]]
    assert stored == [
        (kind, dims, size)
        for dims in (16, 4, 8)
        for kind, size in (
            ("float32", 4 * dims),
            ("int8", dims),
            ("binary", -(-dims // 8)),
            ("binary, rescored x2", -(-dims // 8)),
        )
    ]
    assert metrics["compressed_vectors"][0]["nDCG@10"] == metrics["nDCG@10"]
    assert metrics["compressed_vectors"][1]["nDCG@10"] == pytest.approx(metrics["nDCG@10"], abs=0.05)
    (ndcg, _) = metrics["comparison"]
    assert ndcg["difference"] == pytest.approx(metrics["nDCG@10"] - measured["nDCG@10"])
    assert ndcg["better"] + ndcg["equal"] + ndcg["worse"] == 4 and metrics["compared_with"] == str(other)
    assert "1 judged queries without vector" in result.stdout and "1 relevant documents without vector" in result.stdout
    assert f"compared with {other}, 4 queries" in result.stdout and "bytes/vector" in result.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--run_file", "x.trec"], "give either --embeddings or --run_file"),
        (["--truncate_dims", "3"], "--truncate_dims 3: the vectors have 3 dimensions; choose fewer"),
        (["--truncate_dims", "0"], "--truncate_dims 0: each must be at least 1"),
        (["--quantize", "int4"], "--quantize int4: choose one of int8, binary"),
        (["--rescore_multiplier", "-1"], "--rescore_multiplier -1: must be at least 0"),
        (["--compare", "."], "--compare .: has no per_query.jsonl"),
    ],
)
def test_mistakes_in_what_else_to_measure(files, tmp_path, monkeypatch, flags, message):
    folder, queries = files
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        recipe.main(["--embeddings", str(folder), "--query_files", str(queries), *flags])
    assert message in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["test_docs", "test_queries"]


def test_a_run_file_needs_no_vectors_and_has_none(files, tmp_path, capsys):
    run = tmp_path / "run.trec"
    run.write_text("q0 Q0 d1 1 0.5 x\n")
    flags = ["--run_file", str(run), "--query_files", str(files[1])]
    with pytest.raises(ValueError, match="--output_dir is missing"):
        recipe.main(flags)
    with pytest.raises(ValueError, match="--quantize int8: has no effect without --embeddings"):
        recipe.main([*flags, "--quantize", "int8"])
    with pytest.raises(ValueError, match="3 of 4 judged queries were not searched for"):
        recipe.main([*flags, "--output_dir", str(tmp_path / "out")])
    (tmp_path / "qrels").write_text("q0 0 d1 1\nq1 0 d1 0\nq2 0 d1 -1\n")
    run.write_text("q0 Q0 d1 1 0.5 x\nq1 Q0 d1 1 0.5 x\nq2 Q0 d1 1 0.5 x\n")
    recipe.main(
        [*flags[:2], "--qrels", str(tmp_path / "qrels"), "--output_dir", str(tmp_path / "out"), "--measures", "R@1"]
    )
    said = capsys.readouterr().out
    assert "2 queries, such as 'q1', have no relevant document and count as 0" in said and "R@1  0.3333" in said


def test_two_ranks_write_what_one_process_writes(tmp_path):
    """Exact search shared by ranks, of int8 vectors too, with every way of smaller vectors; ties and odd sizes included."""
    rng = np.random.default_rng(3)
    rows = {"query": rng.integers(-2, 3, (37, 12)), "doc": rng.integers(-2, 3, (301, 12))}
    queries = tmp_path / "queries.jsonl"
    write_queries(queries, [(f"query{i}", f"doc{7 * i}") for i in range(37)])
    for dtype in ("float32", "int8"):
        folder = tmp_path / dtype
        for kind, values in rows.items():
            numbers, *scales = stored_numbers(values.astype(np.float32), dtype)
            write_vectors(folder, kind, values, [f"{kind}{i}" for i in range(len(values))])
            for name, array in zip((f"{kind}.npy", f"{kind}.scales.npy"), (numbers, *scales)):
                np.save(folder / {"query": "test_queries", "doc": "test_docs"}[kind] / name, array)
        flags = ["--embeddings", folder, "--query_files", queries, "--truncate_dims", 5, "--quantize", "int8", "binary"]
        flags += ["--top_k", 100, "--ignore_identical_ids", "true"]
        check(launch(0, "recipes/evaluate.py", *flags, "--output_dir", tmp_path / "alone"))
        result = check(launch(2, "recipes/evaluate.py", *flags, "--output_dir", tmp_path / "ranks"))
        assert result.stdout.count("searched   in") == 1 and "ranks      2, each searches its share" in result.stdout
        for name in ("metrics.json", "per_query.jsonl", "run.trec"):
            assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "ranks" / name).read_bytes(), (dtype, name)
        if dtype == "float32":
            rows["doc"] = rows["doc"] * rng.uniform(0.1, 1, (301, 1))
    refused = launch(2, "recipes/evaluate.py", *flags, "--index", "flat")
    assert refused.returncode == 2 and refused.stderr.count("--index flat: FAISS searches in one process") == 1
    write_vectors(folder, "doc", np.where(np.arange(301)[:, None] == 280, np.nan, rows["doc"]), map(str, range(301)))
    refused = launch(2, "recipes/evaluate.py", *flags)
    assert refused.returncode == 2 and refused.stderr.count("row 280 (id '280') holds NaN") == 1
    assert "Traceback" not in refused.stderr
