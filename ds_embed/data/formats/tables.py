"""Rows of CSV, TSV, Parquet and JSON files, by column name, one at a time in both directions."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.data.json_files import BadRecord, JsonRecords, format_location
from ds_embed.settings.errors import UserError

_ROWS_AT_ONCE = 1000
TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")

WriteRow = Callable[[Mapping[str, Any]], None]


def table_suffix(path: str | os.PathLike) -> str:
    """The ending that decides the form of a table. UserError when it is none of ours."""
    suffix = Path(path).suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise UserError(f"{path}: its name must end in one of {', '.join(TABLE_SUFFIXES)}, which says what it holds")
    return suffix


class Table:
    """A file of rows, iterated as (place, {column: value}). `columns` are those of its header or first record.

    CSV cells are strings, quoted as RFC 4180 has it. TSV has no quotes: a cell holds no tab and no line
    break. Parquet is read in batches. JSON rows may each have other keys. `on_bad` is given each bad row
    that the next can be read after; the others are raised. UserError names file and line, or record.
    """

    def __init__(self, path: str | os.PathLike, on_bad: Callable[[BadRecord], object]):
        self.path = os.fspath(path)
        self._on_bad = on_bad
        self._suffix = table_suffix(path)
        self.columns = self._read_columns()

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._suffix == ".parquet":
            yield from self._parquet_rows()
        elif self._suffix in (".csv", ".tsv"):
            for where, cells in self._cells():
                if len(cells) != len(self.columns):
                    problem = (
                        f"{len(cells)} columns, and the header has {len(self.columns)} ({', '.join(self.columns)})"
                    )
                    self._on_bad(BadRecord(where, problem))
                else:
                    yield where, dict(zip(self.columns, cells))
        else:
            records = JsonRecords(self.path, on_bad=self._on_bad)
            for number, record in records:
                yield records.location(number), record

    def _read_columns(self) -> list[str]:
        if self._suffix == ".parquet":
            with _parquet(self.path) as file:
                columns = list(file.schema_arrow.names)
        elif self._suffix in (".csv", ".tsv"):
            columns = next((cells for _, cells in self._cells(with_header=True)), [])
        else:
            columns = next((list(record) for _, record in JsonRecords(self.path, on_bad=self._on_bad_header)), [])
        if not columns:
            raise UserError(f"{self.path}: has no columns; want a header of their names, then rows")
        repeated = [name for name in columns if columns.count(name) > 1]
        if repeated:
            raise UserError(f"{self.path}: has two columns named '{repeated[0]}'; give each its own name")
        return columns

    def _on_bad_header(self, _: BadRecord) -> None:
        """Bad records in front of the first good one: they are met again, and dealt with, when rows are read."""

    def _cells(self, with_header: bool = False) -> Iterator[tuple[str, list[str]]]:
        """(place, cells) of each line that isn't blank; after the header unless asked for."""
        lines = text_lines(self.path)
        if self._suffix == ".tsv":
            rows = ((where, line.split("\t")) for where, line in lines if line)
        else:
            rows = self._csv_cells(lines)
        if not with_header:
            next(rows, None)
        return rows

    def _csv_cells(self, lines: Iterator[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
        places: list[str] = []

        def kept_lines() -> Iterator[str]:
            for where, line in lines:
                places.append(where)
                yield line + "\n"

        csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 128 KiB
        reader = csv.reader(kept_lines(), strict=True)
        try:
            for cells in reader:
                if cells:
                    yield places[0], cells
                places.clear()
        except csv.Error as error:
            start = places[0] if places else self.path
            raise UserError(f"{start}: not CSV ({error}); a quote that is opened here must be closed") from None

    def _parquet_rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        number = 0
        with _parquet(self.path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                for row in batch.to_pylist():
                    number += 1
                    yield format_location(self.path, "record", number), row


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except pyarrow.ArrowException as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: not a whole Parquet file ({reason}); write it again") from None


def text_lines(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """(place, line without its end) of a UTF-8 text file; a byte order mark is accepted, only \\n ends a line.

    BadRecord with file and line where it isn't UTF-8.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = format_location(os.fspath(path), "line", number)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadRecord(where, f"not UTF-8 text ({error.reason}); save the file as UTF-8") from None
            yield where, text.removesuffix("\n").removesuffix("\r")


@contextmanager
def table_writer(path: Path, columns: Mapping[str, type]) -> Iterator[WriteRow]:
    """A function that writes one row, {column: value}; the file takes its name when the block ends well.

    `columns` are names and types (str, int, float); the form is that of the name's ending. UserError
    for a value that a TSV can't hold.
    """
    suffix = table_suffix(path)
    if suffix == ".json":
        raise UserError(f"{path}: rows are written as .jsonl, .csv, .tsv or .parquet; choose one of these endings")
    with replaced_when_whole(path, binary=suffix == ".parquet") as file:
        if suffix == ".parquet":
            yield from _parquet_writer(file, columns)
        elif suffix == ".jsonl":
            yield lambda row: file.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
        elif suffix == ".csv":
            writer = csv.DictWriter(file, list(columns), lineterminator="\n")
            writer.writeheader()
            yield writer.writerow
        else:
            file.write("\t".join(columns) + "\n")
            yield lambda row: file.write(tsv_line(path, [row[name] for name in columns]))


def tsv_line(path: Path, cells: Sequence[Any]) -> str:
    """The cells as a line. UserError when one holds what separates cells or lines."""
    for cell in cells:
        if type(cell) is str and not {"\t", "\n", "\r"}.isdisjoint(cell):
            raise UserError(f"{path}: '{cell[:60]}' holds a tab or a line break, which a TSV can't hold; write .csv")
    return "\t".join(map(str, cells)) + "\n"


def _parquet_writer(file: Any, columns: Mapping[str, type]) -> Iterator[WriteRow]:
    import pyarrow
    import pyarrow.parquet

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in columns.items()])
    rows: list[Mapping[str, Any]] = []
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            rows.clear()

        def write(row: Mapping[str, Any]) -> None:
            rows.append(row)
            if len(rows) == _ROWS_AT_ONCE:
                flush()

        yield write
        if rows:
            flush()
