"""What retrieval loses when vectors take less room: fewer dimensions, bytes or bits in place of floats.

Shapes: n rows (N queries, M documents), D dimensions, d of them kept, k documents for each query.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from ds_embed.job.ranks import World
from ds_embed.vectors.metrics import Qrels, SearchRun, evaluate, without_identical
from ds_embed.vectors.vectors import StoredRows, Vectors, part_of

QUANTIZED = ("int8", "binary")
_BLOCK_BYTES = 64 << 20


class Found(NamedTuple):
    """One way to store the documents, and the k best of them for each query, best first: both (N, k)."""

    kind: str
    dims: int
    bytes_per_vector: int
    scores: np.ndarray
    indices: np.ndarray


class ChangedRows:
    """A float32 (n, d) array whose rows are computed as they are read, so that none has to be held."""

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, rows: "np.ndarray | ChangedRows", change: Callable[[np.ndarray], np.ndarray], dims: int):
        self._rows = rows
        self._change = change
        self.shape = (len(rows), dims)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        return self._change(np.asarray(self._rows[chosen])).astype(np.float32, copy=False)

    def between(self, low: int, high: int) -> "ChangedRows":
        """Rows low to high - 1; nothing is computed."""
        return ChangedRows(part_of(self._rows, low, high), self._change, self.shape[1])


def truncated(rows: np.ndarray, dims: int) -> "np.ndarray | ChangedRows":
    """The first d dimensions, scaled to length 1 (Matryoshka); all D as they are."""
    if dims == rows.shape[1]:
        return rows

    def change(block: np.ndarray) -> np.ndarray:
        block = block[:, :dims]
        lengths = np.linalg.norm(block, axis=1, keepdims=True)
        return block / np.where(lengths > 0, lengths, 1)

    return ChangedRows(rows, change, dims)


def measure_compressed(
    queries: Vectors, documents: Vectors, k: int, qrels: Qrels, measures: list[str], ignore_identical_ids: bool, **how
) -> list[dict]:
    """{kind, dims, bytes_per_vector, measure: mean ...} of each way to store the documents; see search_compressed."""
    entries, depth = [], min(k + ignore_identical_ids, len(documents))
    found = search_compressed(queries.rows, documents.rows, depth, tie_rank=documents.ids.ranks, **how)
    for kind, dims, size, scores, indices in found:
        if ignore_identical_ids:
            scores, indices = without_identical(queries.ids, documents.ids, scores, indices, k)
        means = evaluate(SearchRun(queries.ids, documents.ids, scores, indices), qrels, measures).means
        entries.append({"kind": kind, "dims": dims, "bytes_per_vector": size} | means)
    return entries


def describe_compressed(entries: Sequence[dict], measures: Sequence[str]) -> list[str]:
    """A table, a line for each entry of measure_compressed under a header."""
    width = max(len(entry["kind"]) for entry in entries)
    lines = [f"{'vectors':<{width}}   dims  bytes/vector  " + "  ".join(f"{name:>8}" for name in measures)]
    for entry in entries:
        means = "  ".join(f"{entry[name]:>{max(8, len(name))}.4f}" for name in measures)
        lines.append(f"{entry['kind']:<{width}}  {entry['dims']:>5}  {entry['bytes_per_vector']:>12}  {means}")
    return lines


def search_compressed(
    queries: np.ndarray,
    documents: np.ndarray,
    k: int,
    *,
    truncate_dims: Sequence[int],
    quantize: Sequence[str],
    rescore_multiplier: int,
    tie_rank: np.ndarray,
    device: str,
    world: World | None = None,
) -> Iterator[Found]:
    """Search exactly with every asked-for number of dimensions and kind of numbers; the vectors as stored come first.

    The queries stay float32; only stored documents are quantized. binary compares signs by Hamming
    distance; with a `rescore_multiplier` above 0 a second result reorders that many times k by the inner
    product of the float32 query with the document's signs. Ties go to the larger `tie_rank`.
    With a world every rank must call this and searches a share; signs are the first rank's, which alone gets binary.
    """
    from ds_embed.vectors.search import search_sharded  # torch takes seconds to import

    world = world or World.alone()
    search = partial(search_sharded, world, k=k, tie_rank=tie_rank, device=device)
    for dims in (queries.shape[1], *truncate_dims):
        query_rows, document_rows = truncated(queries, dims), truncated(documents, dims)
        kind, size = "float32", 4 * dims
        if isinstance(document_rows, StoredRows):
            kind, size = f"{document_rows.stored_dtype}, as stored", document_rows.bytes_per_vector
        yield Found(kind, dims, size, *search(query_rows, document_rows))
        if "int8" in quantize:
            yield Found("int8", dims, dims, *search(query_rows, quantized_int8(document_rows, world)))
        if "binary" in quantize and world.is_main:
            query_signs, document_signs = sign_bytes(query_rows), sign_bytes(document_rows)
            size = -(-dims // 8)
            depth = min(len(documents), max(1, rescore_multiplier) * k)
            distances, indices = hamming_search(query_signs, document_signs, depth, tie_rank)
            scores = (dims - 2 * distances).astype(np.float32)  # inner products of the signs
            yield Found("binary", dims, size, scores[:, :k], indices[:, :k])
            if rescore_multiplier:
                name = f"binary, rescored x{rescore_multiplier}"
                yield Found(name, dims, size, *_rescored(query_rows, document_rows, indices, k, tie_rank))


def quantized_int8(documents: np.ndarray | ChangedRows, world: World | None = None) -> ChangedRows:
    """The documents as 8-bit numbers give them back: 256 levels between each dimension's least and largest value."""
    world = world or World.alone()
    low, high = np.full((2, documents.shape[1]), [[np.inf], [-np.inf]], np.float32)
    own = (len(documents) * rank // world.size for rank in (world.rank, world.rank + 1))
    for block in _row_blocks(part_of(documents, *own)):
        low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
    minus_low, high = np.array(world.max([*-low, *high]), np.float32).reshape(2, -1)
    low = -minus_low
    step = (high - low) / np.float32(255)
    step[step == 0] = 1  # one value is all there is

    def change(block: np.ndarray) -> np.ndarray:
        levels = np.rint((block - low) / step).astype(np.uint8)
        return low + levels * step

    return ChangedRows(documents, change, documents.shape[1])


def sign_bytes(rows: np.ndarray | ChangedRows) -> np.ndarray:
    """The signs (1 where above 0) of rows (n, D), eight in a byte: (n, ceil(D / 8)) uint8; the rest is 0."""
    return np.concatenate([np.packbits(block > 0, axis=1) for block in _row_blocks(rows)])


def hamming_search(
    queries: np.ndarray, documents: np.ndarray, k: int, tie_rank: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents (M, b) that differ from queries (N, b) uint8 in the fewest bits: distances and rows (N, k) int64.

    Nearest first. FAISS orders equal distances by position, so documents are added best tie rank first.
    """
    import faiss

    by_place = np.argsort(-tie_rank)
    index = faiss.IndexBinaryFlat(8 * documents.shape[1])
    index.add(documents[by_place])
    distances, places = index.search(queries, k)
    return distances.astype(np.int64), by_place[places]


def _rescored(queries, documents, candidates: np.ndarray, k: int, tie_rank: np.ndarray):
    """The k best of each query's candidates (N, C) by float32 query against the document's signs."""
    scores = np.empty(candidates.shape, np.float32)
    for row, chosen in enumerate(candidates):
        signs = np.where(documents[chosen] > 0, 1.0, -1.0)
        scores[row] = signs @ np.asarray(queries[row : row + 1], np.float64)[0]
    order = np.lexsort((-tie_rank[candidates], -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(candidates, order, axis=1)


def _row_blocks(rows: np.ndarray | ChangedRows) -> Iterator[np.ndarray]:
    at_once = max(1, _BLOCK_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), at_once):
        yield np.asarray(rows[start : start + at_once])
