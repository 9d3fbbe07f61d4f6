"""Token stores: tokenized records on disk, memory-mapped, shared by all ranks of a machine.

A store is a folder of plain .npy files, a manifest.json, and an ids.txt for texts with ids. Letters: R records, T
texts, S tokens. Opening a store only maps its arrays, so it takes the same time for any R.

    tokens.npy         (S,) int32       all texts, concatenated
    offsets.npy        (T + 1,) int64   text t owns tokens[offsets[t] : offsets[t + 1]]
    lengths.npy        (T,) int32       tokens of each text
    lines.npy          (R,) int64       number of each record in its file, from 1: its line, element or row, counted
                                        across the parts of a file; samples of one row share it
  training only:
    first_text.npy     (R + 1,) int64   record r owns texts first_text[r] to first_text[r + 1] - 1:
                                        its query, its positive, then its negatives
    text_keys.npy      (T,) int64       key of each text: equal if the model sees the same tokens (identity.py)
    content_keys.npy   (T,) int64       key of each text as in the data, the same as its text_id (identity.py)
    query_ids.npy      (R,) int64       key of each record's query_id, 0 for none; doc_ids.npy likewise
    several_*.npy                       queries with several positives, and these: see write_positives
    labels.npy         (R,) int64       key of each labelled text's label, 0 elsewhere; the text is both the query and the
                                        positive of its record, which has no other
    scores.npy         (T,) float32     a teacher's score of each document for its query, NaN for none
  queries and documents only (one text per record):
    ids.txt                             UTF-8, line i is the id of row i

They are built by build_training_store and build_text_store.
"""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.data.identity import POSITIVES_ARRAYS
from ds_embed.data.labels import LabelledTexts
from ds_embed.data.store_build import Formats, build_text_store, build_training_store, part_location
from ds_embed.data.store_files import read_manifest
from ds_embed.data.store_writer import IDS_NAME
from ds_embed.settings.errors import UserError

__all__ = ["Formats", "TextStore", "TrainingStore", "build_text_store", "build_training_store", "check_texts_fit"]


class _Store:
    """The common part of all stores. Arrays are read-only memory maps with the names of their files."""

    kinds: tuple[str, ...] = ()

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.manifest: dict[str, Any] = read_manifest(self.path)
        if self.manifest["kind"] not in self.kinds:
            raise UserError(f"{self.path}: holds {self.manifest['kind']}, expected {' or '.join(self.kinds)}")
        self.num_records: int = self.manifest["num_records"]
        self.num_texts: int = self.manifest["num_texts"]
        self.num_tokens: int = self.manifest["num_tokens"]
        self.tokens = self._map("tokens", self.num_tokens)
        self.offsets = self._map("offsets", self.num_texts + 1)
        self.lengths = self._map("lengths", self.num_texts)
        self.lines = self._map("lines", self.num_records)
        self._file_ends = np.cumsum([file["num_records"] for file in self.manifest["files"]])

    @classmethod
    def open(cls, path: str | os.PathLike):
        """Map the store in folder `path`. UserError with the cure if it is not whole."""
        return cls(path)

    def tokens_of(self, text: int) -> np.ndarray:
        """The token ids of a text: a read-only view, (lengths[text],) int32."""
        start, end = self.offsets[text : text + 2].tolist()
        return self.tokens[start:end]

    @property
    def file_sizes(self) -> tuple[int, ...]:
        """Number of records of each file, in store order."""
        return tuple(file["num_records"] for file in self.manifest["files"])

    def facts(self) -> list[dict[str, Any]]:
        """What was read from each file: its path, records, negatives and positives, and truncated texts."""
        left_out = ("parts", "stamps", "sha256", "without_negatives")
        facts = [{k: v for k, v in file.items() if k not in left_out} for file in self.manifest["files"]]
        formats = self.manifest["settings"]
        for number, file in enumerate(facts):
            for side, form in (("queries", "query_format"), ("documents", "document_format")):
                if side in file:
                    form = formats.get(form) or formats["text_format"]
                    form = form if isinstance(form, dict) else form[number]
                    forms = [form] if isinstance(form, dict) else form
                    prefixes = [one["prefix"] for one in forms]
                    prefix = prefixes if len(prefixes) > 1 else prefixes[0]
                    file[side] |= {"max_length": forms[0]["max_length"], "prefix": prefix}
        return facts

    def describe(self) -> list[str]:
        """facts() as lines for the user."""
        return [line for file in self.facts() for line in describe_file(file)]

    def lengths_of(self, texts: np.ndarray) -> np.ndarray:
        """The token counts of texts, copied to memory: same shape as `texts`, int64."""
        return np.asarray(self.lengths[texts], np.int64)

    def prompt_lengths_of(self, texts: np.ndarray) -> np.ndarray | None:
        """Number of leading tokens of texts (n,) that the pooling leaves out, (n,) int64; None if there are none."""
        by_file = np.array(self.manifest["prompt_lengths"])  # (files, sides)
        if not by_file.any():
            return None
        records, sides = self._places_of(texts)
        return by_file[np.searchsorted(self._file_ends, records, side="right"), sides]

    def location(self, record: int) -> str:
        """A record's location in the data: "path:17", or "path:record 17" in a JSON array."""
        if not 0 <= record < self.num_records:
            raise IndexError(f"record {record} of a store with {self.num_records}")
        file = self.manifest["files"][int(np.searchsorted(self._file_ends, record, side="right"))]
        return part_location(file["parts"], int(self.lines[record]))

    def _map(self, name: str, num_items: int | None) -> np.ndarray:
        again = "delete that folder and build the store again"
        try:
            array = np.lib.format.open_memmap(self.path / f"{name}.npy", mode="r")  # never unpickles
        except ValueError as error:
            raise UserError(f"{self.path}: {name}.npy is not an array of plain numbers ({error}); {again}") from None
        if num_items is not None and array.shape != (num_items,):
            raise UserError(
                f"{self.path}: {name}.npy holds {array.shape} items, and the manifest says {num_items}; {again}"
            )
        # Return a plain array over the map: slicing a memmap object takes several times as long per text.
        return array.view(np.ndarray)


