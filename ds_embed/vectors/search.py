"""Exact search by inner product: the k best documents of every query, in blocks, by one rank or by all together.

Shapes: W ranks, N queries, M documents, D dimensions, K kept documents (k), C candidates (k plus a margin).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from ds_embed.job.ranks import FailedElsewhere, World
from ds_embed.settings.errors import UserError
from ds_embed.vectors.vectors import part_of

MEMORY_BYTES = 256 << 20
"""What the default blocks may take at a time, beside the (N, C) candidates (12 bytes each)."""
_QUERY_BLOCK = 1024
_Block = tuple[int, int, torch.Tensor, torch.Tensor]
Rows = Any  # float32 (n, D): an array, memory-mapped or not, or what makes one of a slice
_MERGED_QUERIES = 4096  # at a time: bounds the gathered (W N, K) candidates


def search(
    queries: Rows,
    documents: Rows,
    k: int,
    *,
    query_block: int | None = None,
    document_block: int | None = None,
    tie_rank: np.ndarray | None = None,
    device: str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents with the largest inner product: scores float32 (N, k), indices int64 (N, k).

    queries (N, D) and documents (M, D) are float32 and may be memory-mapped. A score is the inner
    product summed in float64, rounded to float32; best first, equal scores by descending `tie_rank`
    (int64 (M,), the place of each document's id among the sorted ids: trec_eval's order; default:
    the earlier row first). Results depend on blocks and device only where a float64 sum lies within
    its own rounding of the midpoint of two float32 values. Blocks count queries and documents.
    UserError: queries and documents of different D, NaN or infinite scores, no such device.
    """
    check_search(queries, documents, k, tie_rank)
    target, (num_documents, dimensions) = _device(device), documents.shape
    query_block = query_block or _QUERY_BLOCK
    if document_block is None:
        # A block of documents, its scores, room for topk.
        document_block = max(1024, MEMORY_BYTES // (4 * (dimensions + 2 * query_block)))
    if tie_rank is None:
        tie_rank = np.arange(num_documents - 1, -1, -1)
    with torch.inference_mode(), torch.autocast(target.type, enabled=False), _full_precision(target):
        # Select in fp32, which is fast, and more than k, because its rounding can swap neighbours.
        num_candidates = min(num_documents, k + max(32, k // 4))
        blocks = _blocks(queries, documents, query_block, document_block, target, torch.float32)
        rows, bound = _candidates(blocks, queries.shape, num_candidates)
        query_rows = np.repeat(np.arange(len(queries), dtype=np.int32), num_candidates)
        scores = pair_scores(queries, documents, query_rows, rows.ravel(), device).reshape(rows.shape)
        scores, rows = best_of(scores, rows, k, tie_rank)
        # Sure where no document that was left out can reach the k-th place.
        doubtful = ~(scores[:, -1] > bound)
        if num_candidates < num_documents and doubtful.any():
            # Many near-equal documents (or a collapsed model): all their scores in float64, in smaller blocks.
            smaller = max(1, query_block // 2), max(1, document_block // 4)
            blocks = _blocks(queries[doubtful], documents, *smaller, target, torch.float64)
            scores[doubtful], rows[doubtful] = _search_exactly(blocks, k, tie_rank)
    return scores, rows


def search_sharded(
    world: World,
    queries: Rows,
    documents: Rows,
    k: int,
    *,
    tie_rank: np.ndarray | None = None,
    device: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What search(queries, documents, k) gives, on every rank, for any number of ranks.

    Every rank must call this with the same arguments; it reads only its own slice of `documents`, on its
    own device unless one is given. Errors as those of search; when one rank meets one, the others raise FailedElsewhere.
    """
    device = device or str(world.device)
    if world.size == 1:
        return search(queries, documents, k, tie_rank=tie_rank, device=device)
    check_search(queries, documents, k, tie_rank)
    if tie_rank is None:
        tie_rank = np.arange(len(documents) - 1, -1, -1)
    low, high = (len(documents) * rank // world.size for rank in (world.rank, world.rank + 1))
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    error = None
    if high > low:
        count, ranks_of_slice = min(k, high - low), np.argsort(np.argsort(tie_rank[low:high]))
        try:
            found = search(queries, part_of(documents, low, high), count, tie_rank=ranks_of_slice, device=device)
            scores[:, :count], rows[:, :count] = found[0], found[1] + low
        except UserError as mistake:
            error = mistake
    # Agreed on before the next collective: a rank that left would hang the others in it.
    if world.max([float(error is not None)])[0]:
        raise error or FailedElsewhere("search")
    for start in range(0, len(scores), _MERGED_QUERIES):
        own = [torch.from_numpy(part[start : start + _MERGED_QUERIES]).to(world.device) for part in (scores, rows)]
        counts = [len(own[0])] * world.size
        # The best K of the W K candidates of each query: (W n, K) by rank become (n, W K) by query.
        by_rank = [world.all_gather_rows(part, counts).cpu().chunk(world.size) for part in own]
        by_query = [torch.cat(parts, dim=1).numpy() for parts in by_rank]
        best = best_of(by_query[0], by_query[1], k, tie_rank)
        scores[start : start + _MERGED_QUERIES], rows[start : start + _MERGED_QUERIES] = best
    return scores, rows


def _candidates(blocks: Iterator[_Block], shape: tuple[int, ...], num_candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """The (N, C) documents with the largest fp32 scores, and (N,) what the score of no other document exceeds.

    shape: (N, D).
    """
    best: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    query_norms, largest_norm = torch.zeros(shape[0], dtype=torch.float64), 0.0
    for row, column, query_rows, document_rows in blocks:
        if row == 0:
            largest_norm = max(largest_norm, _norms(document_rows).max().item())
        if column == 0:
            query_norms[row : row + len(query_rows)] = _norms(query_rows)
        scores = query_rows @ document_rows.T
        scores, indices = scores.topk(min(num_candidates, scores.shape[1]), dim=1, sorted=False)
        indices += column
        if row in best:
            scores = torch.cat([best[row][0], scores], dim=1)
            indices = torch.cat([best[row][1], indices], dim=1)
            scores, places = scores.topk(min(num_candidates, scores.shape[1]), dim=1, sorted=False)
            indices = indices.gather(1, places)
        # topk puts NaN first, so a bad score cannot hide among those that are left out.
        if not torch.isfinite(scores).all():
            bad, place = torch.nonzero(~torch.isfinite(scores))[0].tolist()
            raise UserError(
                f"the score of query row {row + bad} and document row {indices[bad, place]} is not finite: "
                "a vector holds NaN or infinity, or is too long for float32; normalise the vectors"
            )
        best[row] = (scores, indices)
    floor = torch.cat([scores.amin(dim=1).cpu() for scores, _ in best.values()]).double()
    # The textbook bound on a sum of D rounded products holds for every order of summation.
    error = (shape[1] + 2) * 2.0**-24 * query_norms * largest_norm + torch.finfo(torch.float32).tiny * shape[1]
    return torch.cat([indices.cpu() for _, indices in best.values()]).numpy(), (floor + error).float().numpy()


def _search_exactly(blocks: Iterator[_Block], k: int, tie_rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k best (N, k) of all documents by their float64 scores; ties at the k-th place come out right."""
    best: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for row, column, query_rows, document_rows in blocks:
        scores = (query_rows @ document_rows.T).float().cpu().numpy()
        rows = np.broadcast_to(np.arange(column, column + len(document_rows)), scores.shape)
        if row in best:
            scores, rows = (np.concatenate(pair, axis=1) for pair in zip(best[row], (scores, rows)))
        best[row] = best_of(scores, rows, min(k, scores.shape[1]), tie_rank)
    scores, rows = (np.concatenate(parts) for parts in zip(*best.values()))
    return scores, rows


def pair_scores(
    queries: Rows, documents: Rows, query_rows: np.ndarray, document_rows: np.ndarray, device: str = "cpu"
) -> np.ndarray:
    """Scores (P,) float32 of P pairs of rows, summed in float64: the numbers that search gives.

    Documents are read in ascending order, a block of pairs at a time.
    """
    target = torch.device(device)
    order = np.argsort(document_rows, kind="stable")
    scores = torch.empty(len(order), dtype=torch.float32)
    pairs = max(1, MEMORY_BYTES // (128 * queries.shape[1]))  # two rows in fp32 and float64, their product
    for start in range(0, len(order), pairs):
        chosen = order[start : start + pairs]
        left = _load(queries[query_rows[chosen]], target, torch.float64)
        right = _load(documents[document_rows[chosen]], target, torch.float64)
        scores[torch.from_numpy(chosen)] = (left * right).sum(dim=1).float().cpu()
    return scores.numpy()


def best_of(scores: np.ndarray, rows: np.ndarray, k: int, tie_rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The k best of C scored documents of each query, (N, C) to (N, k), in the order of search.

    A place without a document has the score -inf and the row -1, and comes last.
    """
    bits = torch.from_numpy(scores + np.float32(0)).view(torch.int32)  # + 0 makes -0.0 equal to 0.0
    # The bits of a float order like an integer, except that negative ones run backwards. With the rank below them no two
    # documents tie, so topk has no choice to make.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    places = ((ordered << 32) | torch.from_numpy(tie_rank[rows])).topk(k, dim=1).indices.numpy()
    return np.take_along_axis(scores, places, axis=1), np.take_along_axis(rows, places, axis=1)


def _blocks(
    queries: Rows, documents: Rows, query_block: int, document_block: int, device: torch.device, dtype: torch.dtype
) -> Iterator[_Block]:
    """(first query, first document, queries, documents) of every block; documents are read once."""
    for column in range(0, len(documents), document_block):
        document_rows = _load(documents[column : column + document_block], device, dtype)
        for row in range(0, len(queries), query_block):
            yield row, column, _load(queries[row : row + query_block], device, dtype), document_rows


def _load(rows: Rows, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # A copy: torch cannot borrow read-only memory, and a block is small.
    return torch.from_numpy(np.array(rows, order="C")).to(device=device, dtype=dtype)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    # For a bound: never too small, though squares below 1e-38 vanish in fp32, and no float64 copy of a block.
    return torch.linalg.vector_norm(rows, dim=1).clamp(min=1e-15).double().cpu() * 1.001


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """A training run may have allowed TF32 or bf16 products; the error bound needs real fp32."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul: Any = getattr(backend, "matmul", None)
    choose: Any
    if hasattr(matmul, "fp32_precision"):
        before, exact, choose = matmul.fp32_precision, "ieee", partial(setattr, matmul, "fp32_precision")
    else:  # before torch 2.9
        before, exact, choose = torch.get_float32_matmul_precision(), "highest", torch.set_float32_matmul_precision
    choose(exact)
    try:
        yield
    finally:
        choose(before)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}': search runs on cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device '{name}': this process sees {count} CUDA devices; use cpu")
    return device


def check_search(queries: Rows, documents: Rows, k: int, tie_rank: np.ndarray | None) -> None:
    """UserError when queries and documents are of different models; the rest is for callers to see to."""
    for rows in (queries, documents):
        assert rows.ndim == 2 and rows.dtype == np.float32 and 0 not in rows.shape, (
            f"not float32 (n, D): {rows.dtype} {rows.shape}"
        )
    if queries.shape[1] != documents.shape[1]:
        raise UserError(f"queries have {queries.shape[1]} dimensions, documents {documents.shape[1]}; use one model")
    assert 1 <= k <= len(documents), f"k is {k} and there are {len(documents)} documents"
    if tie_rank is not None:
        is_ranking = len(tie_rank) == len(documents) and (np.bincount(tie_rank) == 1).all()
        assert is_ranking, "tie_rank is not a ranking of the documents"
