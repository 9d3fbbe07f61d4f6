"""From one form to another: training records, sets of queries and documents, judgments.

Texts stay on disk (text_table.py). What memory holds grows by some 100 bytes an id that judgments name and
some 200 bytes a judgment.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from ds_embed.artifact.durable import folder_when_whole, replaced_when_whole
from ds_embed.data.formats.retrieval_sets import RetrievalSet, join_title
from ds_embed.data.formats.tables import table_writer
from ds_embed.data.formats.tally import Tally
from ds_embed.data.formats.text_table import TextTable
from ds_embed.data.formats.trec import Judgment, unique_judgments, write_beir_qrels
from ds_embed.data.json_files import BadRecord
from ds_embed.data.records import (
    QueryRecord,
    TrainingRecord,
    parse_document_record,
    parse_query_record,
    parse_training_record,
)

NumberedRecords = Iterator[tuple[str, TrainingRecord]]


def training_records(source: RetrievalSet, tally: Tally, work: Path, *, judged_negatives: bool) -> NumberedRecords:
    """(place, record) for each document judged relevant to a query; `work` is a folder with room for the texts.

    With `judged_negatives` the documents that are judged not relevant to the query are its negatives.
    """
    wanted, negatives = set(), {}
    for _, judgment in unique_judgments(source.judgments()):
        if judgment.relevance > 0 or judged_negatives:
            wanted.add(judgment.doc_id)
        if judgment.relevance <= 0 and judged_negatives:
            negatives.setdefault(judgment.query_id, []).append(judgment.doc_id)
    with TextTable(work, "document id") as documents, TextTable(work, "query id") as queries:
        for where, document in source.documents():
            if document.doc_id in wanted:
                _add(documents, document.doc_id, document.pos_doc, where, tally)
        for where, query in source.queries():
            _add(queries, query.query_id, query.query, where, tally)
        for where, judgment in unique_judgments(source.judgments()):
            if judgment.relevance <= 0 or not _known(where, judgment, queries, documents, tally):
                continue
            query_id, doc_id, _ = judgment
            record = {"query": queries.get(query_id), "pos_doc": documents.get(doc_id), "query_id": query_id}
            texts = [documents.get(name) for name in negatives.get(query_id, ())]
            if None in texts:
                name = negatives[query_id][texts.index(None)]
                tally.refuse_unknown(where, f"document '{name}', a judged negative of the query, is not in the corpus")
            record |= {"doc_id": doc_id, "neg_doc": [text for text in texts if text is not None]}
            try:
                yield where, parse_training_record(where, record)
            except BadRecord as error:
                tally.refuse(error)


def write_training(path: Path, records: NumberedRecords, tally: Tally) -> None:
    """Our JSONL; keys without a value are left out."""
    with replaced_when_whole(path) as file:
        for _, record in records:
            values = record._asdict()
            values["neg_doc"] = list(values.pop("neg_docs")) or None
            write_json_line(file, values)
            tally.count("training records written")


def write_pairs(path: Path, records: NumberedRecords, num_negatives: int, tally: Tally) -> None:
    """A table of anchor, positive and, as sentence-transformers names them, negative or negative_1 to negative_K."""
    names = ["negative"] if num_negatives == 1 else [f"negative_{k}" for k in range(1, num_negatives + 1)]
    with table_writer(path, dict.fromkeys(["anchor", "positive", *names], str)) as write:
        for where, record in records:
            if len(record.neg_docs) < num_negatives:
                problem = f"has {len(record.neg_docs)} neg_doc; --num_negatives {num_negatives} wants so many"
                tally.refuse(BadRecord(where, problem))
                continue
            write({"anchor": record.query, "positive": record.pos_doc, **dict(zip(names, record.neg_docs))})
            tally.count("rows written")


def write_beir(folder: Path, split: str, source: RetrievalSet, tally: Tally) -> None:
    """A BEIR folder with all queries and documents of `source`; titles are empty."""
    with folder_when_whole(folder) as partial:
        (partial / "qrels").mkdir()
        with TextTable(partial, "document id", keep_texts=False) as documents:
            with TextTable(partial, "query id", keep_texts=False) as queries:
                with replaced_when_whole(partial / "corpus.jsonl") as file:
                    for where, document in source.documents():
                        if _add(documents, document.doc_id, document.pos_doc, where, tally):
                            write_json_line(file, {"_id": document.doc_id, "title": "", "text": document.pos_doc})
                            tally.count("documents written")
                with replaced_when_whole(partial / "queries.jsonl") as file:
                    for where, query in source.queries():
                        if _add(queries, query.query_id, query.query, where, tally):
                            write_json_line(file, {"_id": query.query_id, "text": query.query})
                            tally.count("queries written")
                judgments = _known_judgments(source, queries, documents, tally)
                write_beir_qrels(partial / "qrels" / f"{split}.tsv", judgments)


def write_test_files(folder: Path, source: RetrievalSet, tally: Tally) -> None:
    """queries.jsonl (of the judged queries, a line for each relevant document), docs.jsonl and qrels.tsv."""
    with folder_when_whole(folder) as partial, ExitStack() as stack:
        documents = stack.enter_context(TextTable(partial, "document id", keep_texts=False))
        queries = stack.enter_context(TextTable(partial, "query id"))
        with replaced_when_whole(partial / "docs.jsonl") as file:
            for where, document in source.documents():
                if _add(documents, document.doc_id, document.pos_doc, where, tally):
                    write_json_line(file, document._asdict())
                    tally.count("documents written")
        for where, query in source.queries():
            _add(queries, query.query_id, query.query, where, tally)
        written = stack.enter_context(replaced_when_whole(partial / "queries.jsonl"))

        def judgments_with_queries() -> Iterator[Judgment]:
            has_relevant: dict[str, bool] = {}
            for judgment in _known_judgments(source, queries, documents, tally):
                query_id, doc_id, relevance = judgment
                has_relevant[query_id] = has_relevant.get(query_id, False) or relevance > 0
                if relevance > 0:
                    write_json_line(written, QueryRecord(queries.get(query_id), query_id, doc_id)._asdict())
                yield judgment
            tally.count("queries written", len(has_relevant))
            # They count 0 in a mean over all judged queries, so they are encoded too.
            for query_id in (name for name, found in has_relevant.items() if not found):
                write_json_line(written, QueryRecord(queries.get(query_id), query_id, None)._asdict())
                tally.count("of them without a relevant document")

        write_beir_qrels(partial / "qrels.tsv", judgments_with_queries())


def write_texts(
    path: Path, kind: str, rows: Iterator[tuple[str, dict]], work: Path, tally: Tally, *, join_titles: bool
) -> None:
    """Our JSONL of "queries" or "documents", of rows that have our keys; an id with two texts is refused."""
    with TextTable(work, f"{kind} id", keep_texts=False) as table, replaced_when_whole(path) as file:
        for where, row in rows:
            try:
                if kind == "queries":
                    record = parse_query_record(where, row)
                    table.add(record.query_id, record.query, where)
                else:
                    record = parse_document_record(where, row)
                    if join_titles and row.get("title"):
                        record = record._replace(pos_doc=join_title(row["title"], record.pos_doc))
                    if not table.add(record.doc_id, record.pos_doc, where):
                        tally.count("repeated documents left out")
                        continue
            except BadRecord as error:
                tally.refuse(error)
                continue
            write_json_line(file, record._asdict())
            tally.count(f"{kind} written")


def _known_judgments(
    source: RetrievalSet, queries: TextTable, documents: TextTable, tally: Tally
) -> Iterator[Judgment]:
    for where, judgment in unique_judgments(source.judgments()):
        if _known(where, judgment, queries, documents, tally):
            tally.count("judgments written")
            yield judgment


def _known(where: str, judgment: Judgment, queries: TextTable, documents: TextTable, tally: Tally) -> bool:
    """Whether both ids have texts; refused where not."""
    for what, name, table in (("query", judgment.query_id, queries), ("document", judgment.doc_id, documents)):
        if name not in table:
            tally.refuse_unknown(where, f"{what} '{name}' is judged and has no text")
            return False
    return True


def _add(table: TextTable, name: str, text: str, where: str, tally: Tally) -> bool:
    """Whether the text is new. One id with two texts is refused."""
    try:
        return table.add(name, text, where)
    except BadRecord as error:
        tally.refuse(error)
        return False


def write_json_line(file: IO, values: Mapping[str, Any]) -> None:
    """One record of JSONL; keys without a value are left out."""
    present = {key: value for key, value in values.items() if value is not None}
    file.write(json.dumps(present, ensure_ascii=False) + "\n")
