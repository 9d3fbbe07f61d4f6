"""What a model's vectors do with the test queries: similarities, ranks, a map, and the queries that fail.

Shapes: N judged queries, M documents, D dimensions, K documents found for each query.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_embed.settings.errors import UserError
from ds_embed.vectors.metrics import DEFAULT_MEASURES, Qrels, SearchRun, evaluate, match_qrels
from ds_embed.vectors.vectors import Vectors

TOP_K = 100
_RANDOM_DOCUMENTS = 5  # drawn for each query of the histogram
_HISTOGRAM_QUERIES = 5000
_QUERY_BLOCK, _DOCUMENT_BLOCK = 512, 16384


@dataclass(frozen=True)
class Found:
    """The search's result for N judged queries; a query's right document is its best relevant one."""

    query_ids: list[str]
    document_ids: Sequence[str]  # of all M documents, by row
    relevant: list[list[int]]  # rows of each query's relevant documents
    right: np.ndarray  # (N,) row of the right document
    right_score: np.ndarray  # (N,)
    rank: np.ndarray  # (N,) from 1; a document of the same score may stand before or behind
    hardest_score: np.ndarray  # (N,) of the best document that is not relevant; NaN where all found are
    random_score: np.ndarray  # of documents drawn for each query, without its relevant ones
    scores: np.ndarray  # (N, K) best first
    indices: np.ndarray  # (N, K) document rows
    means: dict[str, float]  # measures over the N queries
    num_unjudged: int
    score_name: str  # what a score is: "cosine" of unit vectors, else "inner product"


def find(queries: Vectors, documents: Vectors, qrels: Qrels, source: str, seed: int) -> Found:
    """Search all judged queries exactly; `source` names the judgments in errors.

    UserError: judgments and vectors of different ids (match_qrels), or no relevant document at all.
    """
    from ds_embed.vectors.search import search  # torch takes seconds to import

    # A query that has no relevant document can't be answered, so it tells nothing of the model.
    qrels = {query: judged for query, judged in qrels.items() if max(judged.values()) > 0}
    if not qrels:
        raise UserError(f"{source}: judges no document relevant (above 0), so there is nothing to show")
    unjudged = match_qrels(qrels, queries.ids, documents.ids, source)
    query_rows = [row for row, name in enumerate(queries.ids) if name in qrels]
    query_ids = [queries.ids[row] for row in query_rows]
    wanted = {name for judged in qrels.values() for name in judged}
    row_of = {name: row for row, name in enumerate(documents.ids) if name in wanted}
    relevant = [[row_of[name] for name, grade in qrels[query].items() if grade > 0] for query in query_ids]

    rows = np.asarray(queries.rows[query_rows])
    top_k = min(TOP_K, len(documents))
    scores, indices = search(rows, documents.rows, top_k, tie_rank=documents.ids.ranks)
    own = [documents.rows[of_query] @ row for of_query, row in zip(relevant, rows)]
    best = [int(values.argmax()) for values in own]
    right = np.array([of_query[place] for of_query, place in zip(relevant, best)])
    right_score = np.array([values[place] for values, place in zip(own, best)])
    is_relevant = np.stack([np.isin(found, of_query) for found, of_query in zip(indices, relevant)])
    hardest = np.where(is_relevant, -np.inf, scores).max(axis=1)
    measures = [name for name in DEFAULT_MEASURES if top_k == TOP_K or int(name.split("@")[1]) <= top_k]
    run = SearchRun(query_ids, documents.ids, scores, indices)
    return Found(
        query_ids=query_ids,
        document_ids=documents.ids,
        relevant=relevant,
        right=right,
        right_score=right_score,
        rank=_ranks(rows, documents.rows, right, right_score, is_relevant),
        hardest_score=np.where(np.isfinite(hardest), hardest, np.nan),
        random_score=_random_scores(rows, documents.rows, relevant, seed),
        scores=scores,
        indices=indices,
        means=evaluate(run, qrels, measures).means,
        num_unjudged=len(unjudged),
        score_name="cosine" if _are_unit(rows) and _are_unit(documents.rows[: len(rows)]) else "inner product",
    )


def _ranks(
    queries: np.ndarray, documents: np.ndarray, right: np.ndarray, right_score: np.ndarray, is_relevant: np.ndarray
) -> np.ndarray:
    """(N,) rank of the right document: where search put it, else one more than the documents that score higher."""
    top_k = is_relevant.shape[1]
    rank = np.where(is_relevant.any(axis=1), is_relevant.argmax(axis=1) + 1, 0)
    missing = np.flatnonzero(rank == 0)
    for start in range(0, len(missing), _QUERY_BLOCK):
        block = missing[start : start + _QUERY_BLOCK]
        higher = np.zeros(len(block), dtype=np.int64)
        for first in range(0, len(documents), _DOCUMENT_BLOCK):
            is_higher = queries[block] @ documents[first : first + _DOCUMENT_BLOCK].T > right_score[block, None]
            # Summed in another order, its own score may come out higher than itself.
            own = np.flatnonzero((right[block] >= first) & (right[block] < first + _DOCUMENT_BLOCK))
            is_higher[own, right[block][own] - first] = False
            higher += is_higher.sum(axis=1)
        rank[block] = np.maximum(higher, top_k) + 1
    return rank


def _are_unit(rows: np.ndarray) -> bool:
    return bool(np.allclose(np.linalg.norm(rows, axis=1), 1, atol=0.01))


def _random_scores(queries: np.ndarray, documents: np.ndarray, relevant: list[list[int]], seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(queries))[:_HISTOGRAM_QUERIES]
    drawn = generator.integers(len(documents), size=(_RANDOM_DOCUMENTS, len(chosen)))
    scores = np.stack([np.einsum("nd,nd->n", queries[chosen], documents[of_draw]) for of_draw in drawn])
    others = np.stack([[row not in relevant[query] for query, row in zip(chosen, of_draw)] for of_draw in drawn])
    return scores[others]


def worst_queries(found: Found, number: int) -> list[int]:
    """Places of the queries whose right document ranks lowest; among equals, the one beaten by most comes first."""
    margin = found.right_score - found.scores[:, 0]
    order = np.lexsort((margin, -found.rank))
    return [int(place) for place in order[:number] if found.rank[place] > 1]


def sample_documents(found: Found, number: int, seed: int) -> np.ndarray:
    """Rows for the map, ascending: at random, but at most half of it for documents that no query asks for."""
    order = np.random.default_rng(seed).permutation(len(found.document_ids))
    asked = np.isin(order, [row for rows in found.relevant for row in rows])
    spare = max(number // 2, number - int(asked.sum()))
    others = order[~asked][:spare]
    return np.sort(np.concatenate([order[asked][: number - len(others)], others]))


def map_documents(rows: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, float]:
    """Coordinates (m, 2) of m >= 3 vectors, and the share of their variance that two principal axes hold.

    "pca": those axes, by singular value decomposition. "tsne": scikit-learn's t-SNE of the first 50
    (van der Maaten and Hinton 2008), which keeps neighbours together and not distances.
    """
    centred = rows - rows.mean(axis=0, dtype=np.float64)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    axes = left * sizes
    share = float((sizes[:2] ** 2).sum() / max((sizes**2).sum(), np.finfo(np.float64).tiny))
    if method == "pca":
        return axes[:, :2], share
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(axes[:, :50]), share
