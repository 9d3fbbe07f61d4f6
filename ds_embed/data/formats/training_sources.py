"""Training records from our JSON files, from tables, and from the triples of MS MARCO."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ds_embed.data.formats.columns import read_columns
from ds_embed.data.formats.tables import text_lines
from ds_embed.data.formats.tally import Tally
from ds_embed.data.formats.text_table import TextTable
from ds_embed.data.json_files import BadRecord, JsonRecords
from ds_embed.data.records import TrainingRecord, parse_training_record


def from_json(paths: Sequence[str], tally: Tally) -> Iterator[tuple[str, TrainingRecord]]:
    """(place, record) of files in our own form."""
    for path in paths:
        records = JsonRecords(path, on_bad=tally.refuse)
        yield from _parsed(((records.location(number), record) for number, record in records), tally)


def from_tables(paths: Sequence[str], columns: Sequence[str], tally: Tally) -> Iterator[tuple[str, TrainingRecord]]:
    """(place, record) of tables; `columns` are the words of --columns."""
    return _parsed(read_columns(paths, "training", columns, tally), tally)


def from_triples(paths: Sequence[str], tally: Tally) -> Iterator[tuple[str, TrainingRecord]]:
    """(place, record) of lines query, positive, negative: texts separated by tabs, no header."""
    rows = _split_lines(paths, 3, "query, positive and negative", tally)
    return _parsed(((where, dict(zip(("query", "pos_doc", "neg_doc"), cells))) for where, cells in rows), tally)


def from_id_triples(
    paths: Sequence[str], query_files: Sequence[str], collection_files: Sequence[str], tally: Tally, work: Path
) -> Iterator[tuple[str, TrainingRecord]]:
    """As from_triples for lines of three ids, whose texts stand in lines of id, tab, text in other files."""

    def rows(queries: TextTable, documents: TextTable) -> Iterator[tuple[str, dict]]:
        for where, (query_id, *doc_ids) in _split_lines(paths, 3, "query id, positive id and negative id", tally):
            texts = [queries.get(query_id), *map(documents.get, doc_ids)]
            if None in texts:
                name = (query_id, *doc_ids)[texts.index(None)]
                tally.refuse_unknown(where, f"the text of '{name}' is not in --query_files or --doc_files")
                continue
            ids = {"query_id": query_id, "doc_id": doc_ids[0]}
            yield where, ids | dict(zip(("query", "pos_doc", "neg_doc"), texts))

    with TextTable(work, "query id") as queries, TextTable(work, "document id") as documents:
        for table, files in ((queries, query_files), (documents, collection_files)):
            for where, (name, text) in _split_lines(files, 2, "id and text", tally):
                try:
                    table.add(name, text, where)
                except BadRecord as error:
                    tally.refuse(error)
        yield from _parsed(rows(queries, documents), tally)


def _split_lines(paths: Sequence[str], number: int, names: str, tally: Tally) -> Iterator[tuple[str, list[str]]]:
    for path in paths:
        for where, line in text_lines(path):
            cells = line.split("\t")
            if len(cells) == number:
                yield where, cells
            else:
                tally.refuse(BadRecord(where, f"{len(cells)} columns; want {number}, separated by tabs: {names}"))


def _parsed(rows: Iterable[tuple[str, dict]], tally: Tally) -> Iterator[tuple[str, TrainingRecord]]:
    for where, row in rows:
        try:
            yield where, parse_training_record(where, row)
        except BadRecord as error:
            tally.refuse(error)
