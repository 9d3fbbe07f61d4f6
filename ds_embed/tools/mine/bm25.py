"""Candidates by shared words: BM25, computed by bm25s, with an index on disk that every rank memory-maps.

Words are runs of letters, digits and underscores, ignoring case, without stemming or stop words. Word frequencies and
document lengths are counted over all scored documents, including positives outside the corpus.

Shapes: n queries, M candidates, k kept documents, p pairs.
"""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import bm25s
import numpy as np
import torch

from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError
from ds_embed.tools.mine.catalog import Catalog

logging.getLogger("bm25s").setLevel(logging.WARNING)  # otherwise bm25s logs its stages
_WORD = re.compile(r"\w+")


def build_bm25(texts: Iterable[str], folder: Path, k1: float, b: float) -> None:
    """Index the texts in order. UserError if none contains a word."""
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in _words(text)] for text in texts]
    if not vocabulary:
        raise UserError("--method bm25: no document holds a word, so there is nothing to compare")
    index = bm25s.BM25(k1=k1, b=b)
    index.index((ids, vocabulary), show_progress=False)
    index.save(str(folder), show_progress=False)


class Bm25Candidates:
    """The k best candidates of each query by BM25; documents that share no word with the query are not candidates."""

    def __init__(self, world: World, catalog: Catalog, folder: Path):
        self._world, self._catalog = world, catalog
        self._index = bm25s.BM25.load(str(folder), mmap=True, show_progress=False)

    def find(
        self, queries: range, k: int, pair_places: np.ndarray, pair_rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores (n, k), rows (n, k) with -1 for missing ones, and the scores of pairs (p,), on every rank.

        A pair is a query, given by its index within `queries`, and any document; pairs are sorted by query. Each rank
        scores a share of the queries.
        """
        size = self._world.size
        bounds = [len(queries) * rank // size for rank in range(size + 1)]
        pair_bounds = np.searchsorted(pair_places, bounds)
        low, high = bounds[self._world.rank : self._world.rank + 2]
        found_scores = np.full((high - low, k), -np.inf, dtype=np.float32)
        found_rows = np.full((high - low, k), -1, dtype=np.int64)
        pair_scores = []
        vocabulary, none = self._index.vocab_dict, np.zeros(self._index.scores["num_docs"], dtype=np.float32)
        for place in range(low, high):
            words = [vocabulary[w] for w in _words(self._catalog.queries[queries[place]]) if w in vocabulary]
            scores = self._index.get_scores_from_ids(words) if words else none
            rows = _best(scores[: self._catalog.num_candidates], k)
            found_scores[place - low, : len(rows)] = scores[rows]
            found_rows[place - low, : len(rows)] = rows
            pair_scores.append(scores[pair_rows[slice(*np.searchsorted(pair_places, [place, place + 1]))]])
        of_pairs = np.concatenate([*pair_scores, np.empty(0, np.float32)])
        counts = np.diff(bounds).tolist()
        return (
            self._gather(found_scores, counts),
            self._gather(found_rows, counts),
            self._gather(of_pairs, np.diff(pair_bounds).tolist()),
        )

    def _gather(self, rows: np.ndarray, counts: list[int]) -> np.ndarray:
        return self._world.all_gather_rows(torch.from_numpy(rows).to(self._world.device), counts).cpu().numpy()


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """The rows of the k largest scores above 0, best first; ties keep row order."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > k:
        rows = rows[scores[rows] >= np.partition(scores[rows], -k)[-k]]
    return rows[np.argsort(-scores[rows], kind="stable")][:k]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
