"""Files of records as people bring them: found, opened, decompressed, and iterated as numbered objects.

JSONL, a JSON array, or an object that holds one under "data"; CSV, TSV and Parquet; each on disk or behind a URL
that fsspec opens, the text forms packed by gzip, bzip2, xz or zstd; data sets of the Hugging Face hub, and folders
that `datasets` wrote. Nothing here holds more than a batch of rows, and every complaint names file and place.
"""

import bz2
import contextlib
import csv
import glob
import gzip
import io
import itertools
import json
import lzma
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ijson
import jsonlines
import orjson

from ds_embed.artifact.identity import identify_texts
from ds_embed.settings.errors import UserError

_BOM = b"\xef\xbb\xbf"
_JSON_BLANKS = b" \t\r\n"
# Large reads: the observer below is Python code and runs once per read.
_READ_BYTES = 1 << 20
_NO_NUMBER = re.compile(r"-?(?:NaN|Infinity)|(?<=-)Infinity")  # which Python writes, and JSON lacks
_QUOTED = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')  # with a quote inside, which is doubled
_LOOK_BYTES = 1 << 12
_ROWS_AT_ONCE = 1000
# The endings of data files, which decide what of a folder is read, and whether text is a table.
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
# Columns of CSV and TSV whose empty cell is an empty text; in all others it is nothing.
_EMPTY_TEXTS = ("pos_doc", "text")
# Data about data, beside it in folders.
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "merlin_metadata.json")
# The first bytes of packed files.
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",
}
_PARQUET = b"PAR1"
# {"corpus": ..., "data": [...]} in either order, as NeMo Automodel writes it: one object that holds the records.
_WRAPPED = re.compile(rb'\{\s*"(?:corpus"\s*:\s*[\[{]|data"\s*:\s*\[)')
_SURROGATE_PAIR = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# NAME:SPLIT, NAME:CONFIG:SPLIT; a NAME has at most one slash. Splits as `datasets` has them: train, train[:10%], train+test.
_SPLIT = r"[\w.-]+(?:\[[-\d%]*:[-\d%]*\])?"
_SPLITS = rf"{_SPLIT}(?:\+{_SPLIT})*"
_HUB_NAME = re.compile(rf"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]*))?:(?P<split>{_SPLITS})")
_SAVED_SPLIT = re.compile(rf"(?P<folder>.+):{_SPLITS}")
_TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
_TYPE_NAMES |= dict.fromkeys((int, float), "a number")


class BadRecord(UserError):
    """A record that can't be used. `problem` says what is wrong with it, then what is wanted or the cure."""

    def __init__(self, where: str, problem: str):
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


def list_parts(entry: str | os.PathLike) -> list[str]:
    """The files that an entry of a files setting stands for, in a fixed order; a data set by name is one.

    An entry is a file, a glob pattern, a folder of data files, a URL of fsspec (a pattern too), a folder that
    `datasets` saved (FOLDER or FOLDER:SPLIT), or a data set of the hub (NAME:SPLIT or NAME:CONFIG:SPLIT).
    UserError when there is nothing of the kind.
    """
    entry = os.fspath(entry)
    if os.path.isfile(entry) or _dataset_name(entry) is not None:
        return [entry]
    if "://" in entry:
        with _reading(entry):
            import fsspec

            system, path = fsspec.core.url_to_fs(entry)
            if not glob.has_magic(path) and not system.isdir(path):
                return [entry]
            found = system.glob(path) if glob.has_magic(path) else filter(_is_data, system.ls(path, detail=False))
            found = [system.unstrip_protocol(name) for name in found]
    elif os.path.isdir(entry):
        paths = (os.path.join(entry, name) for name in os.listdir(entry))
        # A link to nothing stays: what it should lead to is missing from the data.
        found = [path for path in paths if _is_data(path) and not os.path.isdir(path)]
    elif glob.has_magic(entry) and not os.path.exists(entry):
        found = [path for path in glob.glob(entry, recursive=True) if os.path.isfile(path)]
    else:
        return [entry]
    if not found:
        raise UserError(
            f"{entry}: no data file there; expected files that end in {', '.join(SUFFIXES)}, compressed or not"
        )
    return sorted(found)


def identify_entries(entries: Iterable[str | os.PathLike]) -> str:
    """What the entries stand for: files by what they hold, URLs and data sets by their stamps."""
    parts = (part for entry in entries for part in list_parts(entry))
    return ", ".join(identify_texts([part]) if os.path.isfile(part) else str(stamp_of(part)) for part in parts)


