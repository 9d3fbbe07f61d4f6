"""The global batch: a list of T texts with what the loss must know about each.

Shapes: N queries, K hard negatives per query, T = N (2 + K) texts, M = N (1 + K) documents.
Texts stand in this order: N queries, N positives, then the K hard negatives of query 0, of query 1, ...
"""

from dataclasses import dataclass

import numpy as np

from ds_embed.data.order import SampleOrder, key_of, mix
from ds_embed.data.store import TrainingStore


@dataclass(frozen=True)
class GlobalBatch:
    first_sample: int
    records: np.ndarray  # (N,) record numbers in the store
    texts: np.ndarray  # (T,) text numbers in the store
    lengths: np.ndarray  # (T,) tokens
    document_keys: np.ndarray  # (M, 3) documents that agree in a key are equal
    teacher_scores: np.ndarray  # (M,) float32, NaN where a record has none
    num_queries: int


def assemble_batch(
    store: TrainingStore,
    order: SampleOrder,
    *,
    first_sample: int,
    num_queries: int,
    hard_negatives: int,
    hard_negatives_sampling: str = "first",
) -> GlobalBatch:
    """Samples first_sample .. first_sample + N of a run as a global batch."""
    records = order.records(first_sample, num_queries)
    first_text = np.asarray(store.first_text[records])
    num_available = np.asarray(store.first_text[records + 1]) - first_text - 2
    choice = choose_negatives(order.seed, first_sample, num_available, hard_negatives, hard_negatives_sampling)
    negatives = (first_text + 2)[:, None] + choice
    texts = np.concatenate([first_text, first_text + 1, negatives.ravel()])
    return GlobalBatch(
        first_sample=first_sample,
        records=records,
        texts=texts,
        lengths=store.lengths_of(texts),
        document_keys=_document_keys(store, records, texts, num_queries),
        teacher_scores=store.scores[texts[num_queries:]],
        num_queries=num_queries,
    )


def choose_negatives(seed: int, first_sample: int, num_available: np.ndarray, wanted: int, sampling: str) -> np.ndarray:
    """Which of its negatives each query uses, (N, K): a pure function of seed and sample number.

    "first" takes the first K, "random" K different ones; with fewer than K, all and then draws from them.
    """
    samples = np.arange(first_sample, first_sample + len(num_available), dtype=np.uint64)[:, None]
    available = num_available[:, None]
    number = np.arange(wanted)[None, :]
    draws = _draws(key_of(seed, 1), samples, wanted)
    choice = np.where(number < available, number, (draws % np.maximum(available, 1).astype(np.uint64)).astype(np.int64))
    if sampling == "first" or wanted == 0:
        return choice
    # A random rank for each of a query's negatives; those it has not come last.
    ranks = _draws(key_of(seed, 4), samples, max(wanted, int(num_available.max())))
    ranks[np.arange(ranks.shape[1])[None, :] >= available] = np.iinfo(np.uint64).max
    return np.take_along_axis(np.argsort(ranks, axis=1, kind="stable"), choice, axis=1)


def _draws(key: np.uint64, samples: np.ndarray, num_draws: int) -> np.ndarray:
    """Random 64-bit numbers (N, num_draws) for sample numbers (N, 1)."""
    return mix(mix(samples ^ key) + np.arange(num_draws, dtype=np.uint64)[None, :])


def _document_keys(store: TrainingStore, records: np.ndarray, texts: np.ndarray, num_queries: int) -> np.ndarray:
    """Keys (M, 3): text, doc_id, and query_id of the query that a positive answers.

    A document equals a query's positive when it has its text or its doc_id, or when it is a
    positive of the same query_id. A missing id gets a number that no other document has.
    """
    documents = texts[num_queries:]
    keys = np.empty((len(documents), 3), dtype=np.int64)
    keys[:, 0] = store.text_keys[documents]
    unique = -1 - np.arange(len(documents), dtype=np.int64)
    for column, ids in ((1, store.document_keys), (2, store.query_keys)):
        own = np.asarray(ids[records])
        keys[:, column] = unique
        keys[:num_queries, column] = np.where(own == 0, unique[:num_queries], own)
    return keys


def collate(store: TrainingStore, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (b, S), padded on the right with 0, and lengths (b,) of the given texts.

    With no text at all: one dummy text of one token.
    """
    if len(texts) == 0:
        return np.zeros((1, 1), dtype=np.int64), np.ones(1, dtype=np.int64)
    return pad([store.tokens_of(int(text)) for text in texts])


def pad(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (b, S), padded on the right with 0, and lengths (b,) of token arrays."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    ids = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    for row, tokens in zip(ids, rows):
        row[: len(tokens)] = tokens
    return ids, lengths
