"""Sets of documents, queries and judgments: BEIR folders, our own files, and training records seen as such a set.

All three hand out (place, record) pairs, one at a time, and may be gone through again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from ds_embed.data.formats.tables import TABLE_SUFFIXES, Table
from ds_embed.data.formats.tally import Tally
from ds_embed.data.formats.text_table import TextTable
from ds_embed.data.formats.trec import Judgment, read_judgments
from ds_embed.data.json_files import BadRecord, read_json_objects
from ds_embed.data.records import DocumentRecord, QueryRecord, TrainingRecord, parse_document_record, parse_query_record
from ds_embed.settings.errors import UserError

TrainingRecords = Callable[[Tally], Iterator[tuple[str, TrainingRecord]]]


class RetrievalSet(Protocol):
    """What a retrieval measurement needs. Repeats are the reader's to deal with."""

    def documents(self) -> Iterator[tuple[str, DocumentRecord]]: ...

    def queries(self) -> Iterator[tuple[str, QueryRecord]]: ...

    def judgments(self) -> Iterator[tuple[str, Judgment]]: ...


def join_title(title: str, text: str) -> str:
    """The text that BEIR's own encoders see: the title, a space, the text; the text alone where there is no title."""
    return f"{title} {text}".strip() if title else text


class BeirFolder:
    """corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and qrels/SPLIT.tsv of a folder.

    Corpus and queries may also be .json, .parquet, .csv or .tsv tables with these columns.
    """

    def __init__(self, folder: Path, split: str, tally: Tally, *, join_titles: bool):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; want one with corpus.jsonl, queries.jsonl and qrels/")
        self._qrels_path = folder / "qrels" / f"{split}.tsv"
        if not self._qrels_path.is_file():
            splits = ", ".join(sorted(path.stem for path in folder.glob("qrels/*.tsv"))) or "none"
            raise UserError(f"--split {split}: there is no {self._qrels_path}; the splits here are {splits}")
        self._corpus_path, self._queries_path = (_find_table(folder, name) for name in ("corpus", "queries"))
        self._tally = tally
        self._join_titles = join_titles

    def documents(self) -> Iterator[tuple[str, DocumentRecord]]:
        for where, row in self._rows(self._corpus_path):
            title = row.get("title")
            try:
                document = parse_document_record(where, {"pos_doc": row.get("text"), "doc_id": row.get("_id")})
                if type(title) not in (str, type(None)):
                    raise BadRecord(where, "title is no string")
            except BadRecord as error:
                self._tally.refuse(error)
                continue
            if title and self._join_titles:
                document = document._replace(pos_doc=join_title(title, document.pos_doc))
            yield where, document

    def queries(self) -> Iterator[tuple[str, QueryRecord]]:
        for where, row in self._rows(self._queries_path):
            try:
                query = parse_query_record(where, {"query": row.get("text"), "query_id": row.get("_id")})
            except BadRecord as error:
                self._tally.refuse(error)
                continue
            yield where, query

    def judgments(self) -> Iterator[tuple[str, Judgment]]:
        return read_judgments(self._qrels_path)

    def _rows(self, path: Path) -> Iterator[tuple[str, dict]]:
        table = Table(path, self._tally.refuse)
        missing = sorted({"_id", "text"}.difference(table.columns))
        if missing:
            shown = ", ".join(table.columns)
            raise UserError(f"{path}: has no '{missing[0]}'; BEIR's files have _id and text, and this one {shown}")
        for where, row in table:
            if type(row.get("_id")) is int:
                row["_id"] = str(row["_id"])
            yield where, row


def _find_table(folder: Path, name: str) -> Path:
    found = next((path for suffix in TABLE_SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)
    if found is None:
        raise UserError(f"{folder}: has no {name}.jsonl; a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/")
    return found


class OurFiles:
    """Our files of queries and documents; the right documents are those of `qrels`, else the queries' doc_id."""

    def __init__(self, query_files: Sequence[str], doc_files: Sequence[str], qrels: str | None):
        self._query_files = query_files
        self._doc_files = doc_files
        self._qrels = qrels

    def documents(self) -> Iterator[tuple[str, DocumentRecord]]:
        for path in self._doc_files:
            for where, record in read_json_objects(path):
                yield where, parse_document_record(where, record)

    def queries(self) -> Iterator[tuple[str, QueryRecord]]:
        for path in self._query_files:
            for where, record in read_json_objects(path):
                yield where, parse_query_record(where, record)

    def judgments(self) -> Iterator[tuple[str, Judgment]]:
        if self._qrels is not None:
            yield from read_judgments(self._qrels)
            return
        for where, query in self.queries():
            if query.doc_id is None:
                raise UserError(f"{where}: doc_id is missing, the right document; add it or give --qrels")
            yield where, Judgment(query.query_id, query.doc_id, 1)


class TrainingSet:
    """Training records as a set: positives judged 1, negatives 0. Texts without an id get one of their content.

    A negative that is the positive of some record is that document, and no negative of a query that it is a
    positive of. documents() must be gone through before judgments().
    """

    def __init__(self, read: TrainingRecords, ids_by_text: TextTable, tally: Tally):
        self._tally = tally
        self._read_again = lambda: read(tally.silent())
        self._read = read
        self._ids_by_text = ids_by_text

    def documents(self) -> Iterator[tuple[str, DocumentRecord]]:
        for where, record in self._read(self._tally):
            doc_id = record.doc_id or _content_id("d", record.pos_doc)
            self._note(record.pos_doc, doc_id, where)
            yield where, DocumentRecord(record.pos_doc, doc_id)
        for where, record in self._read_again():
            for negative in record.neg_docs:
                if self._note(negative, _content_id("d", negative), where):
                    yield where, DocumentRecord(negative, _content_id("d", negative))

    def queries(self) -> Iterator[tuple[str, QueryRecord]]:
        for where, record in self._read_again():
            yield where, QueryRecord(record.query, _query_id(record), None)

    def judgments(self) -> Iterator[tuple[str, Judgment]]:
        positives: dict[str, set[str]] = {}
        for where, record in self._read_again():
            doc_id = record.doc_id or _content_id("d", record.pos_doc)
            positives.setdefault(_query_id(record), set()).add(doc_id)
            yield where, Judgment(_query_id(record), doc_id, 1)
        for where, record in self._read_again():
            for negative in record.neg_docs:
                doc_id = self._ids_by_text.get(_content_id("", negative))
                assert doc_id is not None, "documents() was not gone through"
                if doc_id not in positives[_query_id(record)]:
                    yield where, Judgment(_query_id(record), doc_id, 0)

    def _note(self, text: str, doc_id: str, where: str) -> bool:
        """Whether the text is new; the first id of a text is kept."""
        key = _content_id("", text)
        return self._ids_by_text.get(key) is None and self._ids_by_text.add(key, doc_id, where)


def _query_id(record: TrainingRecord) -> str:
    return record.query_id or _content_id("q", record.query)


def _content_id(kind: str, text: str) -> str:
    return kind + hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
