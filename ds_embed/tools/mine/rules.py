"""Which candidates become negatives: pure functions on arrays.

A query's pool is its best P documents that are not its positives. The rules remove candidates from the pool in the
order of RULES, and each removal is counted for the first rule that applies. Let p be the lowest score of the query's
positives: a poor positive makes the rules strict, as in sentence-transformers' mine_hard_negatives. A candidate with
score s is kept if

    s <= p - absolute_margin        NV-Retriever's TopK-MarginPos (Moreira et al. 2024, arXiv 2407.15831)
    s <= p - |p| relative_margin    its TopK-PercPos: of p > 0 that is s <= p (1 - relative_margin)
    min_score <= s <= max_score

and then skipped if it is one of the record's own negatives that are kept, or one of the range_min best remaining.

Shapes: n queries, m records, P candidates of a query, K negatives of a record.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ds_embed.data.order import key_of, mix
from ds_embed.settings.tool_arguments import MiningArguments
from ds_embed.tools.mine.catalog import Ragged

RULES = ("positive", "absolute_margin", "relative_margin", "max_score", "min_score", "existing", "range_min")
_NOBODY = 255  # an empty slot of the pool
_LEFT = 254
_RANDOM = 5  # random stream, distinct from those of the data order


@dataclass(frozen=True)
class Pool:
    """The candidates of n queries, best first: rows (n, P), with -1 for missing ones, and their scores."""

    rows: np.ndarray
    scores: np.ndarray
    num_positives: np.ndarray  # (n,) documents skipped because they are positives

    def reordered(self, scores: np.ndarray) -> Pool:
        """The same candidates ordered by other scores (n, P); ties keep their order."""
        scores = np.where(self.rows < 0, -np.inf, scores).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")
        rows, scores = (np.take_along_axis(values, order, axis=1) for values in (self.rows, scores))
        return Pool(rows, scores, self.num_positives)


def make_pool(scores: np.ndarray, rows: np.ndarray, excluded: Ragged, groups: np.ndarray, num_candidates: int) -> Pool:
    """The best P = num_candidates of rows (n, k), best first, without those excluded for the query's group (n,)."""
    # Encode each (query, document) pair as a unique number.
    stride = int(max(rows.max(initial=0), excluded.values.max(initial=0))) + 1
    places, values = excluded.of(groups)
    is_positive = np.isin(np.arange(len(rows))[:, None] * stride + rows, places * stride + values) & (rows >= 0)
    left_out = is_positive | (rows < 0)
    num_kept = np.cumsum(~left_out, axis=1)
    num_positives = (is_positive & (num_kept < num_candidates)).sum(axis=1)
    order = np.argsort(left_out, axis=1, kind="stable")[:, :num_candidates]
    nobody = np.take_along_axis(left_out, order, axis=1)
    rows = np.where(nobody, -1, np.take_along_axis(rows, order, axis=1))
    scores = np.where(nobody, np.float32(-np.inf), np.take_along_axis(scores, order, axis=1))
    return Pool(rows, scores, num_positives)


def choose(
    pool: Pool,
    lowest_positive: np.ndarray,
    places: np.ndarray,
    records: np.ndarray,
    existing: Ragged,
    arguments: MiningArguments,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The negatives of m records: rows (m, K), with -1 for missing ones; scores (m, K); removals by each rule.

    lowest_positive (n,): p of each query. places (m,): the query of each record. records (m,): the records' numbers in
    the files, which seed random sampling and index `existing`.
    """
    verdicts = _verdicts(pool, lowest_positive, arguments)[places]
    owners, values = existing.of(records)
    stride = int(max(pool.rows.max(initial=0), values.max(initial=0))) + 1
    pool_rows = pool.rows[places]
    known = np.isin(np.arange(len(records))[:, None] * stride + pool_rows, owners * stride + values) & (pool_rows >= 0)
    verdicts[known & (verdicts == _LEFT)] = RULES.index("existing")
    left = verdicts == _LEFT
    left &= np.cumsum(left, axis=1) > arguments.range_min
    verdicts[(verdicts == _LEFT) & ~left] = RULES.index("range_min")

    if arguments.sampling == "top":
        priority = np.broadcast_to(np.arange(left.shape[1], dtype=np.uint64), left.shape)
    else:
        record_keys = mix(records.astype(np.uint64) ^ key_of(arguments.seed, _RANDOM))
        with np.errstate(over="ignore"):
            priority = mix(record_keys[:, None] + pool_rows.astype(np.uint64))
    # Halve the numbers, so that every remaining candidate comes before the removed ones.
    priority = np.where(left, priority >> np.uint64(1), np.uint64(2**64 - 1))
    taken = np.argsort(priority, axis=1, kind="stable")[:, : arguments.num_negatives]
    taken = np.where(np.take_along_axis(left, taken, axis=1), taken, left.shape[1])
    taken.sort(axis=1)  # best first, missing ones last
    shape = (len(records), arguments.num_negatives)
    rows, scores = np.full(shape, -1, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32)
    record, column = np.nonzero(taken < left.shape[1])
    rows[record, column] = pool_rows[record, taken[record, column]]
    scores[record, column] = pool.scores[places[record], taken[record, column]]

    counts = np.bincount(verdicts.ravel(), minlength=256)[: len(RULES)]
    counts[RULES.index("positive")] = pool.num_positives[places].sum()
    return rows, scores, counts


def _verdicts(pool: Pool, lowest_positive: np.ndarray, arguments: MiningArguments) -> np.ndarray:
    """Which rule removes each candidate, (n, P); _LEFT if none does."""
    scores, lowest = pool.scores.astype(np.float64), lowest_positive.astype(np.float64)[:, None]
    verdicts = np.full(scores.shape, _LEFT, dtype=np.uint8)
    verdicts[pool.rows < 0] = _NOBODY
    limits = {
        "absolute_margin": lambda limit: scores > lowest - limit,
        "relative_margin": lambda limit: scores > lowest - np.abs(lowest) * limit,
        "max_score": lambda limit: scores > limit,
        "min_score": lambda limit: scores < limit,
    }
    for rule, is_out in limits.items():
        if (limit := getattr(arguments, rule)) is not None:
            verdicts[is_out(limit) & (verdicts == _LEFT)] = RULES.index(rule)
    return verdicts
