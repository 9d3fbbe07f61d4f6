"""The arrays of a token store, written chunk by chunk.

Memory holds one chunk, or a few for each encoding process, however many records there are. The store does not depend on
which process encodes a chunk or where chunks end.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.data.files import BadRecord
from ds_embed.data.identity import write_positives
from ds_embed.data.store_chunk import Chunk, ChunkTexts, File
from ds_embed.data.store_conflicts import find_conflicts
from ds_embed.data.store_files import NpyWriter, write_manifest
from ds_embed.data.store_workers import Workers, count_processes
from ds_embed.data.tokenize import TextTokenizer
from ds_embed.settings.errors import UserError

IDS_NAME = "ids.txt"
# A chunk ends at whichever limit is reached first. This is enough texts for the tokenizer's threads, and about 100 MB
# each of its working memory (proportional to distinct characters) and ours (to all characters).
_CHUNK_TEXTS = 16_384
_CHUNK_DISTINCT_CHARACTERS = 4_000_000
_CHUNK_CHARACTERS = 16_000_000
# Workers have one thread each, so smaller chunks suffice; starting them takes as long as encoding about this many
# texts.
_SHARE_OF_WORKERS = 4
_WORKERS_FROM_TEXTS = 16_384
# The side of queries that bring their own prefix. Like those behind it, of further prefixes, it is counted as queries.
PROMPTED = "prompted"
_COMMON_ARRAYS = {"tokens": "i4", "offsets": "i8", "lengths": "i4", "lines": "i8"}
_KEYS = ("first_text", "text_keys", "content_keys", "query_ids", "doc_ids", "labels")
_TRAINING_ARRAYS = {**dict.fromkeys(_KEYS, "i8"), "scores": "f4"}

Progress = Callable[[int], object]


class StoreWriter:
    """Collects records into chunks and appends each chunk to the arrays of a store."""

    def __init__(self, folder: Path, sides: dict[str, TextTokenizer], progress: Progress | None, with_ids: bool):
        """`sides`: the first file's tokenizers by kind of text; `with_ids`: for a text store, not a training store."""
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
        self._longest: dict[str, Any] = {"num_tokens": 0, "num_tokens_before_truncation": 0}
        self._files: list[File] = []
        self._workers: Workers | None = None  # only for large stores
        self._pending: deque[tuple[Chunk, Future]] = deque()
        self._lacking: dict[str, tuple[int, str | None]] = {"negatives": (0, None), "scores": (0, None)}
        self._chunk: Chunk | None = None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if isinstance(error, UserError):
                self._append_pending()  # errors in earlier records come first, as in a single process
        finally:
            if self._workers is not None:
                self._workers.close()
            for file in (*self._arrays.values(), *filter(None, [self._ids])):
                with contextlib.suppress(OSError):  # what could not be written will be deleted anyway
                    file.close()

    def start_source(
        self, sides: dict[str, TextTokenizer], key_sides: dict[str, TextTokenizer], location: Callable[[int], str]
    ) -> None:
        """Begin a file: its records are encoded by `sides`, and `location` maps their numbers to locations.

        key_sides: the tokenizers whose tokens decide which documents are equal.
        """
        assert self._chunk is None or not self._chunk.numbers, "a chunk holds records of one file"
        facts = {_counted(side): {"num_texts": 0, "num_cut": 0, "longest": 0} for side in self._sides}
        self._files.append(File((sides, key_sides if self._ids is None else None), location, facts))
        self._start_chunk()

    def _start_chunk(self) -> None:
        self._chunk = Chunk(self._files[-1], ChunkTexts(len(self._sides)))

    def add_text(self, side: int, name: str, text: str, score: float | None = None) -> None:
        """Add the next text of the current record; `name` is its key in the data."""
        self._chunk.add_text(side, name, text, score)

    def end_record(self, number: int, **ids: str | None) -> None:
        chunk = self._chunk
        chunk.end_record(number, ids)
        share = _SHARE_OF_WORKERS if self._workers else 1
        if (
            len(chunk.names) * share >= _CHUNK_TEXTS
            or chunk.num_characters * share >= _CHUNK_CHARACTERS
            or chunk.num_distinct_characters * share >= _CHUNK_DISTINCT_CHARACTERS
        ):
            self.flush()

    def count_blank(self) -> None:
        """Record that the next text to be added is blank."""
        facts = self._files[-1].facts
        facts["num_blank"] = facts.get("num_blank", 0) + 1

    def count_prompt(self, query: str) -> None:
        """Note that this query, prompt and all, brings its own."""
        facts = self._files[-1].facts
        facts |= {"num_prompts": facts.get("num_prompts", 0) + 1, "prompted": facts.get("prompted", query)}

    def count_negatives(self, number: int, where: str) -> None:
        """Record how many negatives the record at `where` has in the data, kept or not."""
        facts = self._files[-1].facts
        least, most = facts.get("negatives", (number, number))
        if not least < number < most:
            facts["negatives"] = min(least, number), max(most, number)
        if not number:
            facts.setdefault("without_negatives", where)
            self.count_record_without("negatives", where)

    def count_record_without(self, what: str, where: str) -> None:
        """Record that the record at `where` lacks its "negatives" or its "scores"."""
        number, first = self._lacking[what]
        self._lacking[what] = number + 1, first or where

    def _size_of(self, array: str) -> int:
        return self._arrays[array].num_items

    def flush(self) -> None:
        """Encode the chunk, here or in the workers, and append chunks that are ready to the arrays, in order."""
        chunk = self._chunk
        if not chunk.numbers:
            return
        self._start_chunk()
        if self._workers is None and self._size_of("lengths") >= _WORKERS_FROM_TEXTS and count_processes() > 1:
            self._workers = Workers(count_processes())
        if self._workers is None:
            self._append(chunk, chunk.texts.encode(*chunk.file.encoders))
            return
        self._pending.append((chunk, self._workers.submit(ChunkTexts.encode, chunk.file.encoders, chunk.texts)))
        self._append_pending(leave=2 * self._workers.number)

    def _append_pending(self, leave: int = 0) -> None:
        while len(self._pending) > leave:
            chunk, encoded = self._pending.popleft()
            self._append(chunk, encoded.result())

    def _append(self, chunk: Chunk, encoded: dict[str, np.ndarray]) -> None:
        lengths, full_lengths = encoded["lengths"], encoded.pop("full_lengths")
        if lengths.min() == 0:
            text = int(np.argmin(lengths))
            raise UserError(
                f"{chunk.where(text)}: {chunk.names[text]} gives no token with this tokenizer; "
                "remove it, or set a prefix"
            )
        encoded |= {"offsets": self._size_of("tokens") + np.cumsum(lengths, dtype=np.int64), "lines": chunk.numbers}
        if self._ids is None:
            encoded |= {"first_text": self._size_of("lengths") + np.array(chunk.texts.ends), "scores": chunk.scores}
        else:
            self._ids.writelines(f"{row_id}\n" for row_id in chunk.texts.ids["row_id"])
        for name, values in encoded.items():
            self._arrays[name].append(values)

        sides = np.array(chunk.texts.sides)
        for index, side in enumerate(self._sides):
            facts, of_side = chunk.file.facts[_counted(side)], sides == index
            facts["num_texts"] += int(of_side.sum())
            facts["num_cut"] += int((full_lengths > lengths)[of_side].sum())
            facts["longest"] = max(facts["longest"], int(full_lengths[of_side].max(initial=0)))
        # Among the longest after truncation, the one that was longest before it.
        longest = int(np.argmax(np.where(lengths == lengths.max(), full_lengths, 0)))
        counts = {"num_tokens": int(lengths[longest]), "num_tokens_before_truncation": int(full_lengths[longest])}
        if tuple(counts.values()) > tuple(self._longest[name] for name in counts):
            self._longest = counts | {"location": chunk.where(longest), "key": chunk.names[longest]}
        if self._progress is not None:
            self._progress(len(chunk.numbers))

    def finish(self, manifest: dict) -> dict[tuple[int, int], BadRecord]:
        """Close the arrays and write the manifest: the caller's content plus the counts made here.

        If the ids of training records conflict, it returns the result of find_conflicts and writes no manifest.
        """
        self._append_pending()
        for array in self._arrays.values():
            array.finish()
        sizes = [file["num_records"] for file in manifest["files"]]
        places = [file.location for file in self._files]
        if self._ids is None and (conflicts := find_conflicts(self._folder, list(zip(sizes, places)))):
            return conflicts
        sizes_of = {"num_records": "lines", "num_texts": "lengths", "num_tokens": "tokens"}
        counts: dict[str, Any] = {name: self._size_of(array) for name, array in sizes_of.items()}
        counts["longest_text"] = self._longest
        if self._ids is not None:
            self._ids.close()
        else:
            more = write_positives(self._folder, sizes, [file.get("kind", "") for file in manifest["files"]])
            for file, facts in zip(self._files, more):
                file.facts |= facts
            for what, (number, first) in self._lacking.items():
                counts[f"records_without_{what}"] = number
                counts[f"first_record_without_{what}"] = first
        files = [entry | file.facts for entry, file in zip(manifest["files"], self._files, strict=True)]
        write_manifest(self._folder, {**manifest, "files": files, **counts})
        return {}


def _counted(side: str) -> str:
    """What the manifest counts the texts of a side as."""
    return side if side in ("queries", "documents") else "queries"
