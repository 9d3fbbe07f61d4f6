"""What a model's vectors do with the test queries: similarities, ranks, a map, and the queries that fail.

Shapes: N judged queries, M documents, D dimensions, K documents found for each query.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ds_embed.settings.errors import UserError
from ds_embed.vectors import metrics
from ds_embed.vectors.vectors import Vectors

TOP_K = 100
_RANDOM_DOCUMENTS = 5  # drawn for each query of the histogram
_HISTOGRAM_QUERIES = 2000
_DOCUMENT_BLOCK = 16384


@dataclass(frozen=True)
class Answers:
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
    hint: str | None  # where queries find a document of their own id first
    score_name: str  # what a score is: "cosine" of unit vectors, else "inner product"


def find_answers(
    queries: Vectors, documents: Vectors, qrels: metrics.Qrels, source: str, seed: int, ignore_identical: bool = False
) -> Answers:
    """Search all judged queries exactly; `source` names the judgments in errors.

    With `ignore_identical` the document of a query's own id is not found.
    UserError: judgments and vectors of different ids (match_qrels), or no relevant document at all.
    """
    from ds_embed.vectors.search import search  # torch takes seconds to import

    # A query that has no relevant document can't be answered, so it tells nothing of the model.
    qrels = {query: judged for query, judged in qrels.items() if max(judged.values()) > 0}
    if not qrels:
        raise UserError(f"{source}: judges no document relevant (above 0), so there is nothing to show")
    unjudged = metrics.match_qrels(qrels, queries.ids, documents.ids, source)
    query_rows = [row for row, name in enumerate(queries.ids) if name in qrels]
    query_ids = [queries.ids[row] for row in query_rows]
    wanted = {name for judged in qrels.values() for name in judged}.union(query_ids if ignore_identical else ())
    row_of = {name: row for row, name in enumerate(documents.ids) if name in wanted}
    relevant = [[row_of[name] for name, grade in qrels[query].items() if grade > 0] for query in query_ids]

    rows = np.asarray(queries.rows[query_rows])
    top_k = max(1, min(TOP_K, len(documents) - ignore_identical))
    depth = min(top_k + ignore_identical, len(documents))
    scores, indices = search(rows, documents.rows, depth, tie_rank=documents.ids.ranks)
    if ignore_identical:
        scores, indices = metrics.without_identical(query_ids, documents.ids, scores, indices, top_k)
    own = [documents.rows[of_query] @ row for of_query, row in zip(relevant, rows)]
    right_score = np.array([values.max() for values in own])
    is_relevant = np.stack([np.isin(*pair) for pair in zip(indices, relevant)])
    hardest = np.where(is_relevant, -np.inf, scores).max(axis=1)
    rank = is_relevant.argmax(axis=1) + 1
    missed = np.flatnonzero(~is_relevant.any(axis=1))
    limit = right_score[missed] + 1e-6 * np.abs(right_score[missed])  # beyond rounding
    num_better = np.zeros(len(missed), np.int64)
    for start in range(0, len(documents) if len(missed) else 0, _DOCUMENT_BLOCK):
        num_better += (documents.rows[start : start + _DOCUMENT_BLOCK] @ rows[missed].T > limit).sum(axis=0)
    if ignore_identical:
        same = [row_of.get(query_ids[query]) for query in missed]
        num_better -= [
            row is not None and documents.rows[row] @ rows[query] > most
            for query, row, most in zip(missed, same, limit)
        ]
    rank[missed] = 1 + np.maximum(top_k, num_better)

    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(rows))[:_HISTOGRAM_QUERIES]
    drawn = generator.integers(len(documents), size=(len(chosen), _RANDOM_DOCUMENTS))
    random_score = np.einsum("nd,nkd->nk", rows[chosen], documents.rows[drawn])
    is_other = np.stack([~np.isin(of_query, relevant[query]) for query, of_query in zip(chosen, drawn)])
    measures = [name for name in metrics.DEFAULT_MEASURES if top_k == TOP_K or int(name.split("@")[1]) <= top_k]
    lengths = np.linalg.norm(np.concatenate([rows, documents.rows[: len(rows)]]), axis=1)
    found = metrics.SearchRun(query_ids, documents.ids, scores, indices)
    return Answers(
        query_ids=query_ids,
        document_ids=documents.ids,
        relevant=relevant,
        right=np.array([of_query[values.argmax()] for of_query, values in zip(relevant, own)]),
        right_score=right_score,
        rank=rank,
        hardest_score=np.where(np.isfinite(hardest), hardest, np.nan),
        random_score=random_score[is_other],
        scores=scores,
        indices=indices,
        means=metrics.evaluate(found, qrels, measures).means,
        hint=metrics.hint_at_identical(found, qrels),
        num_unjudged=len(unjudged),
        score_name="cosine" if np.allclose(lengths, 1, atol=0.01) else "inner product",
    )


def worst_queries(answers: Answers, number: int) -> list[int]:
    """Queries (as row numbers of the answers) whose right document ranks lowest; among equals, the one beaten by most."""
    order = np.lexsort((answers.right_score - answers.scores[:, 0], -answers.rank))
    return [int(query) for query in order[:number] if answers.rank[query] > 1]


def sample_documents(answers: Answers, number: int, seed: int) -> np.ndarray:
    """Rows for the map, ascending: at random, but at most half of it for documents that no query asks for."""
    order = np.random.default_rng(seed).permutation(len(answers.document_ids))
    asked = np.isin(order, [row for rows in answers.relevant for row in rows])
    others = order[~asked][: max(number // 2, number - int(asked.sum()))]
    return np.sort(np.concatenate([order[asked][: number - len(others)], others]))


def map_documents(rows: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, str]:
    """Coordinates (m, 2) of m >= 3 vectors (m, D), and how to read them.

    "pca": two principal axes. "tsne": scikit-learn's t-SNE of the first 50 (van der Maaten and Hinton 2008).
    """
    left, sizes, _ = np.linalg.svd(rows - rows.mean(axis=0, dtype=np.float64), full_matrices=False)
    points = left * sizes
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(rows) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points[:, :50])
        return points, "t-SNE: neighbours stay together; distances and sizes of groups mean nothing."
    share = (sizes[:2] ** 2).sum() / max((sizes**2).sum(), np.finfo(np.float64).tiny)
    how = f"The two principal axes hold {share:.0%} of the variance: near here need not be near in full."
    return points[:, :2], how
