"""Conversions between formats of training records, sets of queries and documents, and judgments.

Texts stay on disk (text_table.py). Memory grows by about 100 bytes per judged id and 200 bytes per judgment.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from ds_embed.artifact.durable import folder_when_whole, replaced_when_whole
from ds_embed.data.files import BadRecord, read_lines
from ds_embed.data.forms import parse_training_record
from ds_embed.data.identity import text_id
from ds_embed.data.records import DocumentRecord, QueryRecord, TrainingRecord
from ds_embed.data.retrieval_sets import RetrievalSet
from ds_embed.data.tally import Tally
from ds_embed.data.text_table import TextTable
from ds_embed.data.trec import Judgment, unique_judgments, write_beir_qrels
from ds_embed.tools.convert.tables import table_writer

NumberedRecords = Iterator[tuple[str, TrainingRecord]]


def training_records(source: RetrievalSet, tally: Tally, work: Path, *, judged_negatives: bool) -> NumberedRecords:
    """Yield (location, record) for each document judged relevant to a query; `work`: a folder with room for texts.

    With `judged_negatives`, the documents judged not relevant to the query become its negatives.
    """
    wanted: set[str] = set()
    negatives: dict[str, list[str]] = {}
    for _, judgment in unique_judgments(source.judgments()):
        if judgment.relevance > 0 or judged_negatives:
            wanted.add(judgment.doc_id)
        if judgment.relevance <= 0 and judged_negatives:
            negatives.setdefault(judgment.query_id, []).append(judgment.doc_id)
    with TextTable(work, "document id") as documents, TextTable(work, "query id") as queries:
        _keep((item for item in source.documents() if item[1].doc_id in wanted), documents, tally)
        _keep(_queries(source, tally), queries, tally)
        for where, judgment in unique_judgments(source.judgments()):
            if judgment.relevance <= 0 or not _known(where, judgment, queries, documents, tally):
                continue
            query_id, doc_id, _ = judgment
            record: dict[str, Any] = {
                "query": queries.get(query_id),
                "pos_doc": documents.get(doc_id),
                "query_id": query_id,
            }
            texts = [documents.get(name) for name in negatives.get(query_id, ())]
            if None in texts:
                name = negatives[query_id][texts.index(None)]
                tally.refuse_unknown(where, f"document '{name}', a judged negative of the query, is not in the corpus")
            record |= {"doc_id": doc_id, "neg_doc": [text for text in texts if text is not None]}
            try:
                yield where, parse_training_record(where, record)[0]
            except BadRecord as error:
                tally.refuse(error)


def write_training(path: Path, records: NumberedRecords, tally: Tally) -> None:
    """Write our own JSONL; keys without a value are omitted."""
    with replaced_when_whole(path) as file:
        for _, record in tally.counted("training records written", records):
            write_json_line(file, record.as_json())


def write_pairs(path: Path, records: NumberedRecords, num_negatives: int, tally: Tally) -> None:
    """Write a table with sentence-transformers' columns: anchor, positive and negative, or negative_1 to negative_K."""
    names = ["negative"] if num_negatives == 1 else [f"negative_{k}" for k in range(1, num_negatives + 1)]
    with table_writer(path, dict.fromkeys(["anchor", "positive", *names], str)) as write:
        for where, record in records:
            if len(record.neg_docs) < num_negatives:
                problem = f"has {len(record.neg_docs)} neg_doc; --num_negatives {num_negatives} wants so many"
                tally.refuse(BadRecord(where, problem))
                continue
            _count_prompt(record, tally)
            write({"anchor": record.query, "positive": record.pos_doc, **dict(zip(names, record.neg_docs))})
            tally.count("rows written")


