"""The arrays of a token store, written chunk by chunk.

Letters: R records, T texts, S tokens. Memory holds one chunk, whatever R is.
Repeated texts are common (a paragraph with many questions, a negative used again), so each distinct
text of a chunk is tokenized and hashed once.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ds_embed.artifact.durable import sync_and_close
from ds_embed.data.store_files import NpyWriter, write_manifest
from ds_embed.data.tokenize import TextTokenizer
from ds_embed.settings.errors import UserError

IDS_NAME = "ids.txt"
# A chunk ends at whichever comes first. These are enough texts for the tokenizer's threads, and about
# 100 MB of its working memory (which goes with the distinct characters) and of ours (with all of them).
_CHUNK_TEXTS = 16_384
_CHUNK_DISTINCT_CHARACTERS = 4_000_000
_CHUNK_CHARACTERS = 16_000_000
_COMMON_ARRAYS = {"tokens": "i4", "offsets": "i8", "lengths": "i4", "lines": "i8"}
_TRAINING_ARRAYS = {"first_text": "i8", "text_keys": "i8", "query_keys": "i8", "document_keys": "i8", "scores": "f4"}

Progress = Callable[[int], object]


def content_key(text: str) -> int:
    """The 64-bit key of a text or id in a store's *_keys arrays: signed, never 0 (0 means none)."""
    return int(content_keys([text])[0])


