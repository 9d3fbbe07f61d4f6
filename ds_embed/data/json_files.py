"""The objects of a data file, one at a time: JSONL or one JSON array, told apart by content.

Nothing here holds more than one record, and every complaint names the file and the line.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import ijson
import jsonlines
import orjson

from ds_embed.settings.errors import UserError

_BOM = b"\xef\xbb\xbf"
_JSON_BLANKS = b" \t\r\n"
# Large reads: the observer below is Python code and runs once per read.
_READ_BYTES = 1 << 20
# What a first look tells about files that are not UTF-8 text: (first bytes, what they are, the cure).
_FOREIGN_STARTS = (
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
    (b"\x1f\x8b", "gzip data", "unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "unpack it with unzstd"),
    (b"PAR1", "Parquet data", "write it as JSONL"),
)
_TYPE_NAMES = {
    dict: "object",
    list: "list",
    str: "string",
    bool: "boolean",
    int: "number",
    float: "number",
    type(None): "null",
}


class BadRecord(UserError):
    """A record that can't be used. `problem` says what is wrong with it, then what is wanted or the cure."""

    def __init__(self, where: str, problem: str):
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem


class JsonRecords:
    """The objects of one file, iterated as (number, object) with numbers from 1.

    The file is JSONL, or one JSON array when its first non-blank character is `[`. `unit` says what
    the numbers count: "line" for JSONL, "record" for the elements of an array (a streaming parser
    does not know their lines). Blank lines of JSONL are skipped but counted. A UTF-8 byte order mark
    is accepted. `on_bytes` is shown every byte of the file, in order, as it is read. `on_bad` is given
    each line or element that is no JSON object, which are otherwise raised; an array that isn't JSON
    can't be read on, so that is always raised.
    In an array, an integer beyond 64 bits is an error; nothing we read needs one.
    UserError, with the place and the cure, for everything else.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        on_bytes: Callable[[Any], object] | None = None,
        on_bad: Callable[[BadRecord], object] | None = None,
    ):
        self.path = os.fspath(path)
        self.unit = "record" if _first_character(self.path) == b"[" else "line"
        self._on_bytes = on_bytes
        self._on_bad = on_bad

    def location(self, number: int) -> str:
        return format_location(self.path, self.unit, number)

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        with _open_bytes(self.path, self._on_bytes) as file:
            numbered_values = self._array_elements(file) if self.unit == "record" else self._lines(file)
            number = 0
            for number, value in numbered_values:
                if type(value) is dict:
                    yield number, value
                    continue
                if type(value) is not BadRecord:
                    problem = (
                        f'found {type_name(value)}, want a JSON object such as {{"query": "...", "pos_doc": "..."}}'
                    )
                    value = BadRecord(self.location(number), problem)
                if self._on_bad is None:
                    raise value
                self._on_bad(value)
        if number == 0:
            raise UserError(f"{self.path}: holds no record; remove it from the list of files or fill it")

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
                    problem = f"not JSON ({_orjson_reason(cause)}); JSONL wants one whole JSON object a line"
                value = BadRecord(self.location(line_number), problem)
            yield line_number, value

    def _array_elements(self, file: io.BufferedReader) -> Iterator[tuple[int, Any]]:
        number = 0
        try:
            for value in ijson.items(file, "item", use_float=True):
                number += 1
                yield number, value
        except (ijson.JSONError, UnicodeDecodeError) as error:
            reason = _ijson_reason(error)
            if "UTF8" in reason or isinstance(error, UnicodeDecodeError):
                problem = "not UTF-8; save the file as UTF-8"
            elif "premature EOF" in reason or "Incomplete" in reason:
                problem = "the file ends before the array is closed with ]; it may have been cut short"
            else:
                problem = (
                    f"not JSON, here or just before ({reason}); the file starts with [, so it is read as "
                    "one JSON array (a JSONL file holds one object a line, with no brackets around them)"
                )
            raise BadRecord(self.location(number + 1), problem) from None


def read_json_objects(path: str | os.PathLike) -> Iterator[tuple[str, dict]]:
    """Yield (location, object) for each record of a JSONL file or JSON array; see JsonRecords.

    The location is "path:17" for line 17 of JSONL and "path:record 17" for element 17 of an array.
    """
    records = JsonRecords(path)
    for number, record in records:
        yield records.location(number), record


def format_location(path: str, unit: str, number: int) -> str:
    """The one spelling of a place in a data file."""
    return f"{path}:{number}" if unit == "line" else f"{path}:record {number}"


def type_name(value: Any) -> str:
    """What JSON calls the type of a value, with its article."""
    name = _TYPE_NAMES[type(value)]
    if name == "null":
        return name
    return f"an {name}" if name == "object" else f"a {name}"


def _first_character(path: str) -> bytes:
    """The first byte that is neither a byte order mark nor JSON white space; UserError if none."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder, want a file; name the files in it, such as {path}/*.jsonl")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is not a regular file; write the records to a file first")
    with _open_bytes(path, None) as file:
        block = file.read(_READ_BYTES)
        for start, what, cure in _FOREIGN_STARTS:
            if block.startswith(start):
                raise UserError(f"{path}: is {what}, want UTF-8 JSON; {cure}")
        while block:
            rest = block.lstrip(_JSON_BLANKS)
            if rest:
                return rest[:1]
            block = file.read(_READ_BYTES)
    raise UserError(f"{path}: is empty; remove it from the list of files or fill it")


class _ObservedFile(io.RawIOBase):
    """A file that shows its bytes to an observer as they are read (a checksum in the same pass)."""

    def __init__(self, path: str, on_bytes: Callable[[Any], object]):
        self._file = open(path, "rb", buffering=0)
        self._on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._on_bytes(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_bytes(path: str, on_bytes: Callable[[Any], object] | None) -> io.BufferedReader:
    """Open for reading, past a byte order mark."""
    try:
        raw = open(path, "rb", buffering=0) if on_bytes is None else _ObservedFile(path, on_bytes)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path (seen from {os.getcwd()})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    file = io.BufferedReader(raw, _READ_BYTES)
    if file.peek(len(_BOM)).startswith(_BOM):
        file.read(len(_BOM))
    return file


def _orjson_reason(error: BaseException | None) -> str:
    # Its own line and column count within the one line that it was given, and would mislead.
    return str(error).split(": line ")[0]


def _ijson_reason(error: BaseException) -> str:
    # The C library adds a drawing of the spot on further lines, and repr()s the text if it is not UTF-8.
    text = str(error.args[0]) if error.args else str(error)
    return text.split("\n")[0].split("\\n")[0].removeprefix("b'").rstrip("'")
