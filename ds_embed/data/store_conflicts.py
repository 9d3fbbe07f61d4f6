"""Ids of a training store that name different texts in one file: a document's or a query's id means one text.

Letters: R records. Works on the arrays of a store, by parts of the ids, so memory is flat in R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ds_embed.data.json_files import BadRecord

_ROWS_AT_ONCE = 1 << 21
# id key, text key, which text of a record it names.
_NAMED = (("query_id", "query", "query_keys", 0), ("doc_id", "pos_doc", "document_keys", 1))


def find_conflicts(folder: Path, files: Sequence[tuple[int, Callable[[int], str]]]) -> dict[tuple[int, int], BadRecord]:
    """{(file, record number): error} of records whose id stands earlier in their file with another text.

    `files` are (records in the store, number to place) of each file, in the store's order. Ids of
    different files are not compared: data sets number their texts from 0, each for itself.
    """
    arrays = {path.stem: np.load(path, mmap_mode="r") for path in folder.glob("*.npy")}
    found, start = {}, 0
    for file, (num_records, location) in enumerate(files):
        for id_name, text_name, keys_name, place in _NAMED:
            keys = arrays[keys_name][start : start + num_records]
            first_text = arrays["first_text"][start : start + num_records]
            for row, earlier in _conflicts(keys, first_text, arrays["text_keys"], place):
                number, first = arrays["lines"][[start + row, start + earlier]].tolist()
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


def _conflicts(keys: np.ndarray, first_text: np.ndarray, text_keys: np.ndarray, place: int):
    """(row, earlier row) of rows whose key stood before, first in the earlier row, with another text."""
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
        ids, texts = keys[order], text_keys[first_text[order] + place]
        is_first = np.append(True, ids[1:] != ids[:-1])[: len(ids)]
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(ids)), 0))
        bad = np.flatnonzero(texts != texts[first])
        yield from sorted(zip(order[bad].tolist(), order[first[bad]].tolist()))
