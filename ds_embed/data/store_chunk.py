"""A chunk of a token store: records that are collected, encoded together and appended to its arrays.

Repeated texts are common (a paragraph with many questions, a reused negative), so each distinct text of a chunk is
tokenized and hashed once. Letters: T texts, S tokens, R records, all in one chunk.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ds_embed.data.identity import content_keys, id_keys, token_keys
from ds_embed.data.tokenize import TextTokenizer


@dataclass
class File:
    """What the chunks of one data file have in common."""

    encoders: tuple[dict[str, TextTokenizer], dict[str, TextTokenizer] | None]  # arguments of ChunkTexts.encode
    location: Callable[[int], str]  # a record's location by its number
    facts: dict[str, Any]  # what the manifest records about it


class ChunkTexts:
    """The texts of R records, in the form in which they are encoded."""

    def __init__(self, num_sides: int):
        # Per side (queries, documents): the distinct texts, each with its index.
        self.distinct: list[dict[str, int]] = [{} for _ in range(num_sides)]
        self.sides: list[int] = []  # per text
        self.places: list[int] = []  # per text: its index among the distinct texts of its side
        self.ends: list[int] = []  # per record: number of texts up to its end
        self.ids: dict[str, list[str | None]] = {"query_id": [], "doc_id": [], "label": [], "row_id": []}

    def encode(
        self, sides: dict[str, TextTokenizer], key_sides: dict[str, TextTokenizer] | None
    ) -> dict[str, np.ndarray]:
        """Arrays of a store by name, and full_lengths (T,), the texts' lengths without truncation.

        `sides` are the tokenizers of queries and documents, `key_sides` those with the first file's prefixes, or None for
        text stores, which have no keys.
        """
        encoded = [encoder.encode_flat(list(distinct)) for encoder, distinct in zip(sides.values(), self.distinct)]
        pool, pool_lengths, pool_full_lengths = (np.concatenate(parts) for parts in zip(*encoded))
        side_starts = np.cumsum([0] + [len(distinct) for distinct in self.distinct])
        chosen = side_starts[np.array(self.sides)] + np.array(self.places)  # per text: its index in the pool
        lengths = pool_lengths[chosen]
        ends = np.cumsum(lengths)
        pool_starts = np.cumsum(pool_lengths) - pool_lengths
        tokens = pool[np.arange(ends[-1]) + np.repeat(pool_starts[chosen] - (ends - lengths), lengths)]
        arrays = {"tokens": tokens, "lengths": lengths.astype(np.int32), "full_lengths": pool_full_lengths[chosen]}
        if key_sides is not None:
            arrays["text_keys"] = self._text_keys(sides, key_sides, encoded)[chosen]
            texts = itertools.chain(*self.distinct)
            arrays["content_keys"] = content_keys(list(texts))[chosen]
            arrays |= {f"{name}s": self._id_keys(name) for name in ("query_id", "doc_id", "label")}
        return arrays

    def _text_keys(self, sides: dict[str, TextTokenizer], key_sides: dict, encoded: list) -> np.ndarray:
        """Keys of the distinct texts of all sides, from their tokens in `encoded`.

        The keys of documents use the first file's prefix, so that a document keeps its key under another prefix.
        """
        keys = []
        for side, distinct, (tokens, lengths, _) in zip(sides, self.distinct, encoded):
            if side == "documents" and sides[side] is not key_sides[side]:
                tokens, lengths, _ = key_sides[side].encode_flat(list(distinct))
            keys.append(token_keys(tokens, lengths))
        return np.concatenate(keys)

    def _id_keys(self, name: str) -> np.ndarray:
        """Keys (R,) of the records' ids with that name, 0 for none."""
        keys = np.zeros(len(self.ends), np.int64)
        rows = [row for row, value in enumerate(self.ids[name]) if value is not None]
        keys[rows] = id_keys(self.ids[name][row] for row in rows)
        return keys


@dataclass
class Chunk:
    """R records of one file: their texts, and the data stored along with them."""

    file: File
    texts: ChunkTexts
    names: list[str] = field(default_factory=list)  # per text: its key in the data
    scores: list[float] = field(default_factory=list)  # per text: the teacher's, NaN for none
    numbers: list[int] = field(default_factory=list)  # per record
    num_characters: int = 0
    num_distinct_characters: int = 0

    def add_text(self, side: int, name: str, text: str, score: float | None) -> None:
        texts = self.texts
        distinct = texts.distinct[side]
        place = distinct.get(text)
        if place is None:
            place = distinct[text] = len(distinct)
            self.num_distinct_characters += len(text)
        self.num_characters += len(text)
        texts.sides.append(side)
        texts.places.append(place)
        self.names.append(name)
        self.scores.append(math.nan if score is None else score)

    def end_record(self, number: int, ids: dict[str, str | None]) -> None:
        self.numbers.append(number)
        self.texts.ends.append(len(self.texts.places))
        for name, value in ids.items():
            self.texts.ids[name].append(value)

    def where(self, text: int) -> str:
        return self.file.location(self.numbers[int(np.searchsorted(self.texts.ends, text, side="right"))])
