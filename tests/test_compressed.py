"""Fewer dimensions, bytes and bits: each against a few lines of numpy, in blocks of every size, ties included."""

from types import SimpleNamespace

import numpy as np
import pytest

from ds_embed.vectors import compressed
from ds_embed.vectors.compressed import hamming_search, quantized_int8, search_compressed, sign_bytes, truncated


def unit_rows(rng, num_rows, dims):
    rows = rng.standard_normal((num_rows, dims)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ranked(scores, tie_rank, k):
    return np.lexsort((-np.broadcast_to(tie_rank, scores.shape), -scores), axis=1)[:, :k]


def found(queries, documents, k, tie_rank, **changes):
    settings = {"truncate_dims": [], "quantize": [], "rescore_multiplier": 0} | changes
    results = search_compressed(queries, documents, k, tie_rank=tie_rank, device="cpu", **settings)
    return {(result.kind, result.dims): result for result in results}


@pytest.mark.parametrize("block_bytes", [100, 64 << 20])
def test_equals_plain_numpy(monkeypatch, block_bytes):
    monkeypatch.setattr(compressed, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    queries, documents = unit_rows(rng, 70, 24), unit_rows(rng, 300, 24)
    documents[7:60, :12] = 0  # nothing left of them when cut to 12
    documents[:, 5] = 0.125  # a dimension with one value
    tie_rank, k = rng.permutation(300), 9
    results = found(
        queries, documents, k, tie_rank, truncate_dims=[12], quantize=["int8", "binary"], rescore_multiplier=3
    )
    assert [(kind, dims, r.bytes_per_vector) for (kind, dims), r in results.items()] == [
        ("float32", 24, 96),
        ("int8", 24, 24),
        ("binary", 24, 3),
        ("binary, rescored x3", 24, 3),
        ("float32", 12, 48),
        ("int8", 12, 12),
        ("binary", 12, 2),
        ("binary, rescored x3", 12, 2),
    ]
    for dims in (24, 12):
        short = [rows[:, :dims].astype(np.float64) for rows in (queries, documents)]
        if dims == 12:
            short = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30) for rows in short]
        query_rows, document_rows = short
        signs = np.where(document_rows > 0, 1.0, -1.0)
        hamming = (np.where(query_rows > 0, 1.0, -1.0)) @ signs.T
        result = results["binary", dims]
        np.testing.assert_array_equal(result.indices, ranked(hamming, tie_rank, k))
        np.testing.assert_array_equal(result.scores, np.take_along_axis(hamming, result.indices, axis=1))
        candidates = ranked(hamming, tie_rank, 3 * k)
        for row, result_row in enumerate(results["binary, rescored x3", dims].indices):
            scores = (signs[candidates[row]] @ query_rows[row]).astype(np.float32)
            best = ranked(scores[None], tie_rank[candidates[row]], k)[0]
            np.testing.assert_array_equal(result_row, candidates[row][best])
        scores = results["float32", dims].scores
        exact = query_rows @ document_rows.T
        np.testing.assert_allclose(scores, -np.sort(-exact, axis=1)[:, :k], atol=1e-6)
        # An 8-bit value is at most half a step away; the steps are (max - min) / 255 of each dimension.
        step = np.ptp(document_rows, axis=0) / 255
        cut = truncated(documents, dims)
        restored = quantized_int8(cut)[:]
        assert (abs(restored - cut[:]) <= step / 2 + 1e-6).all() and restored.shape == (300, dims)
        best = results["int8", dims]
        np.testing.assert_allclose(
            best.scores, -np.sort(-(query_rows @ restored.T.astype(np.float64)), axis=1)[:, :k], atol=1e-6
        )


def test_hamming_distances_of_odd_widths_tie_by_rank():
    rng = np.random.default_rng(1)
    for dims in (1, 63, 64, 65, 200):
        queries, documents = rng.standard_normal((2, 130, dims))[:, :].astype(np.float32)
        bits = [np.asarray(rows > 0) for rows in (queries, documents)]
        distances = (bits[0][:, None] != bits[1][None]).sum(axis=2)
        tie_rank = rng.permutation(130)
        expected = ranked(-distances, tie_rank, 130)
        for k in (1, 17, 130):
            got, indices = hamming_search(sign_bytes(queries), sign_bytes(documents), k, tie_rank)
            np.testing.assert_array_equal(indices, expected[:, :k])
            np.testing.assert_array_equal(got, np.take_along_axis(distances, indices, axis=1))


def test_documents_are_never_held_whole(tmp_path):
    """Rows are computed where they are read: of a memory map only the rows asked for are touched."""
    touched = []

    class Watched(np.ndarray):
        def __getitem__(self, chosen):
            if isinstance(chosen, slice):
                touched.append(len(range(*chosen.indices(len(self)))))
            return super().__getitem__(chosen)

    rows = np.random.default_rng(2).standard_normal((5000, 64)).astype(np.float32).view(Watched)
    cut = truncated(rows, 16)
    assert cut.shape == (5000, 16) and len(cut) == 5000 and not touched
    np.testing.assert_allclose(np.linalg.norm(cut[10:20], axis=1), 1, atol=1e-6)
    assert touched[0] == 10


def test_rescoring_asks_for_no_more_than_there_is():
    rng = np.random.default_rng(4)
    queries, documents = unit_rows(rng, 3, 8), unit_rows(rng, 5, 8)
    results = found(queries, documents, 4, np.arange(5), quantize=["binary"], rescore_multiplier=4)
    assert results["binary, rescored x4", 8].indices.shape == (3, 4)
    assert ("binary, rescored x4", 8) not in found(queries, documents, 4, np.arange(5), quantize=["binary"])


def test_levels_of_int8_are_those_of_all_ranks():
    rows = np.random.default_rng(4).normal(size=(11, 3)).astype(np.float32) * np.linspace(0.1, 3, 11)[:, None]
    rows, told = rows.astype(np.float32), []

    def rank_of_two(rank, answer):
        return SimpleNamespace(rank=rank, size=2, max=lambda values: told.append(values) or answer or values)

    for rank in range(2):
        quantized_int8(rows, rank_of_two(rank, None))
    together = [max(pair) for pair in zip(*told)]
    for rank in range(2):
        assert np.array_equal(quantized_int8(rows, rank_of_two(rank, together))[:], quantized_int8(rows)[:])
