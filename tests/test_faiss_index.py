"""FAISS indexes: what they find, the file that others read, and the recipes that build and search them."""

import json
import runpy
import subprocess
import sys

import faiss
import numpy as np
import pytest
from mining_material import write_vectors
from tiny import REPOSITORY, launch_environment

from ds_embed.settings.tool_arguments import IndexArguments, SearchIndexArguments
from ds_embed.vectors.faiss_index import build_index, read_index, search_by_arguments, write_index
from ds_embed.vectors.search import search

KINDS = ("flat", "hnsw", "ivf")


@pytest.fixture(scope="module")
def rows():
    """2,000 documents around 40 centres, as texts are, and 50 queries near some of them."""
    rng = np.random.default_rng(0)
    documents = np.repeat(rng.standard_normal((40, 24)), 50, axis=0) + 0.6 * rng.standard_normal((2000, 24))
    queries = documents[::40] + 0.3 * rng.standard_normal((50, 24))
    documents, queries = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (documents, queries))
    return queries.astype(np.float32), documents.astype(np.float32)


def recipe(name, *flags):
    return runpy.run_path(str(REPOSITORY / "recipes" / f"{name}.py"))["main"]([str(flag) for flag in flags])


@pytest.mark.parametrize("kind", KINDS)
def test_finds_nearly_what_exact_search_finds_with_its_scores(rows, kind):
    queries, documents = rows
    ranks = np.random.default_rng(1).permutation(len(documents))
    exact_scores, exact = search(queries, documents, 10, tie_rank=ranks)
    scores, found, description = search_by_arguments(
        SearchIndexArguments(index=kind), queries, documents, 10, tie_rank=ranks
    )
    assert description.startswith(kind)
    recall = (found[:, :, None] == exact[:, None]).any(2).mean()
    assert recall == 1 if kind == "flat" else recall > 0.95
    right = (found == exact).all(axis=1)
    assert right.mean() > 0.6
    np.testing.assert_array_equal(scores[right], exact_scores[right])  # float64 sums, whatever FAISS says
    assert (np.diff(scores, axis=1) <= 0).all()
    expected = np.einsum("nd,nkd->nk", queries.astype(np.float64), documents.astype(np.float64)[found])
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_parameters_reach_the_index(rows):
    queries, documents = rows
    index = build_index("hnsw", documents, IndexArguments(hnsw_links=8, hnsw_ef_construction=33, hnsw_ef_search=44))
    assert (index.hnsw.nb_neighbors(1), index.hnsw.efConstruction, index.hnsw.efSearch) == (8, 33, 44)
    index = build_index("ivf", documents, IndexArguments(ivf_lists=20, ivf_probes=3))
    assert (index.nlist, index.nprobe) == (20, 3)
    assert build_index("ivf", documents, IndexArguments()).nlist == 2000 // 39
    settings = {"index": "ivf", "ivf_lists": 500, "ivf_probes": 1}  # 4 documents a cell, on average
    scores, found, _ = search_by_arguments(
        SearchIndexArguments(**settings), queries, documents, 30, tie_rank=np.arange(len(documents))
    )
    assert (found == -1).any() and (scores[found == -1] == -np.inf).all()
    assert (np.sort(found < 0, axis=1) == (found < 0)).all()  # those that are missing come last
    with pytest.raises(ValueError, match="--ivf_lists 9999: there are 2000 documents"):
        build_index("ivf", documents, IndexArguments(ivf_lists=9999))
    with pytest.raises(ValueError, match="--hnsw_links 1: must be at least 2"):
        IndexArguments(hnsw_links=1)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_read_by_faiss_and_checked_by_us(rows, tmp_path, kind):
    queries, documents = rows
    path = tmp_path / "new" / "docs.faiss"
    write_index(build_index(kind, documents, IndexArguments()), path)
    assert [entry.name for entry in path.parent.iterdir()] == ["docs.faiss"]
    index = faiss.read_index(str(path))
    assert (index.ntotal, index.d, index.metric_type) == (2000, 24, faiss.METRIC_INNER_PRODUCT)
    _, found = index.search(queries, 1)  # with nothing but FAISS, good parameters stand in the file
    assert (found == search(queries, documents, 1)[1]).mean() > 0.95
    read_index(path, documents)
    changed = documents.copy()
    changed[1999] += 1e-3
    for other, message in (
        (documents[:-1], "holds 2000 documents of 24 dimensions, and the embeddings have 1999 of 24"),
        (documents[:, :-1], "have 2000 of 23"),
        (changed, "row 1999 is not that of the embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            read_index(path, other)
    (tmp_path / "cut.faiss").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut.faiss: not a whole FAISS index"):
        read_index(tmp_path / "cut.faiss", documents)
    with pytest.raises(ValueError, match="no such file"):
        read_index(tmp_path / "absent", documents)


def test_recipes_build_and_measure(rows, tmp_path, capsys):
    queries, documents = rows
    folder = write_vectors(
        tmp_path / "consumed_samples0",
        {f"q{i}": row for i, row in enumerate(queries)},
        {f"d{i}": row for i, row in enumerate(documents)},
    )
    lines = [{"query": "x" * i, "query_id": f"q{i}", "doc_id": f"d{40 * i}"} for i in range(50)]
    lines[0]["query"] = "y"
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = ["--embeddings", folder, "--query_files", tmp_path / "queries.jsonl", "--output_dir"]
    recipe("evaluate", *common, tmp_path / "exact")
    exact = json.loads((tmp_path / "exact" / "metrics.json").read_text())
    assert "index" not in exact
    recipe("build_index", "--embeddings", folder, "--index", "ivf", "--output_file", tmp_path / "docs.faiss")
    assert faiss.read_index(str(tmp_path / "docs.faiss")).ntotal == 2000
    capsys.readouterr()
    recalls = {}
    for name, flags in (
        ("hnsw", ["--index", "hnsw"]),
        ("file", ["--index_file", tmp_path / "docs.faiss"]),
        ("few", ["--index", "ivf", "--ivf_lists", 300, "--ivf_probes", 1]),
    ):
        recipe("evaluate", *common, tmp_path / name, *flags)
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        kind = "hnsw" if name == "hnsw" else "ivf"
        assert metrics["index"].startswith(kind) and metrics["index_recall_queries"] == 50
        recall = metrics["index_recall@10"]
        assert f"index      {metrics['index']}: recall@10 against exact search {recall:.4f}" in capsys.readouterr().out
        recalls[name] = recall
        if name == "few":
            run = (tmp_path / "few" / "run.trec").read_text()
            assert recall < 0.9 and len(run.splitlines()) < 5000 and "inf" not in run
        else:
            assert recall > 0.95 and metrics["R@10"] == pytest.approx(exact["R@10"], abs=0.05)
    recipe("evaluate", *common, tmp_path / "one", "--index_file", tmp_path / "docs.faiss", "--ivf_probes", 1)
    metrics = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert metrics["index"].endswith("ivf_probes 1)") and metrics["index_recall@10"] < recalls["file"]
    with pytest.raises(ValueError, match="--index_file and --index hnsw: give only one"):
        recipe("evaluate", *common, tmp_path / "x", "--index", "hnsw", "--index_file", tmp_path / "docs.faiss")
    with pytest.raises(ValueError, match="--index annoy: choose one of"):
        recipe("evaluate", *common, tmp_path / "x", "--index", "annoy")


def test_threads_are_those_of_torch():
    """FAISS brings an OpenMP of its own, which, imported first, does not hear of torch's threads."""
    code = (
        "import faiss, torch, numpy as np\n"
        "from ds_embed.settings.tool_arguments import IndexArguments\n"
        "from ds_embed.vectors.faiss_index import build_index\n"
        "torch.set_num_threads(2)\n"
        "rows = np.random.default_rng(0).standard_normal((3000, 64), dtype=np.float32)\n"
        "index = build_index('flat', rows, IndexArguments())\n"
        "assert faiss.omp_get_max_threads() == torch.get_num_threads() == 2\n"
        "product = torch.from_numpy(rows) @ torch.from_numpy(rows).T\n"  # both at work in one process
        "assert (index.search(rows, 1)[1][:, 0] == product.argmax(1).numpy()).all()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], env=launch_environment() | {"PYTHONPATH": str(REPOSITORY)})
    assert result.returncode == 0
