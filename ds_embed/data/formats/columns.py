"""Which column of a table holds what: rows of any names to the keys of our records."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ds_embed.data.formats.tables import Table
from ds_embed.data.formats.tally import Tally
from ds_embed.settings.errors import UserError

# What a kind of record holds: its keys, and which of them a table must have.
KINDS = {
    "training": (
        ("query", "pos_doc", "neg_doc", "query_id", "doc_id", "pos_score", "neg_scores"),
        ("query", "pos_doc"),
    ),
    "queries": (("query", "query_id", "doc_id"), ("query", "query_id")),
    "documents": (("pos_doc", "doc_id", "title"), ("pos_doc", "doc_id")),
    "judgments": (("query_id", "doc_id", "relevance"), ("query_id", "doc_id", "relevance")),
    "run": (("query_id", "doc_id", "score"), ("query_id", "doc_id", "score")),
}
# Names that columns go by elsewhere: sentence-transformers, BEIR.
_OTHER_NAMES = {"query": ("anchor",), "pos_doc": ("positive", "text")}
_NEGATIVE = re.compile(r"negative(?:_(\d+))?")


def parse_columns(pairs: Sequence[str], kind: str) -> dict[str, list[str]]:
    """{key: [columns]} of "key=column" words (neg_doc=column,column,...). UserError for keys that `kind` lacks."""
    keys, _ = KINDS[kind]
    columns = {}
    for pair in pairs:
        key, equals, column = pair.partition("=")
        if key not in keys or not equals or not column:
            raise UserError(f"--columns {pair}: want KEY=COLUMN, where KEY is one of {', '.join(keys)}")
        if key in columns:
            raise UserError(f"--columns {pair}: {key} is given twice")
        columns[key] = column.split(",") if key == "neg_doc" else [column]
    return columns


def mapped_rows(table: Table, kind: str, asked: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, record) of each row, with our keys; `asked` are the columns of --columns.

    Keys without an asked column come from the column of their own name, or that of sentence-transformers
    or BEIR. Cells without a value leave their key out; whole numbers as ids become strings. UserError,
    with the columns there are, when one is missing.
    """
    keys, required = KINDS[kind]
    columns = {key: list(asked.get(key) or _known_columns(table.columns, key)) for key in keys}
    for key in keys:
        missing = [column for column in columns[key] if column not in table.columns]
        if (key in asked and missing) or (key in required and not columns[key]):
            what = f"--columns {key}={','.join(asked[key])}" if key in asked else f"no column for {key}"
            raise UserError(
                f"{table.path}: {what}: its columns are {', '.join(table.columns)}; set --columns {key}=COLUMN"
            )
    for where, row in table:
        record = {}
        for key, names in columns.items():
            if key == "neg_doc":
                value = _negatives([row.get(name) for name in names])
            else:
                value = row.get(names[0]) if names else None
            if key in ("query_id", "doc_id"):
                value = str(value) if type(value) is int else value or None
            if value is not None:
                record[key] = value
        yield where, record


def _known_columns(columns: Sequence[str], key: str) -> list[str]:
    found = [name for name in (key, *_OTHER_NAMES.get(key, ())) if name in columns][:1]
    if key == "neg_doc" and not found:
        numbered = [(int(match[1] or 0), name) for name in columns if (match := _NEGATIVE.fullmatch(name))]
        found = [name for _, name in sorted(numbered)]
    return found


def _negatives(cells: Sequence[Any]) -> list[Any] | None:
    """The negatives of a row's cells, each a text or a list of texts; empty cells hold none."""
    negatives: list[Any] = []
    for cell in cells:
        negatives += cell if type(cell) is list else [] if cell is None or cell == "" else [cell]
    return negatives or None


def read_columns(paths: Sequence[str], kind: str, pairs: Sequence[str], tally: Tally) -> Iterator[tuple[str, dict]]:
    """mapped_rows of each table in turn."""
    asked = parse_columns(pairs, kind)
    for path in paths:
        yield from mapped_rows(Table(path, tally.refuse), kind, asked)
