"""A corpus of vectors on disk: an artifact whose parts are blocks of rows.

    test_docs/doc.npy         float32, float16 or int8 (n, D): a header, then the blocks of CorpusPlan
    test_docs/doc.scales.npy  with int8: float32 (n,), in the same blocks
    test_docs/doc.ids         line i is the id of row i
    test_docs/manifest.json   what decides the rows (made_from), and the SHA-256 of every block

Until it is whole, doc.computed holds float32 rows of the block that is being computed, in the order of its micro-batches.
A shard has a range of blocks, so joining shards is putting their blocks one behind the other.

Shapes: n rows, u texts of a micro-batch, D dimensions.
"""

import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ds_embed.artifact.artifact import BEGUN, MANIFEST, Artifact, Part, read_whole
from ds_embed.artifact.identity import check_unchanged
from ds_embed.data.store import TextStore
from ds_embed.settings.encode_arguments import ROUNDING_SETTINGS
from ds_embed.settings.errors import UserError
from ds_embed.vectors.corpus_plan import CorpusPlan, MicroBatch
from ds_embed.vectors.vectors import scales_file, stored_numbers

KIND = "vectors, form 2"
COMPUTED = ("kernels",)  # of made_from: in which way, which is that of the machine
_ROUNDING: dict[str, Any] = {"acceptable": ROUNDING_SETTINGS, "so_that": "goes on with rows that differ by rounding"}

logger = logging.getLogger(__name__)


