"""When queries or documents are the same: the rules used by training, validation and mining.

- Two documents are the same if the model sees the same tokens, or if their file gives them the same doc_id.
- Two queries are the same if the model sees the same tokens, or if their file gives them the same query_id.
- An id is only valid within its file: two files that both number from 0 share nothing.
- A document that is a positive of a query, in any record, is never one of its negatives.

A token store refuses a file in which one id names two texts, so in a store equal ids imply equal tokens, and only
tokens are compared. Tokens and ids are compared by 64-bit keys: with 10^8 texts, one store in 3,700 has a collision.

Letters: T texts, S tokens, R records, G queries with several positives.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ds_embed.data.store_files import NpyWriter

_ROWS_AT_ONCE = 1 << 19
_TEXT_ID = re.compile("[0-9a-f]{16}")
POSITIVES_ARRAYS = ("several_queries", "several_first", "several_positives")


def content_key(text: str) -> int:
    """The 64-bit key of a text or id: signed, never 0 (0 means none)."""
    return int(content_keys([text])[0])


def content_keys(texts: Sequence[str]) -> np.ndarray:
    """content_key of each text: (T,) int64."""
    return _keys(text.encode() for text in texts)


def text_id(text: str) -> str:
    """The external id of a text without an id of its own, used to find its vector: content_key as 16 hex digits."""
    return f"{content_key(text) % 2**64:016x}"


def id_keys(ids: Iterable[str]) -> np.ndarray:
    """Keys (n,) int64 of ids: for a text_id the key of its text, for any other id its content_key."""
    keys = [int(name, 16) or 1 if _TEXT_ID.fullmatch(name) else content_key(name) % 2**64 for name in ids]
    return np.array(keys, np.uint64).view(np.int64)


def token_keys(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Keys (T,) int64 of texts by what the model sees: concatenated tokens (S,) int32 and lengths (T,)."""
    content, ends = memoryview(np.ascontiguousarray(tokens, "<i4")).cast("B"), (np.cumsum(lengths) * 4).tolist()
    return _keys(content[start:end] for start, end in zip([0, *ends], ends))


def _keys(contents) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    keys = np.frombuffer(digests, "<i8").astype(np.int64)
    keys[keys == 0] = 1
    return keys


