"""Vectors that another model gave the texts of a training store: a guide's or a teacher's, read from where generate wrote them.

A text is found under its text_id, or else under the query_id or doc_id that a record with this text has.

Shapes: T texts of the store, t of them of one side (queries, documents), R records, n rows, E dimensions.
"""

import hashlib
from pathlib import Path

import numpy as np

from ds_embed.artifact.identity import identify_large
from ds_embed.artifact.shared import obtain_folder
from ds_embed.data.batch import GlobalBatch
from ds_embed.data.identity import id_keys
from ds_embed.data.store import TrainingStore
from ds_embed.job.ranks import World
from ds_embed.settings import StepArguments
from ds_embed.settings.errors import UserError
from ds_embed.vectors.vectors import StoredRows, Vectors, open_rows, read_embeddings, scales_file, vector_files

_ROWS = "rows.npy"
_AGAIN = (
    "write all texts of the training files with ds-embed convert --input_format training --output_format texts, and "
    "encode those"
)
_SIDES = (("query", "queries", "query_id"), ("document", "documents", "doc_id"))


class StoredVectors:
    """Memory maps of a folder's vectors, and which row each text of a store has."""

    def __init__(self, world: World, store: TrainingStore, flag: str, folder: str, cache_dir: str):
        """Find the row of every text, once for all ranks and later runs. UserError naming the flag: what does not fit."""

        if set(store.kinds_of_files) == {"scored"}:
            raise UserError(f"{flag} {folder}: applies to no scored pairs, and --train_files hold nothing else")

        def find() -> tuple[str, list[str], str]:
            try:
                files = [vector_files(folder, kind) for kind in ("query", "doc")]
                read = [[path for path in (*paths, scales_file(paths[0])) if path.exists()] for paths in files]
                identity = ", ".join(map(identify_large, read))
                stamps = [(path.name, path.stat().st_mtime_ns) for paths in read for path in paths]
                key = hashlib.sha256(repr((store.path.name, identity, stamps)).encode()).hexdigest()[:16]
                rows = obtain_folder(
                    Path(cache_dir).expanduser() / f"vectors-{key}",
                    f"rows of {flag}",
                    "--cache_dir",
                    lambda path: None if (path / _ROWS).exists() else "is not there",
                    lambda path: np.save(path / _ROWS, _rows_of_texts(store, read_embeddings(folder))),
                )
            except UserError as error:
                raise UserError(f"{flag} {folder}: {error}") from None
            return str(rows / _ROWS), [str(paths[0]) for paths in files], identity

        rows, files, self.identity = world.on_main(f"vectors of {flag}", find)
        # Plain arrays over the maps: indexing the memmap class costs several times more.
        self._rows = np.load(rows, mmap_mode="r").view(np.ndarray)
        opened = [open_rows(Path(path)) for path in files]
        self._vectors = [one if isinstance(one, StoredRows) else one.view(np.ndarray) for one in opened]
        self.num_dims = self._vectors[0].shape[1]

    def of(self, batch: GlobalBatch) -> np.ndarray:
        """(N + M, E): the vectors of the batch's queries and documents."""
        rows, num_queries, (queries, documents) = self._rows[batch.uses], batch.num_queries, self._vectors
        return np.concatenate([queries[rows[:num_queries]], documents[rows[num_queries:]]])


def guided_share(batch: GlobalBatch, guide: np.ndarray, step: StepArguments) -> float:
    """Of the batch's pairs of a query (at most 256) and a document that is not its own: the share that the guide leaves out."""
    num_queries, rows = batch.num_queries, slice(min(256, batch.num_queries))
    unit = guide / np.maximum(np.linalg.norm(guide, axis=1, keepdims=True), 1e-12)
    cosines = unit[:num_queries][rows] @ unit[num_queries:].T
    positive = np.diagonal(cosines)[:, None]
    margin = step.guide_margin * (np.abs(positive) if step.guide_margin_strategy == "relative" else 1)
    is_other = (batch.document_keys[rows, None] != batch.document_keys[None]).all(2)
    return float((cosines > positive - margin)[is_other].mean()) if is_other.any() else 0.0


def _rows_of_texts(store: TrainingStore, found: tuple[Vectors, Vectors]) -> np.ndarray:
    """Row of each text (T,) int64, among queries or documents. Memory: some 50 bytes a text.

    UserError: texts without a vector, an id that names two texts, queries' ids that repeat.
    """
    first = np.asarray(store.first_text[:-1])
    side_of = np.ones(store.num_texts, np.int8)
    side_of[first] = 0
    for kind, start, size in zip(store.kinds_of_files, np.cumsum([0, *store.file_sizes]), store.file_sizes):
        if kind == "scored":  # scored pairs have a loss of their own
            side_of[store.first_text[start] : store.first_text[start + size]] = -1
    rows = np.full(store.num_texts, -1)
    for side, (vectors, (one, several, id_name)) in enumerate(zip(found, _SIDES)):
        if not isinstance(vectors.rows, (np.memmap, StoredRows)):
            raise UserError(f"{vectors.path}: query ids are repeated; encode each query once")
        texts = np.flatnonzero(side_of == side)
        keys = store.content_keys[texts]
        names = id_keys(vectors.ids)
        places = _look_up(names, np.arange(len(names)), keys)
        # What has no vector under its text_id: under the id of a record.
        named = np.intersect1d(first + side, texts[places < 0])
        by_id = _look_up(names, np.arange(len(names)), store.ids[side][np.searchsorted(first + side, named)])
        named, by_id = named[by_id >= 0], by_id[by_id >= 0]
        order = np.argsort(by_id, kind="stable")
        of_row, of_text = by_id[order], store.content_keys[named[order]]
        clash = np.flatnonzero((of_row[1:] == of_row[:-1]) & (of_text[1:] != of_text[:-1]))
        if len(clash):
            where = [_location(store, named[order][clash[0] + number]) for number in (0, 1)]
            raise UserError(
                f"{id_name} '{vectors.ids[int(of_row[clash[0]])]}' names two texts, at {where[0]} and {where[1]}, and has one "
                f"vector; {_AGAIN}"
            )
        by_text = _look_up(store.content_keys[named], by_id, keys)
        places = np.where(places < 0, by_text, places)
        missing = np.flatnonzero(places < 0)
        if len(missing):
            raise UserError(
                f"{len(missing):,} of {len(texts):,} {several} have no vector in {vectors.path}, such as the {one} of "
                f"{_location(store, texts[missing[0]])}, neither under its {id_name} nor as a text; {_AGAIN}"
            )
        rows[texts] = places
    return rows


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, -1 where there is none; 0 is no key."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys, kind="stable")
    chosen = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return np.where((keys[chosen] == wanted) & (wanted != 0), values[chosen], -1)


def _location(store: TrainingStore, text: int) -> str:
    return store.location(int(np.searchsorted(store.first_text, text, side="right")) - 1)