class Corpus(Artifact):
    """The folder `path` with the vectors `name`.npy, of `dtype`, and their ids, made from what `made_from` says."""

    def __init__(self, path: Path, name: str, made_from: Mapping[str, str] | None = None, dtype: str = "float32"):
        super().__init__(path, KIND, "--output_prefix", {**(made_from or {}), "vector_dtype": dtype})
        self.name, self.dtype = name, dtype
        self.rows_file, self.ids_file, self.computed_file = f"{name}.npy", f"{name}.ids", f"{name}.computed"
        self.files = [self.rows_file]  # whose parts are the blocks
        if dtype == "int8":
            self.files.append(scales_file(Path(self.rows_file)).name)

    def is_finished(self, accepted: list[str]) -> bool:
        """Whether it is whole. UserError when it, or what was begun of it, was made from something else."""
        # Whole rows were all computed in one way, whichever this machine would take.
        return self.look(accepted, free_when_whole=COMPUTED, **_ROUNDING) == "whole"

    def write_headers(self, num_rows: int, num_dims: int) -> list[int]:
        """Write what stands before the rows of each file; returns its bytes."""
        sizes = []
        for file, numbers in zip(self.files, stored_numbers(np.empty((0, num_dims), np.float32), self.dtype)):
            buffer, shape = io.BytesIO(), (num_rows, *numbers.shape[1:])
            described = {"descr": numbers.dtype.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(buffer, described)
            self.write(file, buffer.getvalue(), 0, _header_name(num_rows, num_dims))
            sizes.append(len(buffer.getvalue()))
        return sizes

    def row_bytes(self, num_dims: int) -> list[int]:
        """The bytes of a row in each file."""
        return [numbers.nbytes for numbers in stored_numbers(np.zeros((1, num_dims), np.float32), self.dtype)]

    def finish(self, store: TextStore, rows: range) -> None:
        """Add the ids of these rows of the store, and make the whole."""
        with open(store.ids_path, "rb") as lines, open(self.begun / self.ids_file, "wb") as file:
            file.writelines(islice(lines, rows.start, rows.stop))
        self.publish()


class CorpusWriter:
    """Takes the rows of a plan in the order in which they are computed, and makes them the corpus.

    Holds a block of rows in memory. With `goes_on` it saves what it has every save_seconds, and goes on with what an
    earlier one saved.
    """

    def __init__(self, corpus: Corpus, plan: CorpusPlan, num_dims: int, goes_on: bool, save_seconds: float):
        self._corpus, self._plan, self._num_dims = corpus, plan, num_dims
        self._goes_on, self._save_seconds = goes_on, save_seconds
        self._header_bytes: Sequence[int] = ()  # of each file
        self._num_done = self._num_saved = 0  # rows of the plan, in the order in which they are computed

    def open(self) -> int:
        """Open what was begun, or begin, and return how many rows are done."""
        corpus, plan = self._corpus, self._plan
        with self._named():
            kept = self._take_up(corpus.begin(anew=not self._goes_on))
            if kept:
                self._header_bytes = [part.num_bytes for part in kept[: len(corpus.files)]]
                corpus.keep(kept)
            else:
                corpus.begin(anew=True)
                self._header_bytes = corpus.write_headers(len(plan.rows), self._num_dims)
            corpus.check_room(sum(self._header_bytes) + len(plan.rows) * sum(corpus.row_bytes(self._num_dims)))
            self._num_saved = self._num_done
            self._start_block()
        if self._num_done:
            logger.info("%s: going on after %s of %s rows", corpus.path, f"{self._num_done:,}", f"{len(plan.rows):,}")
        self._last_save = time.monotonic()
        return self._num_done

    def add(self, group: list[MicroBatch], vectors: list[np.ndarray]) -> None:
        """Take the vectors (u, D) of the texts of each micro-batch, the next ones in the plan.

        UserError when they can't be written, naming what is kept, and when a vector is not finite.
        """
        with self._named():
            for batch, of_texts in zip(group, vectors):
                largest = np.abs(of_texts).max(axis=1)
                limit = np.finfo(np.float16 if self._corpus.dtype == "float16" else np.float32).max
                fits = largest <= limit  # NaN does not
                if not fits.all():
                    bad = int(np.argmin(fits))
                    where = self._plan.store.location(int(batch.texts[bad]))
                    self._save()
                    if np.isfinite(largest[bad]):
                        raise UserError(
                            f"{where}: its vector holds {largest[bad]:,.0f}, and float16 at most {limit:,.0f}; give "
                            "--vector_dtype float32 or int8, and another --output_prefix"
                        )
                    cure = "try --bf16 false, or look at the loss of the model's training"
                    raise UserError(f"{where}: its vector holds NaN or infinity; {cure}")
                self._rows[batch.rows - self._first] = of_texts[batch.uses]
                self._num_done += len(batch.rows)
                if self._block_done == len(self._rows):
                    self._end_block()
            if time.monotonic() - self._last_save >= self._save_seconds:
                self._save()

    def publish(self) -> None:
        """Make the corpus whole, once all rows were added."""
        with self._named():
            self._corpus.drop(self._corpus.computed_file)
            self._corpus.finish(self._plan.store, self._plan.rows)

    @property
    def _computed_bytes(self) -> int:
        """Of a row of computed_file."""
        return 4 * self._num_dims

    @property
    def _block_done(self) -> int:
        """Rows of the block that are computed."""
        return self._num_done - (self._first - self._plan.rows.start)

    def _take_up(self, parts: list[Part]) -> list[Part]:
        """The parts to go on from: the blocks up to the first that is not as it was written, and what follows it."""
        told = {(part.file, part.name): part for part in parts}
        kept: list[Part] = []

        def take(files: list[str], name: str) -> list[Part]:
            """The parts of all these files, or none."""
            parts = [told[file, name] for file in files if (file, name) in told]
            lost = [part.file for part in parts if not part.is_in(self._corpus.begun)]
            for file in lost:
                logger.warning("warning: %s: saved rows are not as they were written and are encoded again", file)
            parts = [] if lost or len(parts) < len(files) else parts
            kept.extend(parts)
            return parts

        if not take(self._corpus.files, _header_name(len(self._plan.rows), self._num_dims)):
            return []
        for block in self._plan.blocks:
            if not take(self._corpus.files, str(block)):
                computed = 0
                while parts := take([self._corpus.computed_file], self._computed_name(block, computed)):
                    computed += parts[0].num_bytes // self._computed_bytes
                self._num_done += computed
                break
            self._num_done += len(self._plan.rows_of(block))
        return kept

    def _start_block(self) -> None:
        """Begin the block that follows the rows done, or go on with the rows of it that are saved."""
        self._block, self._first = 0, self._plan.rows.start + self._num_done
        rows = range(0)
        if self._num_done < len(self._plan.rows):
            self._block = self._first // self._plan.block_texts
            rows = self._plan.rows_of(self._block)
            self._first = rows.start
        self._rows = np.empty((len(rows), self._num_dims), np.float32)
        if saved := self._block_done:
            content = np.fromfile(self._corpus.begun / self._corpus.computed_file, np.float32, saved * self._num_dims)
            self._rows[self._order()[:saved]] = content.reshape(saved, self._num_dims)

    def _order(self) -> np.ndarray:
        """The rows of the block in the order in which they are computed, as numbers within it."""
        return np.concatenate([batch.rows for batch in self._plan.cut(self._block)]) - self._first

    def _computed_name(self, block: int, num_rows: int) -> str:
        """Of rows of a block behind the first `num_rows`; others follow in other micro-batches."""
        packed = ", packed" if self._plan.is_packed else ""
        return f"{block}+{num_rows}@{self._plan.micro_batch_tokens}, each text once{packed}"

    def _end_block(self) -> None:
        stored = stored_numbers(self._rows, self._corpus.dtype)
        sizes = self._corpus.row_bytes(self._num_dims)
        for file, numbers, header, row_bytes in zip(self._corpus.files, stored, self._header_bytes, sizes):
            start = header + (self._first - self._plan.rows.start) * row_bytes
            self._corpus.write(file, numbers, start, str(self._block))
        if self._num_saved > self._first - self._plan.rows.start:
            self._corpus.save()  # before others take the place of its rows in computed_file
            self._num_saved = self._num_done
        self._start_block()

    def _save(self) -> None:
        if self._goes_on:
            saved = max(0, self._num_saved - (self._first - self._plan.rows.start))
            if saved < self._block_done:
                rows = self._rows[self._order()[saved : self._block_done]]
                name = self._computed_name(self._block, saved)
                self._corpus.write(self._corpus.computed_file, rows, saved * self._computed_bytes, name)
            self._corpus.save()
            self._num_saved = self._num_done
        self._last_save = time.monotonic()

    def _named(self) -> AbstractContextManager[None]:
        kept = f"{self._num_saved:,} of {len(self._plan.rows):,} rows are kept"
        return self._corpus.or_named(str(self._corpus.path), kept)


def check_one_dtype(corpus: Corpus) -> None:
    """UserError when what is there, whole or begun, in the place of `corpus` holds numbers of another type."""
    for file in (corpus.path / MANIFEST, corpus.begun / BEGUN):
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8")).get("made_from", {}).get("vector_dtype", "float32")
            if found != corpus.dtype:
                raise UserError(
                    f"--vector_dtype {corpus.dtype}: {file.parent} holds {found}, and queries and documents of a folder "
                    f"have one; give --vector_dtype {found}, or choose another {corpus.flag}"
                )


def shard_path(path: Path, shard_index: int, num_shards: int) -> Path:
    """Where a shard of the corpus `path` lies: shards/00003_of_00008/ beside it."""
    return path.parent / "shards" / f"{shard_index:05d}_of_{num_shards:05d}" / path.name


def merge_shards(corpus: Corpus, store: TextStore, num_shards: int, accepted: list[str]) -> None:
    """Make the corpus from its finished shards, in order, a block in memory.

    UserError when shards are unfinished, differ in what they were made from or are not as they were
    written. The shards stay where they are.
    """
    paths = [shard_path(corpus.path, index, num_shards) for index in range(num_shards)]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    if missing:
        shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise UserError(
            f"--merge_shards true: {len(missing)} of {num_shards} shards of {corpus.path} are missing or unfinished; run "
            f"with --num_shards {num_shards} --shard_index {shown}"
        )
    again = "remove that shard and encode it again"
    manifests = [read_whole(path, KIND, again) for path in paths]
    # The shards must agree with each other; this machine computes nothing.
    first = manifests[0]["made_from"]
    corpus.made_from |= {name: first[name] for name in COMPUTED if name in first}
    for path, manifest in zip(paths, manifests):
        check_unchanged(path, manifest["made_from"], corpus.made_from, accepted, corpus.flag, **_ROUNDING)
    num_dims = np.load(paths[0] / corpus.rows_file, mmap_mode="r", allow_pickle=False).shape[1]
    with corpus.or_named(str(corpus.path), "the shards stay"):
        corpus.begin(anew=True)
        corpus.check_room(store.num_texts * sum(corpus.row_bytes(num_dims)))
        ends = dict(zip(corpus.files, corpus.write_headers(store.num_texts, num_dims)))
        for path, manifest in zip(paths, manifests):
            for part in manifest["parts"]:
                if part.file in ends and part.start:
                    if not part.is_in(path):
                        raise UserError(f"{path / part.file}: its rows are not as they were written; {again}")
                    content = np.fromfile(path / part.file, np.uint8, part.num_bytes, offset=part.start)
                    corpus.write(part.file, content, ends[part.file], part.name)
                    ends[part.file] += part.num_bytes
        corpus.finish(store, range(store.num_texts))
    logger.info("%s: merged from %d shards", corpus.path, num_shards)


def _header_name(num_rows: int, num_dims: int) -> str:
    return f"header of {num_rows} x {num_dims}"