def content_keys(texts: Sequence[str]) -> np.ndarray:
    """content_key of each text: (T,) int64."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    keys = np.frombuffer(digests, "<i8").astype(np.int64)
    keys[keys == 0] = 1
    return keys


class StoreWriter:
    """Gathers records into chunks and appends each chunk to the arrays of a store."""

    def __init__(self, folder: Path, sides: dict[str, TextTokenizer], progress: Progress | None, with_ids: bool):
        """`sides` are the kinds of texts, with their encoders; `with_ids` says text store, not training."""
        self._folder = folder
        self._sides = sides
        self._progress = progress
        arrays = _COMMON_ARRAYS if with_ids else {**_COMMON_ARRAYS, **_TRAINING_ARRAYS}
        self._arrays = {name: NpyWriter(folder / f"{name}.npy", dtype) for name, dtype in arrays.items()}
        self._arrays["offsets"].append([0])
        self._ids = None
        if with_ids:
            self._ids = open(folder / IDS_NAME, "w", encoding="utf-8", newline="\n")
        else:
            self._arrays["first_text"].append([0])
        self._num_records = self._num_texts = self._num_tokens = self._max_tokens = self._max_texts = 0
        self._longest: dict = {"num_tokens_before_truncation": -1}
        self._num_truncated = dict.fromkeys(sides, 0)
        self._lacking: dict[str, tuple[int, str | None]] = {"negatives": (0, None), "scores": (0, None)}
        self._start_chunk()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for array in self._arrays.values():
            array.close()
        if self._ids is not None:
            with contextlib.suppress(OSError):  # after an error; finish() has closed it otherwise
                self._ids.close()

    def _start_chunk(self) -> None:
        # Per side (queries, documents): the distinct texts, each with its place among them.
        self._distinct: list[dict[str, int]] = [{} for _ in self._sides]
        self._text_sides: list[int] = []  # per text
        self._places: list[int] = []  # per text: its place among the distinct texts of its side
        self._text_names: list[str] = []  # per text: the key that it stood under
        self._scores: list[float] = []  # per text: the teacher's, NaN where there is none
        self._ends: list[int] = []  # per record: texts up to its end
        self._numbers: list[int] = []  # per record
        self._record_ids: dict[str, list[str | None]] = {"query_id": [], "doc_id": [], "row_id": []}
        self._num_characters = self._num_distinct_characters = 0

    def encode_with(self, sides: dict[str, TextTokenizer]) -> None:
        """Encode the files that follow with these, of the same names."""
        assert not self._numbers and sides.keys() == self._sides.keys()
        self._sides = sides

    def start_source(self, location: Callable[[int], str]) -> None:
        """The records that follow are of a file whose record numbers `location` turns into places."""
        assert not self._numbers, "a chunk holds records of one file"
        self._location = location

    def add_text(self, side: int, name: str, text: str, score: float | None = None) -> None:
        """Add the next text of the record that is being written; `name` is its key in the data."""
        distinct = self._distinct[side]
        place = distinct.get(text)
        if place is None:
            place = distinct[text] = len(distinct)
            self._num_distinct_characters += len(text)
        self._num_characters += len(text)
        self._text_sides.append(side)
        self._places.append(place)
        self._text_names.append(name)
        self._scores.append(math.nan if score is None else score)

    def end_record(self, number: int, **ids: str | None) -> None:
        self._numbers.append(number)
        self._ends.append(len(self._places))
        for name, value in ids.items():
            self._record_ids[name].append(value)
        if (
            len(self._places) >= _CHUNK_TEXTS
            or self._num_characters >= _CHUNK_CHARACTERS
            or self._num_distinct_characters >= _CHUNK_DISTINCT_CHARACTERS
        ):
            self.flush()

    def count_record_without(self, what: str, where: str) -> None:
        """Note that the record at `where` lacks its "negatives" or its "scores"."""
        number, first = self._lacking[what]
        self._lacking[what] = number + 1, first or where

    def flush(self) -> None:
        """Encode the chunk and append it to the arrays. All of its records are of one file."""
        if not self._numbers:
            return
        encoded = [
            encoder.encode_flat(list(distinct)) for encoder, distinct in zip(self._sides.values(), self._distinct)
        ]
        pool, pool_lengths, pool_full_lengths = (np.concatenate(parts) for parts in zip(*encoded))
        side_starts = np.cumsum([0] + [len(distinct) for distinct in self._distinct])
        sides = np.array(self._text_sides)
        chosen = side_starts[sides] + np.array(self._places)  # per text: its place in the pool
        lengths = pool_lengths[chosen]
        full_lengths = pool_full_lengths[chosen]
        if lengths.min() == 0:
            text = int(np.argmin(lengths))
            raise UserError(
                f"{self._where(text)}: {self._text_names[text]} gives no token with this tokenizer; "
                "remove it, set append_eos to true, or set a prefix"
            )
        ends = np.cumsum(lengths)
        pool_starts = np.cumsum(pool_lengths) - pool_lengths
        tokens = pool[np.arange(ends[-1]) + np.repeat(pool_starts[chosen] - (ends - lengths), lengths)]

        self._arrays["tokens"].append(tokens)
        self._arrays["offsets"].append(self._num_tokens + ends)
        self._arrays["lengths"].append(lengths)
        self._arrays["lines"].append(self._numbers)
        if "first_text" in self._arrays:
            self._arrays["first_text"].append(self._num_texts + np.array(self._ends))
            keys = np.concatenate([content_keys(list(distinct)) for distinct in self._distinct])
            self._arrays["text_keys"].append(keys[chosen])
            self._arrays["scores"].append(self._scores)
            self._arrays["query_keys"].append(_id_keys(self._record_ids["query_id"]))
            self._arrays["document_keys"].append(_id_keys(self._record_ids["doc_id"]))
            self._max_texts = max(self._max_texts, int(np.diff(self._ends, prepend=0).max()))
        if self._ids is not None:
            self._ids.writelines(f"{row_id}\n" for row_id in self._record_ids["row_id"])

        for index, side in enumerate(self._sides):
            self._num_truncated[side] += int(((full_lengths > lengths) & (sides == index)).sum())
        longest = int(np.argmax(full_lengths))
        if full_lengths[longest] > self._longest["num_tokens_before_truncation"]:
            self._longest = {
                "num_tokens_before_truncation": int(full_lengths[longest]),
                "num_tokens": int(lengths[longest]),
                "location": self._where(longest),
                "key": self._text_names[longest],
            }
        self._max_tokens = max(self._max_tokens, int(lengths.max()))
        self._num_tokens += int(ends[-1])
        self._num_texts += len(lengths)
        num_new_records = len(self._numbers)
        self._num_records += num_new_records
        self._start_chunk()
        if self._progress is not None:
            self._progress(num_new_records)

    def _where(self, text: int) -> str:
        return self._location(self._numbers[int(np.searchsorted(self._ends, text, side="right"))])

    def finish(self, manifest: dict) -> None:
        """Close the arrays and write the manifest: what the caller knows, and what was counted here."""
        for array in self._arrays.values():
            array.finish()
        counts = {
            "num_records": self._num_records,
            "num_texts": self._num_texts,
            "num_tokens": self._num_tokens,
            "max_tokens": self._max_tokens,
            "longest_text": self._longest,
            "num_truncated": self._num_truncated,
        }
        if self._ids is not None:
            sync_and_close(self._ids)
        else:
            counts["max_negatives"] = self._max_texts - 2
            for what, (number, first) in self._lacking.items():
                counts[f"records_without_{what}"] = number
                counts[f"first_record_without_{what}"] = first
        write_manifest(self._folder, {**manifest, **counts})


def _id_keys(ids: list[str | None]) -> np.ndarray:
    """The key of each id, 0 where there is none."""
    keys = np.zeros(len(ids), np.int64)
    present = [index for index, value in enumerate(ids) if value is not None]
    keys[present] = content_keys([ids[index] for index in present])
    return keys