class TrainingStore(_Store):
    """Training records. Record r's texts are consecutive: query, positive, then its negatives."""

    kinds = ("training",)

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        self.first_text = self._map("first_text", self.num_records + 1)
        self.text_keys = self._map("text_keys", self.num_texts)
        self.content_keys = self._map("content_keys", self.num_texts)
        self.ids = tuple(self._map(name, self.num_records) for name in ("query_ids", "doc_ids"))
        self.labels = self._map("labels", self.num_records)
        self.kinds_of_files = tuple(file.get("kind", "") for file in self.manifest["files"])
        self.several_positives = tuple(self._map(name, None) for name in POSITIVES_ARRAYS)
        self.scores = self._map("scores", self.num_texts)

    @cached_property
    def labelled(self) -> LabelledTexts:
        """The labelled texts, by label."""
        kinds = np.repeat(self.kinds_of_files, self.file_sizes)
        records = np.flatnonzero(kinds == "labels")
        return LabelledTexts.of(records, self.files_of(records), self.labels[records])

    def files_of(self, records: np.ndarray) -> np.ndarray:
        """The index of each record's file, same shape as `records`."""
        return np.searchsorted(self._file_ends, records, side="right")

    def rows(self) -> tuple[np.ndarray, tuple[int, ...]]:
        """The first record of each row of the files, (G + 1,): one row may have several positives, each a record.

        Also returns the number of rows of each file.
        """
        is_first = np.append(True, self.lines[1:] != self.lines[:-1])
        starts = self._file_ends[:-1]
        is_first[starts] = True
        first = np.append(np.flatnonzero(is_first), self.num_records)
        return first, tuple(np.diff(np.searchsorted(first, [0, *self._file_ends])).tolist())

    def _places_of(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        records = np.searchsorted(self.first_text, texts, side="right") - 1
        return records, (texts != self.first_text[records]).astype(np.int64)


class TextStore(_Store):
    """Queries or documents to encode: row i is text i and record i."""

    kinds = ("queries", "documents")

    def _places_of(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return texts, np.zeros_like(texts)

    @property
    def ids_path(self) -> Path:
        """The file of ids, one per line, in row order."""
        return self.path / IDS_NAME

    def ids(self) -> Iterator[str]:
        """The ids in row order, one at a time."""
        with open(self.ids_path, encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line[:-1]


def describe_file(facts: dict[str, Any]) -> list[str]:
    """One file's facts, as returned by _Store.facts, as lines for the user."""
    parts = [facts.get("read") or f"{facts['num_records']:,} records"]
    if facts.get("num_rows", facts["num_records"]) < facts["num_records"]:
        parts.append(f"{facts['num_records']:,} samples")
    if facts.get("num_blank"):
        parts.append(f"{facts['num_blank']:,} of them blank")
    if facts.get("num_repeated"):
        parts.append(f"{facts['num_repeated']:,} of them repeat a query with its positive")
    if facts.get("max_positives", 1) > 1:
        parts.append(f"queries with up to {facts['max_positives']:,} positives")
    if "negatives" in facts:
        least, most = facts["negatives"]
        parts.append(f"{least:,} to {most:,} negatives each" if least < most else f"{most:,} negatives each")
    lines = [f"{facts['path']}: {', '.join(parts)}"]
    for side in ("queries", "documents"):
        if side in facts:
            texts, cut, longest = (facts[side][name] for name in ("num_texts", "num_cut", "longest"))
            share = f" ({cut / texts:.1%})" if cut else ""
            lines.append(
                f"{side}: {cut:,} of {texts:,}{share} cut at {facts[side]['max_length']:,} tokens, longest {longest:,}"
            )
    if "unread" in facts:
        lines.append(f"not read: {', '.join(facts['unread'])}")
    if "num_prompts" in facts:
        prefix, example = facts["queries"]["prefix"], facts["prompted"]
        example = f"{example[:100]}..." if len(example) > 100 else example
        lines.append(
            f"{facts['num_prompts']:,} queries bring a prompt of their own, in place of the query prefix {prefix!r}, such as {example!r}"
        )
    return lines + facts.get("notes", [])


def check_texts_fit(store: TextStore | TrainingStore, micro_batch_tokens: int) -> None:
    """UserError with the location of the longest text if it does not fit into a micro-batch."""
    longest = store.manifest["longest_text"]
    if longest["num_tokens"] > micro_batch_tokens:
        raise UserError(
            f"--micro_batch_tokens {micro_batch_tokens}: smaller than the text of {longest['num_tokens']} tokens "
            f"at {longest['location']}; raise it to at least {longest['num_tokens']} or lower --max_length"
        )
