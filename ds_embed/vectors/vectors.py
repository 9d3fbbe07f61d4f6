"""Reading vectors that recipes/generate.py wrote: rows of float32, float16 or int8, memory-mapped, and their ids.

Shapes: n rows of one kind (N queries, M documents), D dimensions.
"""

import codecs
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.artifact.artifact import MANIFEST, is_begun
from ds_embed.settings.errors import UserError

# kind: folder names in order of preference
_LAYOUT = {"query": ("test_queries",), "doc": ("test_docs", "test_doc")}
_AGAIN = "write the vectors again with ds-embed generate"
_CHECK_BYTES = 64 << 20
_OF_MODEL = ("base_model", "adapter", "dense_layers", "pooling", "head", "bidirectional")  # in a manifest's made_from
# Encoding one text twice, in other micro-batches and in bf16, moves its vector by about 1 %.
_SAME_TEXT_DISTANCE = 0.05


class Ids(Sequence[str]):
    """n ids in file order, held as one UTF-8 buffer and n + 1 offsets: 8 bytes an id beside its text.

    Indexing gives a str. Ids are not empty and hold no line feed and no NUL.
    """

    def __init__(self, lines: bytes):
        """`lines` is the content of an .ids file, every id followed by a line feed."""
        assert not lines or lines.endswith(b"\n")
        self._lines = np.frombuffer(lines, dtype=np.uint8)
        ends = np.flatnonzero(self._lines == ord("\n"))
        self._starts = np.concatenate([np.zeros(1, np.int64), ends + 1])

    @classmethod
    def from_strings(cls, ids: Iterable[str]) -> "Ids":
        return cls("".join(f"{name}\n" for name in ids).encode())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        row = range(len(self))[row]  # negative rows, and IndexError past the end
        return self._lines[self._starts[row] : self._starts[row + 1] - 1].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        for row in range(len(self)):
            yield self[row]

    def take(self, rows: np.ndarray) -> "Ids":
        return Ids.from_strings(self[row] for row in rows)

    def first_with_white_space(self) -> str | None:
        """The first id that a file with columns split at white space could not hold."""
        suspects = ((self._lines <= ord(" ")) & (self._lines != ord("\n"))) | (self._lines >= 128)
        if not suspects.any():
            return None
        return next((name for name in self if name.split() != [name]), None)

    @cached_property
    def sorted_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows by ascending id in byte order (int64), and where an id equals the one before (bool).

        Rows of one id keep their file order.
        """
        import pyarrow
        import pyarrow.compute

        text = pyarrow.py_buffer(self._lines[self._lines != ord("\n")])
        starts = pyarrow.py_buffer(self._starts - np.arange(len(self) + 1))
        ids = pyarrow.Array.from_buffers(pyarrow.large_binary(), len(self), [None, starts, text])
        order = pyarrow.compute.array_sort_indices(ids)
        ordered = ids.take(order)
        same = np.zeros(len(self), dtype=np.uint8)
        if len(self) > 1:
            equal = pyarrow.compute.equal(ordered[1:], ordered[:-1]).cast(pyarrow.uint8())
            same[1:] = np.frombuffer(equal.buffers()[1], np.uint8, len(equal))
        # Not to_numpy: it imports pandas where that is installed, which takes longer than most sorts.
        return np.frombuffer(order.buffers()[1], np.uint64, len(order)).astype(np.int64), same.astype(bool)

    @cached_property
    def ranks(self) -> np.ndarray:
        """int64 (n,): the place of each row's id among the sorted ids; `tie_rank` of search."""
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[self.sorted_rows[0]] = np.arange(len(self))
        return ranks


class StoredRows:
    """float32 (n, D) rows that are stored as float16 or int8 and restored where they are read, so that none is held."""

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, numbers: np.ndarray, scales: np.ndarray | None):
        """numbers (n, D), memory-mapped or not; scales float32 (n,), by which each row is multiplied."""
        # Plain arrays over the maps: indexing the memmap class costs several times more.
        self._numbers, self._scales = numbers.view(np.ndarray), None if scales is None else scales.view(np.ndarray)
        self.shape, self.stored_dtype = numbers.shape, numbers.dtype.name
        self.bytes_per_vector = numbers.shape[1] * numbers.itemsize + (0 if scales is None else scales.itemsize)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: Any) -> np.ndarray:
        rows = self._numbers[chosen].astype(np.float32)
        return rows if self._scales is None else rows * self._scales[chosen][..., None]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def between(self, low: int, high: int) -> "StoredRows":
        """Rows low to high - 1, as a slice of an array would be: nothing is read."""
        return StoredRows(self._numbers[low:high], None if self._scales is None else self._scales[low:high])


