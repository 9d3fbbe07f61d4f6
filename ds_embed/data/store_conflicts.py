"""Finds ids of a training store that name different texts in one file, where each id must mean one text.

Letters: R records. It works on the arrays being built, one part of the ids at a time, so memory does not grow with R.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ds_embed.data.files import BadRecord

_ROWS_AT_ONCE = 1 << 19


def find_conflicts(folder: Path, files: Sequence[tuple[int, Callable[[int], str]]]) -> dict[tuple[int, int], BadRecord]:
    """{(file, record number): error} of records whose id occurs earlier in their file with another text.

    `files` holds (records in the store, function from number to location) of each file, in store order. Ids of
    different files are not compared, since many data sets number their texts from 0.
    """
    query_ids, doc_ids, first_text, keys, lines = (
        np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("query_ids", "doc_ids", "first_text", "content_keys", "lines")
    )
    named = (("query_id", "query", query_ids), ("doc_id", "pos_doc", doc_ids))
    found, start = {}, 0
    for file, (num_records, location) in enumerate(files):
        rows = slice(start, start + num_records)
        for place, (id_name, text_name, ids) in enumerate(named):
            for row, earlier in _conflicts(ids[rows], lambda chosen: keys[first_text[rows][chosen] + place]):
                number, first = lines[[start + row, start + earlier]].tolist()
                found.setdefault(
                    (file, number),
                    BadRecord(
                        location(number),
                        f"{id_name} names another {text_name} than at {location(first)}; give each text its own "
                        f"{id_name}, leave {id_name} out, or set --skip_bad_records true",
                    ),
                )
        start += num_records
    return found


def _conflicts(keys: np.ndarray, text_keys: Callable[[np.ndarray], np.ndarray]) -> Iterator[tuple[int, int]]:
    """Yield (row, earlier row) for each row whose key first occurred in the earlier row with another text."""
    parts = -(-len(keys) // _ROWS_AT_ONCE)
    for part in range(parts):
        rows = np.concatenate(
            [
                start + np.flatnonzero((block != 0) & (block % parts == part))
                for start in range(0, len(keys), _ROWS_AT_ONCE)
                for block in [keys[start : start + _ROWS_AT_ONCE]]
            ]
        )
        order = rows[np.argsort(keys[rows], kind="stable")]
        ids, texts = keys[order], text_keys(order)
        is_first = np.append(True, ids[1:] != ids[:-1])[: len(ids)]
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(ids)), 0))
        bad = np.flatnonzero(texts != texts[first])
        yield from sorted(zip(order[bad].tolist(), order[first[bad]].tolist()))
