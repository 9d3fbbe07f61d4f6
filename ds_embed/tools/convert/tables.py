"""Writes rows, given as {column: value}, one at a time to JSONL, CSV, TSV or Parquet."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.data.trec import tsv_line
from ds_embed.settings.errors import UserError

_ROWS_AT_ONCE = 1000
_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")

WriteRow = Callable[[Mapping[str, Any]], object]


@contextmanager
def table_writer(path: Path, columns: Mapping[str, type]) -> Iterator[WriteRow]:
    """A function that writes one row, {column: value}; the file takes its name when the block ends without an error.

    `columns` maps names to types (str, int, float); the suffix of `path` determines the format. UserError for a value
    that TSV can't represent.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(
            f"{path}: its name must end in one of {', '.join(_SUFFIXES)}, the form that rows are written in"
        )
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
