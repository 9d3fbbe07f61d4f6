"""Rank 0's side of encoding: rows to disk as they come, and how far they reach.

First the rows reach the disk, then progress.json says so. It holds the last few saves, each with a checksum of
its rows: rows that got lost nevertheless are noticed and encoded again.
"""

import logging
import os
import shutil
import time
import zlib
from pathlib import Path

import numpy as np

from ds_embed.artifact.durable import free_space
from ds_embed.settings.errors import UserError
from ds_embed.vectors.corpus_plan import BLOCK_TEXTS, CorpusPlan, MicroBatch, Position
from ds_embed.vectors.vectors_folder import (
    FORMAT_VERSION,
    PROGRESS,
    check_room,
    npy_header,
    publish,
    read_progress,
    unfinished_folder,
    write_json,
)

KEPT_SAVES = 8
_CHECK_TEXTS = 4096

logger = logging.getLogger(__name__)


class VectorsWriter:
    """Writes the rows of `plan` into the unfinished folder of `target`, which it turns into `target` at the end.

    Holds at most about two blocks of rows in memory. It goes on with what an earlier writer saved when it is
    given made_from, what decides the rows; otherwise it begins anew.
    """

    def __init__(
        self,
        plan: CorpusPlan,
        target: Path,
        name: str,
        num_dims: int,
        made_from: dict[str, str] | None,
        save_seconds: float,
    ):
        self._plan, self._target, self._name, self._num_dims = plan, target, name, num_dims
        self._made_from, self._save_seconds = made_from, save_seconds
        self._folder = unfinished_folder(target)
        self._path = self._folder / f"{name}.npy"
        self._header = npy_header(len(plan.rows), num_dims)
        self._saves: list[dict] = []  # the last ones, oldest first: start, end, crc32 of the rows between
        self._end = self._saved_end = plan.start
        self._crc32 = 0
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # texts (t,) and rows (t, D) not written yet
        self._num_waiting = 0

    def open(self) -> Position:
        """Open the unfinished folder and return the place to go on from."""
        if self._made_from is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(".*.part"):  # of a write that was killed
            left.unlink()
        check_room(self._path, self._offset(self._plan.rows.stop))
        self._end = self._saved_end = self._find_start()
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            if self._end == self._plan.start:
                os.ftruncate(self._file, 0)
                self._write_at(0, self._header)
            else:
                done = self._plan.num_texts_before(self._end)
                logger.info("%s: going on after %s of %s rows", self._target, f"{done:,}", f"{len(self._plan.rows):,}")
                if not self._saves:  # micro-batches are others from here on: the saves before say nothing now
                    self._note_save()
        except OSError as error:
            raise self._failure(error) from error
        self._last_save = time.monotonic()
        return self._end

    def add(self, group: list[MicroBatch], rows: np.ndarray) -> None:
        """Take the vectors (t, D) of micro-batches in order; every save_seconds they reach the disk.

        UserError when they can't, naming what is kept, and when a vector is not finite.
        """
        texts = np.concatenate([batch.texts for batch in group])
        finite = np.isfinite(rows).all(axis=1)
        if not finite.all():
            where = self._plan.store.location(int(texts[np.argmin(finite)]))
            self._save()
            raise UserError(
                f"{where}: its vector holds NaN or infinity; try --bf16 false, or look at the loss of the model's training"
            )
        self._waiting.append((texts, rows))
        self._num_waiting += len(texts)
        self._crc32 = zlib.crc32(rows, self._crc32)
        self._end = group[-1].end
        try:
            if self._num_waiting >= BLOCK_TEXTS:
                self._write()
            if time.monotonic() - self._last_save >= self._save_seconds:
                self._save()
        except OSError as error:
            raise self._failure(error) from error

    def publish(self) -> None:
        """Make the folder whole, once all rows were added."""
        try:
            self._save()
            os.close(self._file)
            plan = self._plan
            publish(self._target, self._name, plan.store, plan.rows, self._num_dims, self._made_from)
        except OSError as error:
            raise self._failure(error) from error

    def _find_start(self) -> Position:
        """The end of the newest save whose rows are as they were written."""
        progress = read_progress(self._folder)
        if progress is None:
            return self._plan.start
        written_with = int(progress["micro_batch_tokens"])
        plan = CorpusPlan(self._plan.store, self._plan.rows, written_with)
        saves = progress["saves"]
        while saves and not self._is_on_disk(plan, saves[-1]):
            saves.pop()
            where = "the save before it" if saves else "the first row"
            logger.warning(
                "warning: %s: the rows saved last are not as they were written; going on from %s", self._path, where
            )
        if not saves:
            return plan.start
        end = Position(*saves[-1]["end"])
        if written_with == self._plan.micro_batch_tokens:
            self._saves = saves
            return end
        return Position(end.block, 0)  # its micro-batches are others now

    def _is_on_disk(self, plan: CorpusPlan, save: dict) -> bool:
        """Whether the rows of a save are there, byte by byte."""
        size, crc32 = self._path.stat().st_size if self._path.exists() else 0, 0
        if size < len(self._header):
            return False
        with open(self._path, "rb") as file:
            if file.read(len(self._header)) != self._header:
                return False
        row_bytes = 4 * self._num_dims
        num_rows = (size - len(self._header)) // row_bytes
        if not num_rows:
            return False
        rows = np.memmap(self._path, np.float32, "r", len(self._header), (num_rows, self._num_dims))
        for batch in plan.batches(Position(*save["start"]), Position(*save["end"])):
            places = batch.texts - plan.rows.start
            if places.max() >= num_rows:
                return False
            for first in range(0, len(places), _CHECK_TEXTS):
                crc32 = zlib.crc32(np.ascontiguousarray(rows[places[first : first + _CHECK_TEXTS]]), crc32)
        return crc32 == save["crc32"]

    def _write(self) -> None:
        """Hand the waiting rows to the system, neighbours in one piece."""
        if not self._waiting:
            return
        texts, rows = (np.concatenate(parts) for parts in zip(*self._waiting))
        order = np.argsort(texts)
        texts, rows = texts[order], rows[order]
        for run in np.split(np.arange(len(texts)), np.flatnonzero(np.diff(texts) != 1) + 1):
            self._write_at(self._offset(texts[run[0]]), rows[run[0] : run[-1] + 1])
        self._waiting, self._num_waiting = [], 0

    def _save(self) -> None:
        """Bring the rows to the disk, and only then the word that they are there."""
        self._write()
        os.fsync(self._file)
        if self._made_from is not None and self._end != self._saved_end:
            self._note_save()
        self._saved_end, self._crc32 = self._end, 0
        self._last_save = time.monotonic()

    def _note_save(self) -> None:
        self._saves.append({"start": self._saved_end, "end": self._end, "crc32": self._crc32})
        self._saves = self._saves[-KEPT_SAVES:]
        progress = {
            "format_version": FORMAT_VERSION,
            "micro_batch_tokens": self._plan.micro_batch_tokens,
            "made_from": self._made_from,
            "saves": self._saves,
        }
        write_json(self._folder / PROGRESS, progress)

    def _offset(self, text: int) -> int:
        return len(self._header) + (int(text) - self._plan.rows.start) * self._num_dims * 4

    def _write_at(self, offset: int, content: bytes | np.ndarray) -> None:
        left = memoryview(content).cast("B")
        while left:
            written = os.pwrite(self._file, left, offset)
            left, offset = left[written:], offset + written

    def _failure(self, error: OSError) -> UserError:
        kept = self._plan.num_texts_before(self._saved_end)
        return UserError(
            f"{self._target} could not be written ({error.strerror or error}; {free_space(self._folder)}); {kept:,} of "
            f"{len(self._plan.rows):,} rows are kept. Cure that and start the same command again"
        )