def _is_data(path: str) -> bool:
    name = os.path.basename(path)
    is_hidden = name.startswith((".", "_")) or name in _NO_DATA or name.endswith(".summary.json")
    return _plain_suffix(path) in SUFFIXES and not is_hidden


def _plain_suffix(path: str) -> str:
    """The ending of a name without that of its packing, in small letters."""
    path = path.lower()
    for packed in _PACKED_SUFFIXES:
        path = path.removesuffix(packed)
    return Path(path).suffix


def stamp_of(path: str) -> dict[str, Any]:
    """What changes when a part (see list_parts) does, without reading it."""
    if _dataset_name(path) is not None:
        return {"path": path, "version": _load_dataset(path)._fingerprint}
    if "://" in path:
        import fsspec

        with _reading(path):
            system, name = fsspec.core.url_to_fs(path)
            return {"path": path, "version": str(system.ukey(name))}
    with _reading(path):
        status = os.stat(path)
    return {"path": os.path.realpath(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


class Records:
    """The objects of one part (see list_parts), iterated as (number, object) with numbers from 1.

    The first bytes tell what a file is, save that tables of text go by their ending, .csv or .tsv. `unit` says what the numbers
    count: "line" (of CSV: where a row starts; blank ones are counted and skipped), "record" of a JSON array, whose
    parser knows no lines, "row" of Parquet and data sets. CSV is quoted as RFC 4180 has it; TSV has no quotes.
    `on_bytes` is shown what identifies the contents: every byte of a file, in order. `on_bad` is given each line
    or element that is no object, which are otherwise raised. UserError, with place and cure, for everything else.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        on_bytes: Callable[[Any], object] | None = None,
        on_bad: Callable[[BadRecord], object] | None = None,
    ):
        self.path = os.fspath(path)
        self._on_bytes = on_bytes
        self._on_bad = on_bad
        self._kind = _kind_of(self.path)
        self.unit = {"array": "record", "wrapped": "record", "parquet": "row", "dataset": "row"}.get(self._kind, "line")
        self.has_text_cells = self._kind in ("csv", "tsv")  # every value is a string, numbers too
        self.has_column_order = self.has_text_cells or self.unit == "row"  # JSON objects have none

    def location(self, number: int) -> str:
        return format_location(self.path, self.unit, number)

    def corpora(self) -> list[dict]:
        """What stands under "corpus" beside the "data" of a wrapped file, as a list of objects."""
        if self._kind != "wrapped":
            return []
        corpora = []
        # What is no JSON is met again, and its place named, when the records are read.
        with open_bytes(self.path) as file, contextlib.suppress(ijson.JSONError, UnicodeDecodeError):
            corpora = next(ijson.items(file, "corpus"), [])
        corpora = corpora if type(corpora) is list else [corpora]
        if any(type(corpus) is not dict or type(corpus.get("path")) is not str for corpus in corpora):
            raise UserError(f'{self.path}: corpus holds something other than {{"path": "..."}}')
        return corpora

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        number = 0
        for number, value in self._numbered():
            if type(value) is dict:
                yield number, value
                continue
            if type(value) is not BadRecord:
                problem = (
                    f'found {type_name(value)}, expected a JSON object such as {{"query": "...", "pos_doc": "..."}}'
                )
                value = BadRecord(self.location(number), problem)
            if self._on_bad is None:
                raise value
            self._on_bad(value)
        if number == 0:
            raise UserError(f"{self.path}: holds no record; remove it from the list of files or fill it")

    def _numbered(self) -> Iterator[tuple[int, Any]]:
        if self.unit == "row":
            batches = self._dataset_batches() if self._kind == "dataset" else self._parquet_batches()
            yield from enumerate((_without_nan(row) for batch in batches for row in batch.to_pylist()), 1)
            return
        read = self._elements if self.unit == "record" else self._lines if self._kind == "lines" else self._cells
        with open_bytes(self.path, self._on_bytes) as file:
            yield from read(file)

    def _lines(self, file: io.BufferedReader) -> Iterator[tuple[int, Any]]:
        line_number = 0

        def counted() -> Iterator[bytes]:
            # jsonlines keeps its line count to itself, and skips blank lines.
            nonlocal line_number
            for line in file:
                line_number += 1
                yield line

        reader = jsonlines.Reader(counted(), loads=orjson.loads)
        while True:
            try:
                value = reader.read(allow_none=True, skip_empty=True)
            except EOFError:
                return
            except jsonlines.InvalidLineError as error:
                cause = error.__cause__
                if isinstance(cause, UnicodeDecodeError):
                    problem = f"not UTF-8 ({cause.reason}, byte {cause.start + 1} of it); save the file as UTF-8"
                else:
                    # orjson's own line counts within the one line that it was given, and would mislead.
                    reason: Any = cause
                    if isinstance(cause, orjson.JSONDecodeError):
                        word = _NO_NUMBER.match(cause.doc, cause.pos)
                        wrong = f"{word[0]} is no number there; leave such a value out" if word else cause.msg
                        reason = f"{wrong}, character {cause.pos + 1} of it"
                    problem = f"not JSON ({reason}); JSONL wants one whole JSON object a line"
                value = BadRecord(self.location(line_number), problem)
            yield line_number, value

    def _elements(self, file: io.BufferedReader) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            for number, value in self._values(file):
                yield number, value
        except (ijson.JSONError, UnicodeDecodeError) as error:
            # The C library adds a drawing of the spot on further lines, and repr()s the text if it is not UTF-8.
            reason = str(error.args[0]) if error.args else str(error)
            reason = reason.split("\n")[0].split("\\n")[0].removeprefix("b'").rstrip("'")
            if "UTF8" in reason or isinstance(error, UnicodeDecodeError):
                problem = "not UTF-8; save the file as UTF-8"
            elif "premature EOF" in reason or "Incomplete" in reason:
                problem = "the file ends before the array is closed with ]; it may have been cut short"
            else:
                problem = (
                    f"not JSON, here or just before ({reason}); the file starts with [, so it is read as "
                    "one JSON array (a JSONL file holds one object a line, with no brackets around them)"
                )
            # It can't be read on, so it is raised in any case.
            raise BadRecord(self.location(number + 1), problem) from None

    def _values(self, file: io.BufferedReader) -> Iterator[tuple[int, Any]]:
        done, prefix = 0, "item" if self._kind == "array" else "data.item"
        with contextlib.suppress(_HalfPair):
            for done, value in enumerate(ijson.items(_WholePairs(file), prefix, use_float=True), start=1):
                yield done, value
            return
        # From here on the parser in Python reads, which keeps it; the first file's bytes are still to be counted.
        while file.read(_READ_BYTES):
            pass
        with open_bytes(self.path) as again:
            values = ijson.get_backend("python").items(again, prefix, use_float=True)
            for number, value in itertools.islice(enumerate(values, start=1), done, None):
                try:
                    json.dumps(value, ensure_ascii=False).encode()
                except UnicodeEncodeError:
                    problem = "not Unicode text: half of a surrogate pair (\\ud800 to \\udfff) stands alone"
                    value = BadRecord(self.location(number), problem)
                yield number, value

    def _cells(self, file: io.BufferedReader) -> Iterator[tuple[int, Any]]:
        lines = _decoded(self.path, file)
        if self._kind == "tsv":
            rows = ((number, line.split("\t")) for number, line in lines if line)
            rows = ((number, self._unquoted(number, cells)) for number, cells in rows)
        else:
            rows = self._csv_cells(lines)
        _, columns = next(rows, (0, []))
        self._check_columns(columns)
        for number, cells in rows:
            value = {name: cell if cell or name in _EMPTY_TEXTS else None for name, cell in zip(columns, cells)}
            if cells[-1] == columns[-1] and [cells[0].removeprefix("\ufeff"), *cells[1:]] == columns:
                value = BadRecord(
                    self.location(number), "is the header again, of a file that was joined on; remove the line"
                )
            elif len(cells) != len(columns):
                problem = f"{len(cells)} columns, and the header has {len(columns)} ({', '.join(columns)})"
                value = BadRecord(self.location(number), problem)
            yield number, value

    def _unquoted(self, number: int, cells: list[str]) -> list[str]:
        for cell in cells:
            if cell[:1] == '"' and _QUOTED.fullmatch(cell):
                problem = f"a cell is quoted as CSV is ({cell[:40]}), and TSV is read without quotes"
                raise BadRecord(self.location(number), f"{problem}; name the file .csv, where tabs may part columns")
        return cells

    def _check_columns(self, columns: list[str]) -> None:
        if not columns:
            raise UserError(f"{self.path}: has no columns; expected a header with their names, then rows")
        repeated = [name for name in columns if columns.count(name) > 1]
        if repeated:
            raise UserError(f"{self.path}: has two columns named '{repeated[0]}'; give each its own name")

    def _csv_cells(self, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
        numbers: list[int] = []

        def kept_lines() -> Iterator[str]:
            for number, line in lines:
                numbers.append(number)
                yield line + "\n"

        csv.field_size_limit(sys.maxsize)  # the default refuses texts of more than 128 KiB
        content = kept_lines()
        header = next(content, "")
        unquoted = re.sub('"[^"]*"', "", header)  # spreadsheets write semicolons where the comma is the decimal sign
        separator = next((mark for mark in ",;\t" if mark in unquoted), ",")
        reader = csv.reader(itertools.chain([header], content), delimiter=separator, strict=True)
        try:
            for cells in reader:
                if cells:
                    yield numbers[0], cells
                numbers.clear()
        except csv.Error as error:
            start = self.location(numbers[0]) if numbers else self.path
            cure = "end lines in LF or CRLF" if "new-line" in str(error) else "close the quote that is opened here"
            raise UserError(f"{start}: not CSV ({str(error).split(' - ')[0]}); {cure}") from None

    def _dataset_batches(self) -> Iterator[Any]:
        dataset = _load_dataset(self.path)
        if self._on_bytes is not None:
            self._on_bytes(dataset._fingerprint.encode())
        return dataset.with_format("arrow").iter(_ROWS_AT_ONCE)

    def _parquet_batches(self) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet

        with _open_raw(self.path) as raw:
            while self._on_bytes is not None and (block := raw.read(_READ_BYTES)):
                self._on_bytes(block)
            raw.seek(0)
            try:
                with pyarrow.parquet.ParquetFile(raw) as file:
                    self._check_columns(file.schema_arrow.names)
                    yield from file.iter_batches(_ROWS_AT_ONCE)
            except (pyarrow.ArrowException, OSError) as error:
                reason = str(error).split("\n")[0]
                raise UserError(f"{self.path}: not a whole Parquet file ({reason}); write it again") from None


def read_records(
    entries: str | os.PathLike | Iterable[str | os.PathLike], on_bad: Callable[[BadRecord], object] | None = None
) -> Iterator[tuple[str, dict]]:
    """Yield (location, object) for each record of these entries; see list_parts and Records.

    The location is "path:17" for line 17, "path:record 17" of a JSON array, "path:row 17" of a table without lines.
    """
    for entry in [entries] if isinstance(entries, (str, os.PathLike)) else entries:
        for path in list_parts(entry):
            records = Records(path, on_bad=on_bad)
            for number, record in records:
                yield records.location(number), record


def read_lines(path: str | os.PathLike) -> Iterator[tuple[str, str]]:
    """(location, line without its end) of a UTF-8 text file, packed or not; BadRecord where it isn't UTF-8."""
    with open_bytes(os.fspath(path)) as file:
        for number, line in _decoded(os.fspath(path), file):
            yield format_location(os.fspath(path), "line", number), line


def format_location(path: str, unit: str, number: int) -> str:
    """The one spelling of a place in a data file."""
    return f"{path}:{number}" if unit == "line" else f"{path}:{unit} {number}"


def type_name(value: Any) -> str:
    """What JSON calls the type of a value, with its article."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def _kind_of(path: str) -> str:
    """dataset, parquet, csv, tsv, array, wrapped or lines. UserError when it is no file or holds nothing."""
    if _dataset_name(path) is not None:
        return "dataset"
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder, not a file; name the files in it, such as {path}/*.jsonl")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is not a regular file; write the records to a file first")
    suffix = _plain_suffix(path)
    with open_bytes(path) as file:
        block = file.read(_LOOK_BYTES)
        if block.startswith(_PARQUET):
            if file.raw.packing:
                raise UserError(f"{path}: is a compressed Parquet file, which can't be read in parts; decompress it")
            return "parquet"
        if b"\0" in block:
            raise UserError(f"{path}: is not UTF-8 text (it may be UTF-16, or not text at all); save it as UTF-8")
        while block:
            rest = block.lstrip(_JSON_BLANKS)
            if rest:
                break
            block = file.read(_LOOK_BYTES)
        else:
            raise UserError(f"{path}: is empty; remove it from the list of files or fill it")
    if suffix in (".csv", ".tsv") and rest[:1] != b"{":
        return suffix[1:]
    return "array" if rest[:1] == b"[" else "wrapped" if _WRAPPED.match(rest) else "lines"


def _dataset_name(path: str) -> re.Match | str | None:
    """What makes a path a data set of the `datasets` library: its folder, or its name on the hub."""
    folder = path
    if not os.path.exists(path):
        folder = found["folder"] if (found := _SAVED_SPLIT.fullmatch(path)) else ""
    if any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json") if folder):
        return folder
    return None if os.path.exists(path) or "://" in path else _HUB_NAME.fullmatch(path)


def _load_dataset(path: str) -> Any:
    """The data set of a saved folder or a hub name, memory-mapped. UserError for what is not there."""
    import datasets

    name = _dataset_name(path)
    try:
        if type(name) is not str:
            return datasets.load_dataset(name["name"], name["config"] or None, split=name["split"])
        loaded = datasets.load_from_disk(name)
    # IndexError: of a data set without rows; RuntimeError: of one that a script of its own would load.
    except (OSError, ValueError, IndexError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).split("\n")[0]
        raise UserError(f"{path}: no such file, and it can't be loaded as a data set ({reason})") from None
    split = path[len(name) + 1 :]
    if not isinstance(loaded, datasets.DatasetDict):
        if split and split != str(loaded.split):
            raise UserError(f"{path}: the folder holds one data set, without splits; leave :{split} out")
        return loaded
    if split not in loaded and (split or len(loaded) != 1):
        raise UserError(
            f"{path}: name one of its splits: {', '.join(f'{name}:{split}' for split in loaded) or 'it has none'}"
        )
    return loaded[split or next(iter(loaded))]


def _without_nan(row: dict) -> dict:
    """A row of a table with None for NaN: pandas writes what is missing that way."""
    for key, value in row.items():
        if type(value) is float and math.isnan(value):
            row[key] = None
    return row


class _Stream(io.RawIOBase):
    """What a file holds, shown to an observer (a checksum in the same pass).

    `packing`: how it is packed, if it is; then UserError when it is cut short or damaged.
    """

    def __init__(self, path: str, file: Any, on_bytes: Callable[[Any], object] | None = None, packing: str = ""):
        self._path, self._source, self._on_bytes, self.packing = path, file, on_bytes, packing
        self._at_most: int | None = _LOOK_BYTES  # of the first read, since peek() copies all that was read
        if packing == "zstd":
            import pyarrow

            self._file = pyarrow.CompressedInputStream(file, "zstd")
        else:
            self._file = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[packing](file) if packing else file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = self._file.readinto(memoryview(buffer)[: self._at_most]) or 0
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            if not self.packing:
                raise
            problem = f"its {self.packing} data is cut short or damaged ({error}); copy it again"
            raise UserError(f"{self._path}: {problem}") from None
        self._at_most = None
        if self._on_bytes is not None:
            self._on_bytes(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def open_bytes(path: str, on_bytes: Callable[[Any], object] | None = None) -> io.BufferedReader:
    """Open for reading what a file holds: unpacked, past a byte order mark. UserError when that can't be."""
    file = io.BufferedReader(_Stream(path, _open_raw(path), on_bytes), _READ_BYTES)
    with _reading(path):
        start = file.peek(_LOOK_BYTES)
    packing = next((name for magic, name in _PACKED.items() if start.startswith(magic)), None)
    if packing is not None:
        file = io.BufferedReader(_Stream(path, file, packing=packing), _READ_BYTES)
        start = file.peek(len(_BOM))
    if start.startswith(_BOM):
        file.read(len(_BOM))
    return file


def _open_raw(path: str) -> Any:
    with _reading(path):
        if "://" in path:
            import fsspec

            return fsspec.open(path, "rb").open()
        return open(path, "rb", buffering=0)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """UserError for a file that isn't there or can't be read, or a URL for whatever its file system raises."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path (seen from {os.getcwd()})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    except Exception as error:
        if "://" not in path and not isinstance(error, ValueError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path}: cannot be opened ({reason})") from None


def _decoded(path: str, file: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """(number, line) of UTF-8 text; only \\n ends a line."""
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 text ({error.reason}); save the file as UTF-8"
            raise BadRecord(format_location(path, "line", number), problem) from None
        yield number, text.removesuffix("\n").removesuffix("\r")


class _HalfPair(Exception):
    pass


class _WholePairs:
    """A file for ijson's quick parser, which makes "?" of half a surrogate pair: _HalfPair before it sees one."""

    def __init__(self, file: io.BufferedReader):
        self.file = file

    def read(self, size: int) -> bytes:
        chunk = self.file.read(size)
        while b"\\" in chunk[-11:] and (more := self.file.read(64)):  # it doesn't end within a pair
            chunk += more
        if _SURROGATE.search(_SURROGATE_PAIR.sub(b"", chunk)):
            raise _HalfPair
        return chunk
