"""The global batch: a list of T texts with what the loss must know about each.

Shapes: N queries, K hard negatives of each query that has any, M documents (N positives and all hard negatives),
T = N + M texts. Texts stand in this order: N queries, N positives, then the hard negatives of query 0, of query 1, ...
"""

from dataclasses import dataclass

import numpy as np

from ds_embed.data.identity import positive_pairs
from ds_embed.data.order import SampleOrder, key_of, mix
from ds_embed.data.store import TrainingStore


@dataclass(frozen=True)
class GlobalBatch:
    first_sample: int
    records: np.ndarray  # (N,) record numbers in the store
    texts: np.ndarray  # (T,) text numbers in the store
    lengths: np.ndarray  # (T,) tokens
    document_keys: np.ndarray  # (M, 2) documents that agree in a key are equal
    own_negatives: np.ndarray  # (N, K) documents that are each query's hard negatives, -1 for none
    positive_pairs: np.ndarray  # (P, 2) further pairs of a query and a document that is no negative of it
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
    """Samples first_sample .. first_sample + N of a run as a global batch.

    A record without negatives has none of its own here, and is scored against those of others.
    """
    records = order.records(first_sample, num_queries)
    first_text = np.asarray(store.first_text[records])
    num_available = np.asarray(store.first_text[records + 1]) - first_text - 2
    choice = choose_negatives(order.seed, first_sample, num_available, hard_negatives, hard_negatives_sampling)
    has_own = np.broadcast_to(num_available[:, None] > 0, choice.shape)
    negatives = ((first_text + 2)[:, None] + choice)[has_own]
    texts = np.concatenate([first_text, first_text + 1, negatives])
    own = np.full(choice.shape, -1, dtype=np.int64)
    own[has_own] = np.arange(num_queries, num_queries + len(negatives))
    keys = np.asarray(store.text_keys[texts])
    pairs = positive_pairs(keys[:num_queries], keys[num_queries:], store.several_positives)
    of_negatives = pairs[pairs[:, 1] >= num_queries]
    places = np.flatnonzero(has_own)[of_negatives[:, 1] - num_queries]
    is_own = places // max(1, hard_negatives) == of_negatives[:, 0]
    own.flat[places[is_own]] = -1
    return GlobalBatch(
        first_sample=first_sample,
        records=records,
        texts=texts,
        lengths=store.lengths_of(texts),
        document_keys=_document_keys(keys, num_queries),
        own_negatives=own,
        positive_pairs=pairs,
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


def _document_keys(text_keys: np.ndarray, num_queries: int) -> np.ndarray:
    """Keys (M, 2) of text_keys (T,): that of the document, and that of the query that a positive answers.

    A hard negative answers none, and has a number there that no other document has.
    """
    documents = text_keys[num_queries:]
    keys = np.stack([documents, -1 - np.arange(len(documents))], axis=1)
    keys[:num_queries, 1] = text_keys[:num_queries]
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