def write_training_texts(folder: Path, records: NumberedRecords, tally: Tally) -> None:
    """Write queries.jsonl and docs.jsonl: each text once, under its text_id, by which training finds its vector."""
    with folder_when_whole(folder) as partial, ExitStack() as stack:
        tables = [stack.enter_context(TextTable(partial, "text_id", keep_texts=False)) for _ in range(2)]
        names = ("queries", "docs")
        files = [stack.enter_context(replaced_when_whole(partial / f"{name}.jsonl")) for name in names]
        for where, record in records:
            query: QueryRecord | DocumentRecord = QueryRecord(record.query, text_id(record.query), (), record.prompt)
            documents = (DocumentRecord(text, text_id(text)) for text in (record.pos_doc, *record.neg_docs))
            for number, one in enumerate((query, *documents)):
                side, (text, name, *_) = min(number, 1), one
                if tables[side].add(name, text, where):
                    write_json_line(files[side], one.as_json())
                    tally.count(f"{names[side]} written")


def write_beir(folder: Path, split: str, source: RetrievalSet, tally: Tally) -> None:
    """Write a BEIR folder with all queries and documents of `source`; titles are empty."""
    with folder_when_whole(folder) as partial:
        (partial / "qrels").mkdir()
        with TextTable(partial, "document id", keep_texts=False) as documents:
            with TextTable(partial, "query id", keep_texts=False) as queries:
                with replaced_when_whole(partial / "corpus.jsonl") as file:
                    for text, name in tally.counted("documents written", _new(source.documents(), documents, tally)):
                        write_json_line(file, {"_id": name, "title": "", "text": text})
                with replaced_when_whole(partial / "queries.jsonl") as file:
                    for text, name in tally.counted("queries written", _new(_queries(source, tally), queries, tally)):
                        write_json_line(file, {"_id": name, "text": text})
                judgments = _known_judgments(source, queries, documents, tally)
                write_beir_qrels(partial / "qrels" / f"{split}.tsv", judgments)


def write_test_files(folder: Path, source: RetrievalSet, tally: Tally) -> None:
    """Write queries.jsonl (a line for each judged query, with its relevant documents), docs.jsonl and qrels.tsv."""
    with folder_when_whole(folder) as partial, ExitStack() as stack:
        documents = stack.enter_context(TextTable(partial, "document id", keep_texts=False))
        queries = stack.enter_context(TextTable(partial, "query id"))
        with replaced_when_whole(partial / "docs.jsonl") as file:
            for text, name in tally.counted("documents written", _new(source.documents(), documents, tally)):
                write_json_line(file, {"pos_doc": text, "doc_id": name})
        _keep(_queries(source, tally), queries, tally)
        relevant: dict[str, list[str]] = {}

        def judgments() -> Iterator[Judgment]:
            for judgment in _known_judgments(source, queries, documents, tally):
                # A query without relevant documents counts as 0 in a mean over all judged queries, so it is encoded
                # too.
                found = relevant.setdefault(judgment.query_id, [])
                if judgment.relevance > 0:
                    found.append(judgment.doc_id)
                yield judgment

        write_beir_qrels(partial / "qrels.tsv", judgments())
        with replaced_when_whole(partial / "queries.jsonl") as file:
            for query_id, doc_ids in relevant.items():
                doc_id = doc_ids if len(doc_ids) > 1 else doc_ids[0] if doc_ids else None
                write_json_line(file, {"query": queries.get(query_id), "query_id": query_id, "doc_id": doc_id})
        tally.count("queries written", len(relevant))
        if without := sum(not doc_ids for doc_ids in relevant.values()):
            tally.count("of them without a relevant document", without)


def write_texts(path: Path, kind: str, records: Iterator[tuple[str, Any]], work: Path, tally: Tally) -> None:
    """Write our own JSONL of "queries" or "documents"; an id with two texts is refused."""
    with TextTable(work, f"{kind} id", keep_texts=False) as table, replaced_when_whole(path) as file:
        for where, record in records:
            text, name, *_ = record
            try:
                if not table.add(name, text, where) and kind == "documents":
                    tally.count("repeated documents left out")
                    continue
            except BadRecord as error:
                tally.refuse(error)
                continue
            write_json_line(file, record.as_json())
            tally.count(f"{kind} written")


