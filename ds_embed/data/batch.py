"""The global batch: T uses of texts, each text once, with what the loss must know about each use.

Texts that are the same tokens are one text: it is encoded once, and each of its uses points to it.

Shapes: N queries, K hard negatives of each query that has any, M documents (N positives and all hard negatives),
T = N + M uses, U distinct texts. Uses stand in this order: N queries, N positives, then the hard negatives of query
0, of query 1, ... Behind them stand the texts of scored pairs, which are no queries and no documents: P first texts, then
P second ones, 2 P more uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ds_embed.data.identity import positive_pairs, ranges
from ds_embed.data.order import SampleOrder, key_of, mix
from ds_embed.data.store import TextStore, TrainingStore


class Group(NamedTuple):
    """Queries or scored pairs `start` to `stop` of a batch, which are all of one file; -1: of whichever."""

    file: int
    start: int
    stop: int
    num_own: int = 0  # hard negatives of a query at most


@dataclass(frozen=True)
class GlobalBatch:
    first_sample: int
    records: np.ndarray  # (N + P,) record numbers in the store, those of scored pairs last
    texts: np.ndarray  # (U,) text numbers in the store, all different in their tokens
    lengths: np.ndarray  # (U,) tokens
    uses: np.ndarray  # (N + M,) text numbers in the store, of queries and documents
    rows: np.ndarray  # (T,) which of the U texts is the same tokens
    document_keys: np.ndarray  # (M, 2) documents that agree in a key are equal
    own_negatives: np.ndarray  # (N, K) documents that are each query's hard negatives, -1 for none
    positive_pairs: np.ndarray  # (P, 2) further pairs of a query and a document that is no negative of it
    teacher_scores: np.ndarray  # (M,) float32, NaN where a record has none
    groups: tuple[Group, ...]  # of the N queries
    scored_groups: tuple[Group, ...]  # of the P scored pairs
    pair_scores: np.ndarray  # (P,) float32

    @property
    def num_queries(self) -> int:
        return len(self.own_negatives)

    @property
    def num_document_uses(self) -> int:
        """N + M: those before the texts of scored pairs."""
        return self.num_queries + len(self.document_keys)

    @property
    def num_tokens_named(self) -> int:
        """Tokens of the T uses: what a step would encode if it encoded each of them."""
        return int(self.lengths[self.rows].sum())

    def num_shared(self, negatives: str) -> int:
        """How many documents every query is scored against, beside its own negatives; `negatives` is the setting."""
        return {"all": len(self.document_keys), "own": self.num_queries, "hard": 0, "pair": 0}[negatives]

    def without_negatives(self, negatives: Sequence[str]) -> np.ndarray:
        """Which of the first queries (at most 256) have nothing to be scored against (bool), by what keys and pairs say.

        `negatives` are the settings of that name, by file; the last one is that of a group of all files.
        """
        keys, rows = self.document_keys, min(self.num_queries, 256)
        masked = (keys[:rows, None] == keys[None]).any(2)
        inside = self.positive_pairs[self.positive_pairs[:, 0] < rows]
        masked[inside[:, 0], inside[:, 1]] = True
        for group in self.groups:
            masked[group.start : group.stop, self.num_shared(negatives[group.file]) :] = True
        own = self.own_negatives[:rows]
        is_negative = (own >= 0) & (keys[own] != keys[:rows, None]).all(2)
        return masked.all(1) & ~is_negative.any(1)


def assemble_batch(
    store: TrainingStore,
    order: SampleOrder,
    *,
    first_sample: int,
    num_queries: int,
    hard_negatives: int | Sequence[int],
    hard_negatives_sampling: str = "first",
) -> GlobalBatch:
    """Samples first_sample .. first_sample + num_queries of a run as a global batch.

    A record without negatives has none of its own here, and is scored against those of others. Scored pairs come last.
    With hard negatives for each file, the queries stand file by file.
    """
    records, samples = order.records(first_sample, num_queries), first_sample + np.arange(num_queries)
    files = store.files_of(records)
    is_scored = np.isin(files, [file for file, kind in enumerate(store.kinds_of_files) if kind == "scored"])
    num_queries -= np.count_nonzero(is_scored)
    wanted = np.broadcast_to(hard_negatives, len(store.file_sizes))
    is_by_file = not isinstance(hard_negatives, int)
    if num_queries < len(records) or is_by_file:
        by_file = np.lexsort((files, is_scored))
        records, samples, files = records[by_file], samples[by_file], files[by_file]
    pairs_first = np.asarray(store.first_text[records[num_queries:]])
    first_text = np.asarray(store.first_text[records[:num_queries]])
    num_available = np.asarray(store.first_text[records[:num_queries] + 1]) - first_text - 2
    most = int(wanted.max())
    choice = choose_negatives(order.seed, samples[:num_queries], num_available, most, hard_negatives_sampling)
    positives, choice = first_text + 1, (first_text + 2)[:, None] + choice
    labels, own_labels = np.zeros(num_queries, np.int64), np.zeros(choice.shape, np.int64)
    is_labelled = np.isin(files[:num_queries], [f for f, kind in enumerate(store.kinds_of_files) if kind == "labels"])
    if is_labelled.any():
        texts = records[:num_queries][is_labelled]
        draws = _draws(key_of(order.seed, 6), samples[:num_queries][is_labelled, None].astype(np.uint64), 1 + most)
        positive, others = store.labelled.draw(texts, draws)
        positives[is_labelled], choice[is_labelled] = store.first_text[positive] + 1, store.first_text[others] + 1
        labels[is_labelled], own_labels[is_labelled] = store.labelled.keys_of(texts), store.labelled.keys_of(others)
        num_available[is_labelled] = most
    has_own = (num_available[:, None] > 0) & (np.arange(most) < wanted[files[:num_queries], None])
    negatives = choice[has_own]
    uses = np.concatenate([first_text, positives, negatives])
    texts, rows = distinct_texts(store, np.concatenate([uses, pairs_first, pairs_first + 1]))
    own = np.full(choice.shape, -1, dtype=np.int64)
    own[has_own] = np.arange(num_queries, num_queries + len(negatives))
    keys = np.asarray(store.text_keys[uses])
    pairs = positive_pairs(keys[:num_queries], keys[num_queries:], store.several_positives)
    if is_labelled.any():  # the text itself, behind which another label may stand
        own_texts = np.asarray(store.text_keys[first_text[is_labelled] + 1])
        pairs = np.concatenate([pairs, _where_equal(own_texts, keys[num_queries:], np.flatnonzero(is_labelled))])
    of_negatives = pairs[pairs[:, 1] >= num_queries]
    places = np.flatnonzero(has_own)[of_negatives[:, 1] - num_queries]
    is_own = places // max(1, most) == of_negatives[:, 0]
    own.flat[places[is_own]] = -1
    return GlobalBatch(
        first_sample=first_sample,
        records=records,
        texts=texts,
        lengths=store.lengths_of(texts),
        uses=uses,
        rows=rows,
        document_keys=_document_keys(keys, num_queries, np.concatenate([labels, own_labels[has_own]])),
        own_negatives=own,
        positive_pairs=pairs,
        teacher_scores=store.scores[uses[num_queries:]],
        groups=_groups(files[:num_queries], wanted)
        if is_by_file
        else (Group(-1, 0, num_queries, most),) * bool(num_queries),
        scored_groups=_groups(files[num_queries:], wanted * 0),
        pair_scores=store.scores[pairs_first + 1],
    )


def _groups(files: np.ndarray, num_own: np.ndarray) -> tuple[Group, ...]:
    """What stands together, of files (n,) in ascending order; num_own (F,) of each file."""
    found, first, counts = np.unique(files, return_index=True, return_counts=True)
    return tuple(map(Group, found.tolist(), first.tolist(), (first + counts).tolist(), num_own[found].tolist()))


def choose_negatives(
    seed: int, samples: np.ndarray, num_available: np.ndarray, wanted: int, sampling: str
) -> np.ndarray:
    """Which of its negatives each query uses, (N, K): a pure function of the seed and its sample number in samples (N,).

    "first" takes the first K, "random" K different ones; with fewer than K, all and then draws from them.
    """
    samples = samples.astype(np.uint64)[:, None]
    available = num_available[:, None]
    number = np.arange(wanted)[None, :]
    draws = _draws(key_of(seed, 1), samples, wanted)
    choice = np.where(number < available, number, (draws % np.maximum(available, 1).astype(np.uint64)).astype(np.int64))
    if sampling == "first" or wanted == 0:
        return choice
    # A random rank for each of a query's negatives; those it has not come last.
    ranks = _draws(key_of(seed, 4), samples, max(wanted, int(num_available.max(initial=0))))
    ranks[np.arange(ranks.shape[1])[None, :] >= available] = np.iinfo(np.uint64).max
    return np.take_along_axis(np.argsort(ranks, axis=1, kind="stable"), choice, axis=1)


def _draws(key: np.uint64, samples: np.ndarray, num_draws: int) -> np.ndarray:
    """Random 64-bit numbers (N, num_draws) for sample numbers (N, 1)."""
    return mix(mix(samples ^ key) + np.arange(num_draws, dtype=np.uint64)[None, :])


def _where_equal(keys: np.ndarray, documents: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Pairs (P, 2) of a query and a document (M,) whose keys are equal, of n queries with these keys."""
    order = np.argsort(documents, kind="stable")
    low, high = (np.searchsorted(documents, keys, side=side, sorter=order) for side in ("left", "right"))
    return np.stack([np.repeat(queries, high - low), order[ranges(low, high - low)]], axis=1)