def write_positives(folder: Path, file_sizes: Sequence[int], kinds: Sequence[str]) -> list[dict[str, int]]:
    """Write which queries of a training store have several positives, and count the repetitions in each file.

    Only files of kind "" count, whose records are queries and their relevant documents. Reads the arrays first_text and
    text_keys in `folder`, and writes several_queries (G,), the keys of queries in ascending order, several_first (G +
    1,) and several_positives: the keys of query g's positives are several_positives[several_first[g] : several_first[g
    + 1]]. Works on one part of the keys at a time, so memory does not grow with R. Returns for each file: num_repeated,
    records whose query and positive occurred earlier in any file; and max_positives, the most positives that any of its
    queries has in all files.
    """
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("first_text", "text_keys")}
    num_records = len(arrays["first_text"]) - 1
    writers = {name: NpyWriter(folder / f"{name}.npy", "i8") for name in POSITIVES_ARRAYS}
    writers["several_first"].append([0])
    num_written = 0
    num_repeated, max_positives = np.zeros((2, len(file_sizes)), np.int64)
    file_ends = np.cumsum(file_sizes)
    num_parts = -(-num_records // _ROWS_AT_ONCE)
    starts = file_ends - file_sizes
    spans = [range(*span) for *span, kind in zip(starts.tolist(), file_ends.tolist(), kinds) if not kind]
    for part in range(num_parts if spans else 0):
        queries, positives, rows = _pairs_of_part(arrays, part, num_parts, spans)
        order = np.lexsort((rows, positives, queries))
        queries, positives, rows = queries[order], positives[order], rows[order]
        is_new_query = np.append(True, queries[1:] != queries[:-1])[: len(queries)]
        is_new_pair = is_new_query | np.append(True, positives[1:] != positives[:-1])[: len(queries)]
        files = np.searchsorted(file_ends, rows, side="right")
        num_repeated += np.bincount(files[~is_new_pair], minlength=len(file_sizes))
        queries, positives, files = queries[is_new_pair], positives[is_new_pair], files[is_new_pair]
        keys, group, counts = np.unique(queries, return_inverse=True, return_counts=True)
        np.maximum.at(max_positives, files, counts[group])
        has_several = counts > 1
        writers["several_queries"].append(keys[has_several])
        writers["several_first"].append(num_written + np.cumsum(counts[has_several]))
        writers["several_positives"].append(positives[has_several[group]])
        num_written += int(counts[has_several].sum())
    for writer in writers.values():
        writer.finish()
    names = ("num_repeated", "max_positives")
    return [dict(zip(names, counts)) for counts in zip(num_repeated.tolist(), max_positives.tolist())]


def _pairs_of_part(arrays: dict, part: int, num_parts: int, spans: Sequence[range]) -> tuple[np.ndarray, ...]:
    """Query keys, positive keys and numbers of the records in `spans` whose query key is in one part of all keys."""
    found = []
    for start, stop in ((start, span.stop) for span in spans for start in span[::_ROWS_AT_ONCE]):
        first_text = arrays["first_text"][start : min(start + _ROWS_AT_ONCE, stop)]
        queries = arrays["text_keys"][first_text]
        # Parts are ranges of keys, so that the output of successive parts is in ascending order.
        rows = np.flatnonzero(((queries >> 32) + (1 << 31)) * num_parts >> 32 == part)
        found.append((queries[rows], arrays["text_keys"][first_text[rows] + 1], start + rows))
    return tuple(np.concatenate(parts) for parts in zip(*found))


def positive_pairs(
    query_keys: np.ndarray, document_keys: np.ndarray, several: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> np.ndarray:
    """Pairs (P, 2) of a query and a document that is one of its positives, from the keys of N queries and M documents.

    The first N documents are the queries' positives; a pair that follows from this alone, because the document is the
    positive of an equal query, is omitted. `several` are the arrays that write_positives wrote.
    """
    several_queries, several_first, several_positives = several
    own, place = np.unique(query_keys, return_inverse=True)
    group = np.searchsorted(several_queries, own)
    group[group == len(several_queries)] = 0
    # For each distinct query with several positives, find which of the documents they are.
    distinct = np.flatnonzero(several_queries[group] == own) if len(several_queries) else np.empty(0, np.int64)
    first, counts = several_first[group[distinct]], several_first[group[distinct] + 1] - several_first[group[distinct]]
    order = np.argsort(document_keys, kind="stable")
    is_few = counts <= len(document_keys)
    owners, keys = (
        np.repeat(distinct[is_few], counts[is_few]),
        several_positives[ranges(first[is_few], counts[is_few])],
    )
    low, high = (np.searchsorted(document_keys, keys, side=side, sorter=order) for side in ("left", "right"))
    owners, documents = [np.repeat(owners, high - low)], [order[ranges(low, high - low)]]
    for number in np.flatnonzero(~is_few):
        positives = several_positives[first[number] : first[number] + counts[number]]
        documents.append(np.flatnonzero(np.isin(document_keys, positives)))
        owners.append(np.full(len(documents[-1]), distinct[number]))
    owners, documents = np.concatenate(owners), np.concatenate(documents)
    num_queries = len(query_keys)
    is_shown = (documents < num_queries) & (place[np.minimum(documents, num_queries - 1)] == owners)
    owners, documents = owners[~is_shown], documents[~is_shown]
    # Expand distinct queries to all their occurrences in the batch.
    by_place, counts = np.argsort(place, kind="stable"), np.bincount(place)
    first = np.cumsum(counts) - counts
    queries = by_place[ranges(first[owners], counts[owners])]
    return np.stack([queries, np.repeat(documents, counts[owners])], axis=1)


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ..., counts[0] numbers in all, then those from first[1] on, and so on."""
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(first, counts) + within