def part_of(rows: Any, low: int, high: int) -> Any:
    """Rows low to high - 1 of an array or of rows that are made as they are read; nothing is read."""
    return rows[low:high] if isinstance(rows, np.ndarray) else rows.between(low, high)


def stored_numbers(rows: np.ndarray, dtype: str) -> list[np.ndarray]:
    """What is stored of float32 rows (n, D): their numbers (n, D), and with int8 also the scales (n,).

    Each row has a scale of its own, a 127th of its largest absolute value. So what is stored of a row depends on no
    other: not on a sample, shards or ranks. And the cosine of two int8 rows is that of the restored ones.
    """
    if dtype != "int8":
        return [rows.astype(dtype, copy=False)]
    scales = np.abs(rows).max(axis=1) / np.float32(127)
    scales[scales == 0] = 1
    return [np.clip(np.rint(rows / scales[:, None]), -127, 127).astype(np.int8), scales]


@dataclass(frozen=True)
class Vectors:
    """n rows of one kind: `rows` float32 (n, D), finite, usually memory-mapped; row i is `ids[i]`."""

    path: Path
    rows: Any  # an array or StoredRows
    ids: Ids

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def made_from(self) -> dict[str, str]:
        """What generate noted of the model and settings; empty for vectors of other programs."""
        manifest = self.path.with_name(MANIFEST)
        return json.loads(manifest.read_text(encoding="utf-8"))["made_from"] if manifest.exists() else {}


def read_embeddings(folder: str | os.PathLike, every_row: bool = True) -> tuple[Vectors, Vectors]:
    """Read (queries, documents) of one OUT/consumed_samplesX folder.

    UserError as read_vectors raises it, and when queries and documents differ in D.
    """
    queries, documents = (read_vectors(folder, kind, every_row) for kind in ("query", "doc"))
    if queries.rows.shape[1] != documents.rows.shape[1]:
        raise UserError(
            f"{queries.path} has {queries.rows.shape[1]} dimensions and {documents.path} has "
            f"{documents.rows.shape[1]}: they come from different models; encode both with one model"
        )
    if other := other_model(documents, queries.made_from):
        raise UserError(
            f"{queries.path} and {documents.path} come from different models ({other}); encode both with one"
        )
    return queries, documents


def other_model(vectors: Vectors, made_from: dict[str, str]) -> str:
    """By what the model of these vectors is not the one described; "" where both do not say, or are one."""
    kept = vectors.made_from
    both_say = "base_model" in kept and "base_model" in made_from
    differ = [name for name in _OF_MODEL if both_say and kept.get(name) != made_from.get(name)]
    return ", ".join(f"{name} {kept.get(name)}, not {made_from.get(name)}" for name in differ)


def read_vectors(folder: str | os.PathLike, kind: str, every_row: bool = True) -> Vectors:
    """Read one kind, "query" or "doc", of an OUT/consumed_samplesX folder; rows stay on disk.

    A query id that stands on several rows (a queries file has a line for each right document) is
    kept once, if its rows agree. Reads every row once, to check it; without `every_row` another rank has.
    UserError naming the file and the cure: no such folder or file, not (n, D) of a known type, no rows,
    rows and ids that differ in number, NaN or infinity, repeated document ids, broken ids.
    """
    rows_path, ids_path = vector_files(folder, kind)
    rows, ids = open_rows(rows_path), _read_ids(ids_path)
    if len(ids) != len(rows):
        raise UserError(f"{ids_path} has {len(ids)} ids and {rows_path} has {len(rows)} rows; {_AGAIN}")
    if not len(rows):
        raise UserError(f"{rows_path} has no rows: no {kind} to search; {_AGAIN} from a file with records")
    if every_row:
        _check_finite(rows_path, rows, ids)
    order, same = ids.sorted_rows
    if same.any():
        rows, ids = _without_repeats(rows_path, ids_path, rows, ids, kind)
    return Vectors(rows_path, rows, ids)


def vector_files(folder: str | os.PathLike, kind: str) -> tuple[Path, Path]:
    """The files of rows and ids of one kind. UserError, with the cure, where they are not there."""
    folder = Path(folder)
    subfolders, rows_name, ids_name = _LAYOUT[kind], f"{kind}.npy", f"{kind}.ids"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give OUT/consumed_samplesX of ds-embed generate")
    found = next((folder / name for name in subfolders if (folder / name).is_dir()), None)
    if found is None:
        begun = next((name for name in subfolders if is_begun(folder / name)), None)
        if begun is not None:
            raise UserError(f"{folder / begun}: is not finished; start the same ds-embed generate command again")
        inside = sorted(entry.name for entry in folder.glob("consumed_samples*") if entry.is_dir())
        cure = f"did you mean {folder / inside[-1]}?" if inside else _AGAIN
        raise UserError(f"{folder}: has no folder {' or '.join(subfolders)}; {cure}")
    for name in (rows_name, ids_name):
        if not (found / name).is_file():
            raise UserError(f"{found / name}: no such file (did the encoding run to its end?); {_AGAIN}")
    return found / rows_name, found / ids_name


