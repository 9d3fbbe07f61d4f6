"""Approximate search with FAISS: building an index of documents, keeping it in a file, searching it.

Scores stay ours: FAISS only chooses candidates, whose inner products are then summed in float64.

Shapes: N queries, M documents, D dimensions, K kept documents (k).
"""

import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError
from ds_embed.settings.tool_arguments import IndexArguments, SearchIndexArguments
from ds_embed.vectors.search import Rows, best_of, check_search, pair_scores, search, search_sharded

_ADDED_ROWS = 65536  # at a time: the documents are memory-mapped
_MIN_DOCUMENTS_PER_LIST = 39  # FAISS warns of fewer: cells without a shape
_MAX_TRAINING_PER_LIST = 256  # FAISS uses no more
_COMPARED_ROWS = 16
_RECALL_QUERIES = 200
_RECALL_DEPTH = 10


def build_index(kind: str, documents: np.ndarray, settings: IndexArguments) -> Any:
    """A faiss.Index for inner products over documents, float32 (M, D): "flat", "hnsw" or "ivf".

    The same rows and settings give the same index on one thread; several threads add to an HNSW graph
    in an order of their own. It holds all rows in memory. UserError: more IVF lists than documents.
    """
    faiss = _faiss()
    num_documents, dimensions = documents.shape
    if kind == "flat":
        index = faiss.IndexFlatIP(dimensions)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(dimensions, settings.hnsw_links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = settings.hnsw_ef_construction
        index.hnsw.efSearch = settings.hnsw_ef_search
    else:
        assert kind == "ivf"
        lists = settings.ivf_lists
        if lists > num_documents:
            raise UserError(f"--ivf_lists {lists}: there are {num_documents} documents; choose fewer lists")
        if not lists:
            most = num_documents // _MIN_DOCUMENTS_PER_LIST
            lists = max(1, min(round(4 * math.sqrt(num_documents)), most))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = settings.ivf_probes
        index.cp.min_points_per_centroid = 1  # what --ivf_lists asks for, without warnings
        step = max(1, num_documents // (lists * _MAX_TRAINING_PER_LIST))
        index.train(np.ascontiguousarray(documents[::step]))
    for start in range(0, num_documents, _ADDED_ROWS):
        index.add(np.ascontiguousarray(documents[start : start + _ADDED_ROWS]))
    return index


def write_index(index: Any, path: str | os.PathLike) -> None:
    """Write an index that faiss.read_index reads; the file takes its name when it is whole."""
    path = Path(path)
    with replaced_when_whole(path, binary=True) as file:
        try:
            _faiss().write_index(index, file.name)
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be written ({str(error).strip().splitlines()[-1]})") from None


def read_index(path: str | os.PathLike, documents: np.ndarray) -> Any:
    """Read an index and check that it was made of these documents: dimensions, count and some rows.

    UserError with the cure: no such file, not a FAISS index, no inner products, other documents.
    """

    def refused(reason: str) -> UserError:
        return UserError(f"--index_file {path}: {reason}; build it again with ds-embed build-index")

    if not os.path.isfile(path):
        raise refused("no such file")
    faiss = _faiss()
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise refused(f"not a whole FAISS index ({str(error).strip().splitlines()[-1]})") from None
    if (index.ntotal, index.d) != documents.shape:
        there = f"the embeddings have {documents.shape[0]} of {documents.shape[1]}"
        raise refused(f"holds {index.ntotal} documents of {index.d} dimensions, and {there}")
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise refused("does not compare by inner product")
    if isinstance(index, faiss.IndexIVF):
        index.make_direct_map()
    for row in np.linspace(0, len(documents) - 1, _COMPARED_ROWS, dtype=np.int64):
        if not np.array_equal(index.reconstruct(int(row)), documents[row]):
            raise refused(f"row {row} is not that of the embeddings, which changed")
    return index


def search_index(
    index: Any, queries: Rows, documents: Rows, k: int, settings: IndexArguments, *, tie_rank: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """As search: scores float32 (N, k) and rows int64 (N, k), of the documents that the index finds.

    Where it finds fewer than k (few documents in the cells that were looked at), the rest of a row has
    the score -inf and the row -1.
    """
    check_search(queries, documents, k, tie_rank)
    faiss = _faiss()
    if isinstance(index, faiss.IndexHNSW):
        index.hnsw.efSearch = max(settings.hnsw_ef_search, k)
    elif isinstance(index, faiss.IndexIVF):
        index.nprobe = settings.ivf_probes
    _, rows = index.search(np.ascontiguousarray(queries), k)
    found = rows >= 0
    scores = np.full(rows.shape, -np.inf, dtype=np.float32)
    scores[found] = pair_scores(queries, documents, np.nonzero(found)[0], rows[found], device)
    return best_of(scores, rows, k, tie_rank)


def index_kind(index: Any) -> str:
    """Kind and parameters of an index, in words."""
    faiss = _faiss()
    if isinstance(index, faiss.IndexHNSW):
        links, construction = index.hnsw.nb_neighbors(1), index.hnsw.efConstruction
        return f"hnsw (hnsw_links {links}, hnsw_ef_construction {construction}, hnsw_ef_search {index.hnsw.efSearch})"
    if isinstance(index, faiss.IndexIVF):
        return f"ivf (ivf_lists {index.nlist}, ivf_probes {index.nprobe})"
    return "flat"


def search_by_arguments(
    asked: SearchIndexArguments,
    queries: Rows,
    documents: Rows,
    k: int,
    *,
    tie_rank: np.ndarray,
    device: str = "cpu",
    world: World | None = None,
) -> tuple[np.ndarray, np.ndarray, str | None]:
    """(scores, rows, kind): the search that the flags ask for, and its index in words (None: exact search).

    Exact search is shared by the ranks of a world; FAISS searches in one process.
    """
    if asked.is_exact:
        world = world or World.alone()
        return *search_sharded(world, queries, documents, k, tie_rank=tie_rank, device=device), None
    if asked.index_file is not None:
        index = read_index(asked.index_file, documents)
    else:
        start = time.perf_counter()
        index = build_index(asked.index, documents, asked)
        print(f"index      built in {time.perf_counter() - start:.1f} seconds", flush=True)
    scores, rows = search_index(index, queries, documents, k, asked, tie_rank=tie_rank, device=device)
    return scores, rows, index_kind(index)


def recall_against_exact(
    rows: np.ndarray, queries: np.ndarray, documents: np.ndarray, *, tie_rank: np.ndarray, device: str = "cpu"
) -> tuple[float, int, int]:
    """(recall, k, queries): the share of the true k best among the first k of rows (N, K), over a sample."""
    depth = min(_RECALL_DEPTH, rows.shape[1])
    sample = np.unique(np.linspace(0, len(queries) - 1, min(_RECALL_QUERIES, len(queries)), dtype=np.int64))
    _, exact = search(queries[sample], documents, depth, tie_rank=tie_rank, device=device)
    hits = (rows[sample, :depth, None] == exact[:, None, :]).any(axis=2).sum()
    return float(hits / exact.size), depth, len(sample)


def _faiss() -> Any:
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # it reports every kind of chip that it tries
    import faiss

    # FAISS carries an OpenMP of its own, which knows nothing of torch's threads: ranks would fight over the cores.
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
