"""Exact search by all ranks together: each searches a slice of the documents, and the results are merged.

Shapes: W ranks, N queries, M documents, K kept documents (k).
"""

from __future__ import annotations

import numpy as np
import torch

from ds_embed.job.ranks import FailedElsewhere, World
from ds_embed.settings.errors import UserError
from ds_embed.vectors.search import best_of, check_search, search

_MERGED_QUERIES = 4096  # at a time: bounds the gathered (W N, K) candidates


def search_sharded(
    world: World, queries: np.ndarray, documents: np.ndarray, k: int, *, tie_rank: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What search(queries, documents, k) gives, on every rank, for any number of ranks.

    Every rank must call this with the same arguments; it reads only its own slice of `documents`, on its
    own device. Errors as those of search; when one rank meets one, the others raise FailedElsewhere.
    """
    device = str(world.device)
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
        count = min(k, high - low)
        ranks_of_slice = np.argsort(np.argsort(tie_rank[low:high]))
        try:
            scores[:, :count], found = search(
                queries, documents[low:high], count, tie_rank=ranks_of_slice, device=device
            )
            rows[:, :count] = found + low
        except UserError as mistake:
            error = mistake
    # Agreed on before the next collective: a rank that left would hang the others in it.
    if world.max([float(error is not None)])[0]:
        raise error or FailedElsewhere("search")
    return _merge(world, scores, rows, k, tie_rank)


def _merge(world, scores, rows, k, tie_rank):
    """The best K of the W K candidates of each query."""
    for start in range(0, len(scores), _MERGED_QUERIES):
        span = slice(start, start + _MERGED_QUERIES)
        gathered = []
        for own in (scores[span], rows[span]):
            counts = [len(own)] * world.size
            all_ranks = world.all_gather_rows(torch.from_numpy(own).to(world.device), counts).cpu()
            by_query = all_ranks.view(world.size, len(own), k).transpose(0, 1)
            gathered.append(by_query.reshape(len(own), -1).numpy())
        scores[span], rows[span] = best_of(*gathered, k, tie_rank)
    return scores, rows
