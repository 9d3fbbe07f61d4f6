"""The arrays of a token store, written chunk by chunk.

Letters: R records, T texts, S tokens. Memory holds one chunk, whatever R is.
Repeated texts are common (a paragraph with many questions, a negative used again), so each distinct
text of a chunk is tokenized and hashed once.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ds_embed.artifact.durable import sync_and_close
from ds_embed.data.files import BadRecord
from ds_embed.data.identity import content_keys, token_keys, write_positives
from ds_embed.data.store_conflicts import ID_ARRAYS, find_conflicts
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
_TRAINING_ARRAYS = {"first_text": "i8", "text_keys": "i8", "scores": "f4", **dict.fromkeys(ID_ARRAYS, "i8")}

Progress = Callable[[int], object]


class StoreWriter:
    """Gathers records into chunks and appends each chunk to the arrays of a store."""

    def __init__(self, folder: Path, sides: dict[str, TextTokenizer], progress: Progress | None, with_ids: bool):
        """`sides` are the kinds of texts, with their encoders; `with_ids` says text store, not training."""
        self._folder = folder
        self._sides = self._first_sides = sides
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
        self._files: list[dict] = []  # what is told of each file
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
        self._files.append({side: {"num_texts": 0, "num_cut": 0, "longest": 0} for side in self._sides})

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

    def count_blank(self) -> None:
        """Note that the text that is added next is blank."""
        self._files[-1]["num_blank"] = self._files[-1].get("num_blank", 0) + 1

    def count_negatives(self, number: int, where: str) -> None:
        """Note how many negatives the record at `where` has in the data, kept or not."""
        least, most = self._files[-1].get("negatives", (number, number))
        self._files[-1]["negatives"] = min(least, number), max(most, number)
        if not number:
            self.count_record_without("negatives", where)

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
                "remove it, or set a prefix"
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
            self._arrays["text_keys"].append(self._text_keys(encoded)[chosen])
            self._arrays["scores"].append(self._scores)
            self._append_ids(chosen)
            self._max_texts = max(self._max_texts, int(np.diff(self._ends, prepend=0).max()))
        if self._ids is not None:
            self._ids.writelines(f"{row_id}\n" for row_id in self._record_ids["row_id"])

        for index, side in enumerate(self._sides):
            facts, of_side = self._files[-1][side], sides == index
            facts["num_texts"] += int(of_side.sum())
            facts["num_cut"] += int((full_lengths > lengths)[of_side].sum())
            facts["longest"] = max(facts["longest"], int(full_lengths[of_side].max(initial=0)))
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

    def _text_keys(self, encoded: list) -> np.ndarray:
        """Keys of the distinct texts of all sides, by the tokens that `encoded` gives them.

        Documents go by those of the first file's prefix: the same one behind another prefix is still the same.
        """
        keys = []
        for side, encoder, distinct, (tokens, lengths, _) in zip(
            self._sides, self._sides.values(), self._distinct, encoded
        ):
            if side == "documents" and encoder is not self._first_sides[side]:
                tokens, lengths, _ = self._first_sides[side].encode_flat(list(distinct))
            keys.append(token_keys(tokens, lengths))
        return np.concatenate(keys)

    def _append_ids(self, chosen: np.ndarray) -> None:
        """Keys of ids and, for those, of the texts as they stand in the data: whether they fit hangs on no setting."""
        first_texts = np.array([0, *self._ends[:-1]])
        texts = list(itertools.chain(*self._distinct))
        for place, id_name, (ids, named) in ((0, "query_id", ID_ARRAYS[:2]), (1, "doc_id", ID_ARRAYS[2:])):
            keys, text_keys = np.zeros((2, len(first_texts)), np.int64)  # 0 where there is no id
            rows = [row for row, value in enumerate(self._record_ids[id_name]) if value is not None]
            keys[rows] = content_keys([self._record_ids[id_name][row] for row in rows])
            text_keys[rows] = content_keys([texts[text] for text in chosen[first_texts[rows] + place].tolist()])
            self._arrays[ids].append(keys)
            self._arrays[named].append(text_keys)

    def _where(self, text: int) -> str:
        return self._location(self._numbers[int(np.searchsorted(self._ends, text, side="right"))])

    def finish(
        self, manifest: dict, locations: Sequence[Callable[[int], str]] = ()
    ) -> dict[tuple[int, int], BadRecord]:
        """Close the arrays and write the manifest: what the caller knows, and what was counted here.

        Of training records: unless ids conflict, which is returned, as find_conflicts has it. `locations` of each file
        turn record numbers into places.
        """
        for array in self._arrays.values():
            array.finish()
        sizes = [file["num_records"] for file in manifest["files"]]
        conflicts = {} if self._ids is not None else find_conflicts(self._folder, list(zip(sizes, locations)))
        if conflicts:
            return conflicts
        counts = {
            "num_records": self._num_records,
            "num_texts": self._num_texts,
            "num_tokens": self._num_tokens,
            "max_tokens": self._max_tokens,
            "longest_text": self._longest,
        }
        if self._ids is not None:
            sync_and_close(self._ids)
        else:
            counts["max_negatives"] = self._max_texts - 2
            more = write_positives(self._folder, sizes)
            self._files = [file | facts for file, facts in zip(self._files, more)]
            for what, (number, first) in self._lacking.items():
                counts[f"records_without_{what}"] = number
                counts[f"first_record_without_{what}"] = first
        files = [file | facts for file, facts in zip(manifest["files"], self._files, strict=True)]
        write_manifest(self._folder, {**manifest, "files": files, **counts})
        return {}
