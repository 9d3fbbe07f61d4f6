"""The input of mining: the distinct queries and documents of the training files, and each query's positives.

One rank builds it as plain files that every rank memory-maps; texts stay on disk.

Shapes: R records, Q queries, G groups of queries, M candidates, M + E documents (E are positives or existing negatives
that are not candidates).
"""

from __future__ import annotations

import itertools
import json
import logging
import mmap
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ds_embed.data.forms import Reading, read_training_records
from ds_embed.data.identity import content_key, ranges, token_keys
from ds_embed.data.records import TrainingRecord, read_documents
from ds_embed.data.tokenize import TextTokenizer
from ds_embed.settings.errors import UserError
from ds_embed.settings.tool_arguments import MiningArguments

logger = logging.getLogger(__name__)

_TEXTS_AT_ONCE = 1024
# kind: (file, key of the text, key of the id), as recipes/generate.py reads them; KIND.names holds the users' ids by
# row
TABLES = {"queries": ("queries.jsonl", "query", "query_id"), "documents": ("documents.jsonl", "pos_doc", "doc_id")}


@dataclass(frozen=True)
class Ragged:
    """Concatenated lists of row numbers: list i is values[first[i] : first[i + 1]]."""

    first: np.ndarray
    values: np.ndarray

    @classmethod
    def of_pairs(cls, owners: np.ndarray, values: np.ndarray | array, num_owners: int) -> Ragged:
        """The distinct values of each owner, in ascending order, from (owner, value) pairs."""
        pairs = np.unique(np.stack([owners, values], axis=1), axis=0) if len(owners) else np.empty((0, 2), np.int64)
        return cls(np.searchsorted(pairs[:, 0], np.arange(num_owners + 1)), np.ascontiguousarray(pairs[:, 1]))

    def counts(self, owners: np.ndarray) -> np.ndarray:
        return self.first[owners + 1] - self.first[owners]

    def of(self, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices into `owners`, and values, of all values in these lists."""
        counts = self.counts(owners)
        return np.repeat(np.arange(len(owners)), counts), self.values[ranges(self.first[owners], counts)]


class Texts:
    """The texts of a table by row, read from its memory-mapped JSONL file."""

    def __init__(self, path: Path, offsets: np.ndarray, key: str):
        self._file = open(path, "rb")
        self._lines = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets, self._key = offsets, key

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> str:
        values = orjson.loads(self._lines[self._offsets[row] : self._offsets[row + 1]])
        return values.get("prompt", "") + values[self._key]

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class Catalog:
    """The tables and their relations. Documents 0 to M - 1 are the candidates."""

    folder: Path
    num_candidates: int
    queries: Texts
    documents: Texts
    record_queries: np.ndarray  # (R,) query of each record
    record_positives: np.ndarray  # (R,) document of each record
    existing: Ragged  # by record: its own neg_doc, which are kept
    groups: np.ndarray  # (Q,) queries with the same text, tokens, or query_id in a file share a group
    positives: Ragged  # by group: the positive documents of all its records
    excluded: Ragged  # by group: those, documents with the doc_id of one, and the queries' own texts

    @classmethod
    def open(cls, folder: Path) -> Catalog:
        arrays = {path.stem: np.load(path, mmap_mode="r").view(np.ndarray) for path in folder.glob("*.npy")}
        texts: dict[str, Any] = {
            kind: Texts(folder / name, arrays[f"{kind}_offsets"], key) for kind, (name, key, _) in TABLES.items()
        }
        lists = ("existing", "positives", "excluded")
        ragged: dict[str, Any] = {name: Ragged(arrays[f"{name}_first"], arrays[f"{name}_values"]) for name in lists}
        plain: dict[str, Any] = {name: arrays[name] for name in ("record_queries", "record_positives", "groups")}
        return cls(folder, json.loads((folder / "catalog.json").read_text())["candidates"], **texts, **plain, **ragged)


def match_key(text: str, normalized: bool) -> int:
    """A key for equal texts or, if normalized, for texts that differ only in case, white space and Unicode form."""
    if normalized:
        text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return content_key(text)


@dataclass
class _Table:
    """Distinct texts by their keys, written as they arrive; row i is the i-th distinct text."""

    file: IO[bytes]
    text_key: str
    id_key: str
    rows: dict[int, int] = field(default_factory=dict)
    offsets: array = field(default_factory=lambda: array("q", [0]))
    names: list[str | None] | None = None  # the users' ids, if needed
    named: dict[str | None, tuple[int, str | None]] = field(default_factory=dict)  # row and file of each user's id

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def found(self, keys: Iterable[int]) -> list[int]:
        """The rows of those keys that are known."""
        return [self.rows[key] for key in keys if key in self.rows]

    def row(
        self,
        keys: tuple[int, ...],
        text: str,
        name: str | None,
        path: str | None,
        where: str,
        prompt: str | None = None,
    ) -> int:
        row = next(iter(self.found(keys)), len(self))
        for key in keys:
            self.rows.setdefault(key, row)
        if self.names is not None:
            known, file = self.named.setdefault(name, (row, path))
            if known != row and file != path and None not in (file, path):
                raise UserError(
                    f"{where}: {self.id_key} '{name}' stands in {file} for another text, and --embeddings has one vector "
                    "for it; give each text its own, or let --model_name_or_path encode them"
                )
        if row == len(self):
            values = {self.text_key: text[len(prompt or "") :], self.id_key: str(row)}
            line = orjson.dumps(values if prompt is None else values | {"prompt": prompt}) + b"\n"
            self.file.write(line)
            self.offsets.append(self.offsets[-1] + len(line))
            if self.names is not None:
                self.names.append(name)
        return row


def reading(arguments: MiningArguments) -> Reading:
    return Reading(tuple(arguments.columns), tuple(arguments.corpus_files))


class CatalogBuilder:
    """Reads the files into a folder. The tables' `names` are filled if vectors will be looked up by id.

    With `tokenizers` of queries and documents, texts with the same tokens are one text, as in training.
    """

    def __init__(self, folder: Path, arguments: MiningArguments, tokenizers: tuple[TextTokenizer, ...] | None = None):
        self._folder, self._arguments, self._tokenizers = folder, arguments, tokenizers
        self._needs_ids = arguments.embeddings is not None
        self._normalized = arguments.match_positives == "normalized"
        self.queries, self.documents = (
            _Table(open(folder / name, "wb"), key, id_key, names=[] if self._needs_ids else None)
            for name, key, id_key in TABLES.values()
        )
        self._rows_of_id: dict[tuple[str | None, str], list[int]] = {}  # by file (None: all doc_files) and id
        self._counts = {"repeated_documents": 0, "blank_documents": 0}

    def build(self) -> dict[str, int]:
        """Write all files of the catalog; returns counts. UserError for bad records, with file and line."""
        for (path, where, text, name), (keys,) in self._keyed(self._corpus(), 1, lambda place: [place[2]]):
            self._add_document(path, where, text, keys, name)
        num_candidates = len(self.documents)
        if not num_candidates:
            raise UserError("--doc_files: hold no document with a text, so there is nothing to choose from")
        relations = self._relations()
        for name, values in relations.items():
            np.save(self._folder / f"{name}.npy", values)
        for kind, table in zip(TABLES, (self.queries, self.documents)):
            table.file.close()
            np.save(self._folder / f"{kind}_offsets.npy", np.frombuffer(table.offsets, dtype=np.int64))
            if table.names is not None:
                (self._folder / f"{kind}.names").write_text("".join(f"{id_}\n" for id_ in table.names), "utf-8")
        counts = {
            "records": len(relations["record_queries"]),
            "queries": len(self.queries),
            "candidates": num_candidates,
            "other_documents": len(self.documents) - num_candidates,
            **self._counts,
        }
        (self._folder / "catalog.json").write_text(json.dumps(counts))
        return counts

    def _keyed(self, items: Iterable[Any], side: int, texts_of: Callable[[Any], list[str]]) -> Iterator[tuple]:
        """Yield (item, keys of each of its texts); texts that share a key are one query (side 0) or document (1)."""
        items = iter(items)
        while block := list(itertools.islice(items, _TEXTS_AT_ONCE)):
            texts = [texts_of(item) for item in block]
            flat = [text for of_item in texts for text in of_item]
            keys: list[tuple[int, ...]] = [(match_key(text, self._normalized),) for text in flat]
            if self._tokenizers is not None:
                tokens, lengths, _ = self._tokenizers[side].encode_flat(flat)
                keys = [(*key, token_key) for key, token_key in zip(keys, token_keys(tokens, lengths).tolist())]
            left = iter(keys)
            yield from ((item, list(itertools.islice(left, len(of_item)))) for item, of_item in zip(block, texts))

    def _corpus(self) -> Iterator[tuple[str | None, str, str, str | None]]:
        """Yield (file, where, text, id) of every document that may become a negative; doc_files count as one file."""
        for where, document in read_documents(self._arguments.doc_files):
            if not document.pos_doc.strip():
                self._counts["blank_documents"] += 1
                continue
            yield None, where, document.pos_doc, document.doc_id
        for path, where, record in self._records(lambda lines: logger.info("%s", "\n".join(lines))):
            if not self._arguments.doc_files:
                yield path, where, record.pos_doc, record.doc_id
            if self._arguments.include_neg_docs:
                for negative in record.neg_docs:
                    yield path, where, negative, None

    def _records(
        self, tell: Callable[[list[str]], object] = lambda _: None
    ) -> Iterator[tuple[str, str, TrainingRecord]]:
        for path in self._arguments.train_files:
            for where, record in read_training_records([path], reading(self._arguments), self._folder, tell=tell):
                yield path, where, record

    def _add_document(
        self,
        path: str | None,
        where: str,
        text: str,
        keys: tuple[int, ...],
        name: str | None,
        cure: str = "give every record its doc_id",
    ) -> int:
        if self._needs_ids and name is None:
            raise UserError(f"{where}: doc_id is missing, by which --embeddings has its vector; {cure}")
        before = len(self.documents)
        row = self.documents.row(keys, text, name, path, where)
        self._counts["repeated_documents"] += row < before
        if name is not None:
            rows = self._rows_of_id.setdefault((path, name), [])
            if row not in rows:
                rows.append(row)
        return row

    def _relations(self) -> dict[str, np.ndarray]:
        record_queries, record_positives = array("q"), array("q")
        existing_records, existing_rows, excluded_records, excluded_rows = (array("q") for _ in range(4))
        same_group = array("q")  # pairs of queries
        first_query: dict[Any, int] = {}  # by what queries share
        repeated = self._counts["repeated_documents"]
        keep = self._arguments.keep_existing

        def texts_of(place: tuple[str, str, TrainingRecord]) -> list[str]:
            record = place[2]
            return [record.pos_doc, *(record.neg_docs if keep else ())]

        documents = self._keyed(self._records(), 1, texts_of)
        records = self._keyed(documents, 0, lambda item: [item[0][2].query])
        for number, (((path, where, record), (keys, *negatives_keys)), (query_keys,)) in enumerate(records):
            if self._needs_ids and record.query_id is None:
                raise UserError(
                    f"{where}: query_id is missing, by which --embeddings has its vector; give every record its query_id"
                )
            key, prompt = content_key(record.query), record.prompt
            query = self.queries.row((key,), record.query, record.query_id, path, where, prompt)
            for shared in (*query_keys, record.query_id and (path, record.query_id)):
                if shared is not None:
                    same_group.extend((query, first_query.setdefault(shared, query)))
            record_queries.append(query)
            record_positives.append(self._add_document(path, where, record.pos_doc, keys, record.doc_id))
            # A record's doc_id is valid within its file, and also refers to documents in doc_files.
            places = [] if record.doc_id is None else [(path, record.doc_id), (None, record.doc_id)]
            same_id = [row for place in places for row in self._rows_of_id.get(place, [])]
            # A text may match one document by its words and another by its tokens; and a query is not its own negative.
            excluded = (record_positives[-1], *same_id, *self.documents.found((*keys, query_keys[0])))
            excluded_records.extend([number] * len(excluded))
            excluded_rows.extend(excluded)
            cure = "leave --keep_existing out, or let --model_name_or_path encode it"
            for negative, negative_keys in zip(record.neg_docs, negatives_keys):
                known = self.documents.found(negative_keys)
                existing_records.append(number)
                existing_rows.append(
                    known[0] if known else self._add_document(path, where, negative, negative_keys, None, cure)
                )
        self._counts["repeated_documents"] = repeated  # count those of the corpus, not of this second pass
        pairs = np.array(same_group, np.int64).reshape(-1, 2)
        graph = coo_array((np.ones(len(pairs), bool), pairs.T), shape=(len(self.queries), len(self.queries)))
        num_groups, groups = connected_components(graph, directed=False)
        of_record = groups[np.array(record_queries)]
        lists = {
            "positives": Ragged.of_pairs(of_record, record_positives, num_groups),
            "excluded": Ragged.of_pairs(of_record[np.array(excluded_records)], excluded_rows, num_groups),
            # In the order of the records.
            "existing": Ragged(
                np.searchsorted(existing_records, np.arange(len(of_record) + 1)), np.array(existing_rows)
            ),
        }
        relations = {"record_queries": record_queries, "record_positives": record_positives, "groups": groups}
        for name, of_owners in lists.items():
            relations |= {f"{name}_first": of_owners.first, f"{name}_values": of_owners.values}
        return {name: np.array(values, dtype=np.int64) for name, values in relations.items()}