def scales_file(rows_file: Path) -> Path:
    """Where the scales of int8 rows stand: doc.scales.npy beside doc.npy."""
    return rows_file.with_suffix(".scales.npy")


def open_rows(path: Path) -> Any:
    """float32 (n, D) rows of a file, memory-mapped: an array, or StoredRows of float16 or int8."""
    rows = _open_array(path, 2)
    if rows.shape[1] == 0:
        raise UserError(f"{path}: has vectors of 0 dimensions; {_AGAIN}")
    if rows.dtype == np.float32:
        return rows
    if rows.dtype == np.float16:
        return StoredRows(rows, None)
    if rows.dtype != np.int8:
        raise UserError(
            f"{path}: holds {rows.dtype}, expected float32, float16 or int8; save rows.astype('float32') or {_AGAIN}"
        )
    beside = scales_file(path)
    if not beside.is_file():
        raise UserError(
            f"{path}: holds int8, and its scales are not beside it: {beside.name}, float32 (n,), by which each row is "
            f"multiplied; add them, save the vectors as float32, or {_AGAIN}"
        )
    scales = _open_array(beside, 1)
    if scales.dtype != np.float32 or len(scales) != len(rows):
        raise UserError(
            f"{beside}: holds {len(scales)} {scales.dtype}, expected {len(rows)} float32, one for each row of {path.name}"
        )
    return StoredRows(rows, scales)


def _open_array(path: Path, num_axes: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a whole .npy file of plain numbers ({error}); {_AGAIN}") from None
    if not isinstance(array, np.ndarray) or array.ndim != num_axes:
        found = f"shape {array.shape}" if isinstance(array, np.ndarray) else "an archive of arrays"
        raise UserError(f"{path}: holds {found}, expected one {('(n,)', '(n, D)')[num_axes - 1]} array; {_AGAIN}")
    return array


def _read_ids(path: Path) -> Ids:
    lines = path.read_bytes()
    if lines and not lines.endswith(b"\n"):
        lines += b"\n"
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(lines), _CHECK_BYTES):
            decoder.decode(lines[start : start + _CHECK_BYTES])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); {_AGAIN}") from None
    if b"\0" in lines:
        line = lines.count(b"\n", 0, lines.index(b"\0")) + 1
        raise UserError(f"{path}:{line}: the id holds a NUL byte; {_AGAIN}")
    empty = 0 if lines.startswith(b"\n") else lines.find(b"\n\n") + 1
    if lines[empty : empty + 1] == b"\n":
        line = lines.count(b"\n", 0, empty) + 1
        raise UserError(f"{path}:{line}: the id is empty; {_AGAIN}")
    return Ids(lines)


def _check_finite(path: Path, rows: Any, ids: Ids) -> None:
    block = max(1, _CHECK_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), block):
        finite = np.isfinite(rows[start : start + block])
        if not finite.all():
            bad = start + int(np.argmin(finite.all(axis=1)))
            cure = f"look at the model's loss and dtype, then {_AGAIN}"
            raise UserError(f"{path}: row {bad} (id '{ids[bad]}') holds NaN or infinity; {cure}")


def _without_repeats(rows_path: Path, ids_path: Path, rows: Any, ids: Ids, kind: str):
    order, same = ids.sorted_rows
    repeats = np.flatnonzero(same)
    if kind == "doc":
        row = int(order[repeats[0]])
        raise UserError(
            f"{ids_path}: {len(repeats)} document ids are repeated, such as '{ids[row]}' on line {row + 1}; "
            "give each document its own doc_id (or drop the copies) and encode again"
        )
    firsts = np.maximum.accumulate(np.where(same, 0, np.arange(len(ids))))
    for place in repeats:
        first, row = rows[order[firsts[place]]], rows[order[place]]
        if np.linalg.norm(first - row) > _SAME_TEXT_DISTANCE * np.linalg.norm(first):
            raise UserError(
                f"{ids_path}: query id '{ids[order[place]]}' stands on lines {order[firsts[place]] + 1} and "
                f"{order[place] + 1}, whose vectors differ in {rows_path.name}: two queries share an id; "
                "give each query text its own query_id and encode again"
            )
    kept = np.sort(order[~same])
    return rows[kept], ids.take(kept)
