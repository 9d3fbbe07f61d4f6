"""Exact search against a few lines of float64 numpy.

Shapes: N queries, M documents, D dimensions, K kept documents (k).
"""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from tiny import leave_out_when_fast

from ds_embed.vectors import search as search_module
from ds_embed.vectors.search import search


def plain_search(queries, documents, k, tie_rank):
    """All scores in float64, rounded once; a full sort by score, then by rank, both descending."""
    scores = (queries.astype(np.float64) @ documents.astype(np.float64).T).astype(np.float32)
    order = np.stack([np.lexsort((-tie_rank, -row)) for row in scores.astype(np.float64)])[:, :k]
    return np.take_along_axis(scores, order, axis=1), order


def assert_same(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64


def make_rows(rng, kind, n, dimensions):
    if kind == "continuous":
        return rng.standard_normal((n, dimensions)).astype(np.float32)
    if kind == "few_values":  # small integers: products and sums are exact, and most scores tie
        return rng.integers(-1, 2, (n, dimensions)).astype(np.float32)
    copies = rng.standard_normal((max(1, n // 50), dimensions)).astype(np.float32)
    return copies[rng.integers(0, len(copies), n)]


@pytest.mark.parametrize("kind", ["continuous", "few_values", "copies"])
def test_equals_plain_search(kind):
    rng = np.random.default_rng(7)
    for _ in range(40):
        num_queries, num_documents = int(rng.integers(1, 40)), int(rng.integers(1, 700))
        dimensions, k = int(rng.integers(1, 40)), int(rng.integers(1, num_documents + 1))
        if rng.random() < 0.7:
            k = min(k, 12)  # far fewer than M, so that something is left out
        queries = make_rows(rng, kind, num_queries, dimensions)
        documents = make_rows(rng, kind, num_documents, dimensions)
        tie_rank = rng.permutation(num_documents)
        blocks = {"query_block": int(rng.integers(1, 50)), "document_block": int(rng.integers(1, 800))}
        found = search(queries, documents, k, tie_rank=tie_rank, **blocks)
        assert_same(found, plain_search(queries, documents, k, tie_rank))


@pytest.mark.parametrize("document_block", [1, 3, 64, 1000, None])
def test_ties_across_the_last_place_and_across_blocks(document_block):
    # 300 documents tie for places 2 to 301 and k is 5: rank alone decides, wherever the blocks end.
    documents = np.ones((400, 4), dtype=np.float32)
    documents[:99] = -1.0
    documents[99] = 2.0
    queries = np.full((3, 4), 0.5, dtype=np.float32)
    tie_rank = np.random.default_rng(1).permutation(400)
    scores, indices = search(queries, documents, 5, tie_rank=tie_rank, document_block=document_block)
    by_rank = sorted(range(100, 400), key=lambda i: -tie_rank[i])
    assert indices.tolist() == [[99] + by_rank[:4]] * 3
    assert scores.tolist() == [[4.0, 2.0, 2.0, 2.0, 2.0]] * 3


def test_equal_vectors_score_equal_whatever_the_blocks():
    # fp32 products of one row can differ in the last bit with its place in a block; these must not.
    rng = np.random.default_rng(2)
    one = rng.standard_normal((1, 384)).astype(np.float32)
    documents = np.repeat(one, 3001, axis=0)
    queries = rng.standard_normal((5, 384)).astype(np.float32)
    for query_block, document_block in [(1, 7), (5, 1000), (2, 3001)]:
        blocks = {"query_block": query_block, "document_block": document_block}
        scores, indices = search(queries, documents, 40, **blocks)
        assert indices.tolist() == [list(range(40))] * 5  # no tie_rank: the earlier row first
        assert (scores == scores[:, :1]).all()


def test_near_ties_beyond_the_margin_are_ordered_exactly():
    # 2,000 scores closer together than fp32 can tell: what a model that has collapsed gives.
    rng = np.random.default_rng(3)
    base = rng.standard_normal(256)
    documents = (base + 3e-7 * rng.standard_normal((2000, 256))).astype(np.float32)
    queries = (base + 0.1 * rng.standard_normal((4, 256))).astype(np.float32)
    tie_rank = rng.permutation(2000)
    expected = plain_search(queries, documents, 10, tie_rank)
    for document_block in (100, 333, 2000):
        found = search(queries, documents, 10, tie_rank=tie_rank, document_block=document_block)
        assert_same(found, expected)


def test_ordinary_vectors_need_no_second_pass(monkeypatch):
    def forbidden(*_):
        raise AssertionError("the slow pass ran")

    monkeypatch.setattr(search_module, "_search_exactly", forbidden)
    rng = np.random.default_rng(4)
    documents = rng.standard_normal((5000, 64)).astype(np.float32)
    search(documents[:20], documents, 10, document_block=1024)


def test_negative_and_signed_zero_scores():
    documents = np.array([[-1.0], [0.0], [-0.0], [-2.0], [-3.0]], dtype=np.float32)
    scores, indices = search(np.ones((1, 1), np.float32), documents, 5, tie_rank=np.arange(5))
    assert indices.tolist() == [[2, 1, 0, 3, 4]]
    assert scores.tolist() == [[0.0, 0.0, -1.0, -2.0, -3.0]]
    # Products too small for float32 round to 0.0 and -0.0, which are one score.
    tiny = np.array([[1e-30], [-1e-30], [0.0], [-1e-30]], dtype=np.float32)
    assert search(tiny[:1], tiny, 4)[1].tolist() == [[0, 1, 2, 3]]


def test_autocast_and_precision_of_a_training_run_change_nothing(monkeypatch):
    # Scores a thousandth apart: bf16 products would choose the candidates by chance.
    rng = np.random.default_rng(5)
    base = rng.standard_normal(128)
    documents = (base + 1e-3 * rng.standard_normal((3000, 128))).astype(np.float32)
    queries = (base + 0.1 * rng.standard_normal((10, 128))).astype(np.float32)
    expected = plain_search(queries, documents, 5, np.arange(3000)[::-1])
    matmul, used = torch.backends.mkldnn.matmul, set()

    def observed(*args, score=search_module.pair_scores):
        used.add(matmul.fp32_precision)
        return score(*args)

    monkeypatch.setattr(search_module, "pair_scores", observed)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        allowed = matmul.fp32_precision
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(search(queries, documents, 5), expected)
        assert used == {"ieee"} and matmul.fp32_precision == allowed != "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_memory_is_bounded_by_the_blocks(tmp_path):
    leave_out_when_fast()
    # The documents take 154 MB; private memory may grow by 60 MB, so no copy of them can exist.
    np.save(tmp_path / "doc.npy", np.random.default_rng(6).standard_normal((600_000, 64), dtype=np.float32))
    code = textwrap.dedent("""
        import resource, sys
        import numpy as np, torch
        from ds_embed.vectors.search import search
        torch.set_num_threads(1)
        documents = np.load(sys.argv[1], mmap_mode="r")
        small = np.array(documents[:3000])
        search(small[:8], small, 10, query_block=8, document_block=1000)  # what is allocated once
        status = open("/proc/self/status").read()
        used = int(status.split("VmData:")[1].split()[0]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (60 << 20), resource.RLIM_INFINITY))
        print(search(small[:8], documents, 10, query_block=8, document_block=20_000)[1][:, 0].tolist())
    """)
    command = [sys.executable, "-c", code, str(tmp_path / "doc.npy")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout.strip() == str(list(range(8))), result.stderr


def test_bad_arguments_are_named():
    rows = np.ones((3, 4), dtype=np.float32)
    for k in (0, 4):
        with pytest.raises(AssertionError, match=f"k is {k} and there are 3 documents"):
            search(rows, rows, k)
    with pytest.raises(ValueError, match="4 dimensions, documents 2"):
        search(rows, rows[:, :2], 1)
    for odd in (rows.astype(np.float64), rows[:0]):
        with pytest.raises(AssertionError, match="not float32"):
            search(odd, rows, 1)
    for device in ("cuda:99", "abacus", "meta"):
        with pytest.raises(ValueError, match=f"device '{device}'"):
            search(rows, rows, 1, device=device)
    with pytest.raises(AssertionError, match="not a ranking"):
        search(rows, rows, 1, tie_rank=np.array([0, 1, 1]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_scores_that_are_not_finite(value):
    documents = np.ones((500, 8), dtype=np.float32)
    documents[321, 3:5] = value
    queries = np.full((2, 8), 10.0, dtype=np.float32)
    if value == -np.inf:  # it ends up last and is left out, unless it is asked for
        assert 321 not in search(queries, documents, 5)[1]
        with pytest.raises(ValueError, match="document row 321 is not finite"):
            search(queries, documents, 500)
        return
    with pytest.raises(ValueError, match="query row 0 and document row 321 is not finite"):
        search(queries, documents, 5, document_block=100)
