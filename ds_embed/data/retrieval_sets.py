"""Sets of documents, queries and judgments: BEIR folders, our own files, and training records viewed as such a set.

All three yield (location, record) pairs and may be iterated repeatedly.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from ds_embed.data.files import SUFFIXES
from ds_embed.data.forms import RecordFile
from ds_embed.data.identity import text_id
from ds_embed.data.records import (
    DocumentRecord,
    QueryRecord,
    TrainingRecord,
    parse_document_record,
    parse_query_record,
    read_documents,
    read_queries,
)
from ds_embed.data.tally import Tally
from ds_embed.data.text_table import TextTable
from ds_embed.data.trec import Judgment, read_judgments
from ds_embed.settings.errors import UserError

TrainingRecords = Callable[[Tally], Iterator[tuple[str, TrainingRecord]]]


class RetrievalSet(Protocol):
    """What measuring retrieval needs. The caller must handle repeated records."""

    def documents(self) -> Iterator[tuple[str, DocumentRecord]]: ...

    def queries(self) -> Iterator[tuple[str, QueryRecord]]: ...

    def judgments(self) -> Iterator[tuple[str, Judgment]]: ...


class BeirFolder:
    """corpus.jsonl (_id, title, text), queries.jsonl (_id, text) and qrels/SPLIT.tsv of a folder.

    Corpus and queries may be in any file format that we read, such as corpus.parquet or corpus.jsonl.gz.
    """

    def __init__(self, folder: Path, split: str, tally: Tally, *, join_titles: bool):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; expected one with corpus.jsonl, queries.jsonl and qrels/")
        self._qrels_path = folder / "qrels" / f"{split}.tsv"
        if not self._qrels_path.is_file():
            splits = ", ".join(sorted(path.stem for path in folder.glob("qrels/*.tsv"))) or "none"
            raise UserError(f"--split {split}: there is no {self._qrels_path}; the splits here are {splits}")
        parse_document = partial(parse_document_record, join_titles=join_titles)
        self._corpus = RecordFile(_find_table(folder, "corpus"), parse_document)
        self._queries = RecordFile(_find_table(folder, "queries"), parse_query_record)
        self._tally = tally

    def documents(self) -> Iterator[tuple[str, DocumentRecord]]:
        return ((where, one) for where, _, (one,) in self._corpus.read(self._tally.refuse))

    def queries(self) -> Iterator[tuple[str, QueryRecord]]:
        return ((where, one) for where, _, (one,) in self._queries.read(self._tally.refuse))

    def judgments(self) -> Iterator[tuple[str, Judgment]]:
        return read_judgments(self._qrels_path)


def _find_table(folder: Path, name: str) -> Path:
    found = sorted(path for path in folder.glob(f"{name}.*") if path.suffixes[0] in SUFFIXES)
    if not found:
        raise UserError(f"{folder}: has no {name}.jsonl; a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/")
    return found[0]


@dataclass(frozen=True)
class OurFiles:
    """Our own files of queries and documents; relevant documents come from `qrels` or else from the queries' doc_id."""

    query_files: Sequence[str]
    doc_files: Sequence[str]
    qrels: str | None

    def documents(self) -> Iterator[tuple[str, DocumentRecord]]:
        return read_documents(self.doc_files)

    def queries(self) -> Iterator[tuple[str, QueryRecord]]:
        return read_queries(self.query_files)

    def judgments(self) -> Iterator[tuple[str, Judgment]]:
        if self.qrels is not None:
            yield from read_judgments(self.qrels)
            return
        for where, query in self.queries():
            if not query.doc_ids:
                raise UserError(f"{where}: doc_id is missing, the right document; add it or give --qrels")
            for doc_id in query.doc_ids:
                yield where, Judgment(query.query_id, doc_id, 1)


class TrainingSet:
    """Training records as a set: positives are judged 1, negatives 0. Texts without an id get their text_id.

    A negative that equals the positive of some record is the same document, and is not a negative of queries that have
    it as a positive. documents() must be exhausted before judgments() is called.
    """

    def __init__(self, read: TrainingRecords, ids_by_text: TextTable, tally: Tally):
        self._read, self._ids_by_text, self._tally = read, ids_by_text, tally
        self._texts: dict[tuple[str, str], str] = {}  # by kind and id, the text_id of the first text of that id

    def _read_again(self) -> Iterator[tuple[str, TrainingRecord]]:
        return self._read(self._tally.silent())

    def documents(self) -> Iterator[tuple[str, DocumentRecord]]:
        for where, record in self._read(self._tally):
            doc_id = record.doc_id or text_id(record.pos_doc)
            self._note(record.pos_doc, doc_id, where)
            yield where, DocumentRecord(record.pos_doc, doc_id)
        for where, record in self._read_again():
            for negative in record.neg_docs:
                if self._note(negative, text_id(negative), where):
                    yield where, DocumentRecord(negative, text_id(negative))

    def queries(self) -> Iterator[tuple[str, QueryRecord]]:
        for where, record in self._read_again():
            yield where, QueryRecord(record.query, _query_id(record), (), record.prompt)

    def judgments(self) -> Iterator[tuple[str, Judgment]]:
        positives: dict[str, set[str]] = {}
        for where, record in self._judged():
            doc_id = record.doc_id or text_id(record.pos_doc)
            positives.setdefault(_query_id(record), set()).add(doc_id)
            yield where, Judgment(_query_id(record), doc_id, 1)
        for where, record in self._judged():
            for negative in record.neg_docs:
                doc_id = self._ids_by_text.get(text_id(negative))
                assert doc_id is not None, "documents() was not gone through"
                if doc_id not in positives[_query_id(record)]:
                    yield where, Judgment(_query_id(record), doc_id, 0)

    def _judged(self) -> Iterator[tuple[str, TrainingRecord]]:
        """The records whose ids stand for their own texts, not for another one further up, which was refused."""
        for where, record in self._read_again():
            named = (("query", record.query_id, record.query), ("document", record.doc_id, record.pos_doc))
            keys = [((kind, name), text_id(text)) for kind, name, text in named if name is not None]
            if [key for name, key in keys if self._texts.setdefault(name, key) != key] == []:
                yield where, record

    def _note(self, text: str, doc_id: str, where: str) -> bool:
        """Store the text's id and return whether the text is new; the first id of a text is kept."""
        key = text_id(text)
        return self._ids_by_text.get(key) is None and self._ids_by_text.add(key, doc_id, where)


def _query_id(record: TrainingRecord) -> str:
    return record.query_id or text_id(record.query)