def training_triples(
    paths: Sequence[str], query_files: Sequence[str], collection_files: Sequence[str], tally: Tally, work: Path
) -> NumberedRecords:
    """Yield (location, record) of MS MARCO's tab-separated lines query, positive, negative, which have no header.

    With query and collection files (lines of id, tab, text), the three columns are ids.
    """
    with TextTable(work, "query id") as queries, TextTable(work, "document id") as documents:
        for table, files in ((queries, query_files), (documents, collection_files)):
            lines = _split_lines(files, ("id", "text"), tally)
            _keep(((where, cells[::-1]) for where, cells in lines), table, tally)
        for where, cells in _split_lines(paths, ("query", "positive", "negative"), tally):
            record: dict[str, str | None] = dict(zip(("query", "pos_doc", "neg_doc"), cells))
            if query_files:
                texts = [queries.get(cells[0]), *map(documents.get, cells[1:])]
                if None in texts:
                    name = cells[texts.index(None)]
                    tally.refuse_unknown(where, f"the text of '{name}' is not in --query_files or --doc_files")
                    continue
                record = dict(zip(record, texts)) | {"query_id": cells[0], "doc_id": cells[1]}
            try:
                yield where, parse_training_record(where, record)[0]
            except BadRecord as error:
                tally.refuse(error)


def _split_lines(paths: Sequence[str], names: Sequence[str], tally: Tally) -> Iterator[tuple[str, list[str]]]:
    wanted = f"expected {len(names)}, separated by tabs: {', '.join(names)}"
    for path in paths:
        for where, line in read_lines(path):
            cells = line.split("\t")
            if len(cells) == len(names):
                yield where, cells
            else:
                tally.refuse(BadRecord(where, f"{len(cells)} columns; {wanted}"))


def _known_judgments(
    source: RetrievalSet, queries: TextTable, documents: TextTable, tally: Tally
) -> Iterator[Judgment]:
    for where, judgment in unique_judgments(source.judgments()):
        if _known(where, judgment, queries, documents, tally):
            tally.count("judgments written")
            yield judgment


def _known(where: str, judgment: Judgment, queries: TextTable, documents: TextTable, tally: Tally) -> bool:
    """Whether both ids have texts; the tally refuses the judgment if not."""
    for what, name, table in (("query", judgment.query_id, queries), ("document", judgment.doc_id, documents)):
        if name not in table:
            tally.refuse_unknown(where, f"{what} '{name}' is judged and has no text")
            return False
    return True


def _new(items: Iterable[tuple[str, Sequence[Any]]], table: TextTable, tally: Tally) -> Iterator[tuple[str, str]]:
    """Yield (text, id) of each (location, (text, id, ...)) whose id is new. An id with two texts is refused."""
    for where, (text, name, *_) in items:
        try:
            if table.add(name, text, where):
                yield text, name
        except BadRecord as error:
            tally.refuse(error)


def _keep(items: Iterable[tuple[str, Sequence[Any]]], table: TextTable, tally: Tally) -> None:
    for _ in _new(items, table, tally):
        pass


def _queries(source: RetrievalSet, tally: Tally) -> Iterator[tuple[str, QueryRecord]]:
    for where, query in source.queries():
        _count_prompt(query, tally)
        yield where, query


def _count_prompt(record: TrainingRecord | QueryRecord, tally: Tally) -> None:
    """For files that have no place for a prompt."""
    if record.prompt is not None:
        tally.count("queries with a prompt of their own, which is now the start of their text")


def write_json_line(file: IO, values: Mapping[str, Any]) -> None:
    """Write one record of JSONL; keys without a value are omitted."""
    present = {key: value for key, value in values.items() if value is not None}
    file.write(json.dumps(present, ensure_ascii=False) + "\n")