def _document_keys(text_keys: np.ndarray, num_queries: int, labels: np.ndarray) -> np.ndarray:
    """Keys (M, 2) of text_keys (T,): that of the document, and that of the query that a positive answers, or its label.

    A hard negative without a label (labels (M,), 0) answers none, and has a number there that no other document has.
    """
    documents = text_keys[num_queries:]
    keys = np.stack([documents, -1 - np.arange(len(documents))], axis=1)
    keys[:num_queries, 1] = text_keys[:num_queries]
    keys[:, 1] = np.where(labels == 0, keys[:, 1], labels)
    return keys


def distinct_texts(store: TrainingStore, uses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Text numbers (U,) that stand for all of `uses` (T,), and which of them is the same tokens as each use (T,)."""
    first_use, rest = np.arange(len(uses)), np.arange(len(uses))
    # Texts with one key may differ in the prefixes of their files: what is not as the first one is compared again.
    while len(rest):
        _, first, group = np.unique(store.text_keys[uses[rest]], return_index=True, return_inverse=True)
        like = rest[first[group]]
        is_same = uses[rest] == uses[like]
        is_same[~is_same] = _same_tokens(store, uses[rest][~is_same], uses[like][~is_same])
        first_use[rest[is_same]] = like[is_same]
        rest = rest[~is_same]
    first, rows = np.unique(first_use, return_inverse=True)
    return uses[first], rows


def _same_tokens(store: TrainingStore, texts: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Whether each text (n,) is the same tokens as the other (n,)."""
    lengths = store.lengths_of(texts)
    same = lengths == store.lengths_of(others)
    pairs, lengths = np.flatnonzero(same), lengths[same]
    differs = flat_tokens(store, texts[same], lengths) != flat_tokens(store, others[same], lengths)
    same[np.repeat(pairs, lengths)[differs]] = False
    prompts = store.prompt_lengths_of(texts)  # the same tokens, pooled in another way, are another text
    return same if prompts is None else same & (prompts == store.prompt_lengths_of(others))


def flat_tokens(store: TrainingStore, texts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Token ids (S,) int32 of texts (n,), one after the other; lengths (n,): their tokens, S in all."""
    ends = np.cumsum(lengths)
    starts = np.asarray(store.offsets[texts]) - (ends - lengths)
    return store.tokens[np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts, lengths)]


def collate(
    store: TrainingStore | TextStore, texts: np.ndarray, is_packed: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (b, S) int64, padded on the right with 0, and lengths (b,) of the given texts; packed, (S,) of all.

    With no text at all: one dummy text of one token.
    """
    if len(texts) == 0:
        tokens, lengths = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
    else:
        lengths = store.lengths_of(texts)
        tokens = flat_tokens(store, texts, lengths)
    return tokens.astype(np.int64) if is_packed else pad(tokens, lengths), lengths


def collate_prompts(store: TrainingStore | TextStore, texts: np.ndarray) -> np.ndarray | None:
    """Leading tokens of the given texts that the pooling leaves out, (b,); None where it leaves out none."""
    lengths = store.prompt_lengths_of(texts)
    return np.zeros(1, np.int64) if lengths is not None and len(texts) == 0 else lengths


def pad(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Token ids (b, S) int64, padded on the right with 0, of texts that stand one after the other; lengths (b,)."""
    ids = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = tokens
    return ids
