"""The vectors of the catalog's tables, and the candidates found with them.

Shapes: n queries, k kept documents, p pairs, D dimensions.
"""

import json
from pathlib import Path

import numpy as np

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.job.ranks import World
from ds_embed.settings import EncodeArguments, ModelArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.tool_arguments import MiningArguments
from ds_embed.tools.mine.catalog import TABLES, Catalog
from ds_embed.vectors.generate import generate
from ds_embed.vectors.search import pair_scores, search_sharded
from ds_embed.vectors.vectors import Vectors, read_embeddings

_COPIED_ROWS = 65536


class ModelCandidates:
    """The k best candidates of each query by inner product; each rank searches its slice of the documents."""

    def __init__(self, world: World, catalog: Catalog, paths: dict[str, str]):
        self._world = world
        self._queries, self._documents = (
            np.load(paths[name], mmap_mode="r", allow_pickle=False) for name in ("queries", "documents")
        )
        self._num_candidates = catalog.num_candidates

    def find(
        self, queries: range, k: int, pair_places: np.ndarray, pair_rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores (n, k), rows (n, k), and the scores of pairs (p,), on every rank.

        A pair is a query, given by its index within `queries`, and any document.
        """
        rows = np.array(self._queries[queries.start : queries.stop])
        scores, found = search_sharded(self._world, rows, self._documents[: self._num_candidates], k)
        device = str(self._world.device)
        return scores, found, pair_scores(rows, self._documents, pair_places, pair_rows, device)


def obtain_vectors(
    world: World, folder: Path, model: ModelArguments, text: TextArguments, arguments: MiningArguments
) -> dict[str, str]:
    """Encode the catalog in `folder`, or find its vectors in --embeddings; paths of "queries" and "documents".

    Both are .npy files with rows in table order. A restarted job reuses them. UserError if vectors do not match the ids
    or are not finite, or if ids have no vector.
    """
    done = folder / "vectors.json"

    def known() -> dict[str, str] | None:
        return json.loads(done.read_text()) if done.exists() else None

    paths = world.on_main("mining: vectors that are there", known)
    if paths is not None:
        return paths
    embeddings: str | Path | None = arguments.embeddings
    if embeddings is None:
        encode = EncodeArguments(
            deepspeed=arguments.deepspeed,
            bf16=arguments.bf16,
            query_files=[str(folder / "catalog" / TABLES["queries"][0])],
            doc_files=[str(folder / "catalog" / TABLES["documents"][0])],
            output_prefix=str(folder / "vectors"),
            micro_batch_tokens=arguments.micro_batch_tokens,
            cache_dir=str(folder / "tokens"),
        )
        embeddings = generate(world, model, text, encode, is_part=True)

    def take() -> dict[str, str]:
        paths = {}
        for kind, vectors in zip(TABLES, read_embeddings(str(embeddings))):
            is_ours = arguments.embeddings is None
            paths[kind] = str(vectors.path.resolve() if is_ours else _by_name(vectors, folder, kind))
        with replaced_when_whole(done) as file:
            json.dump(paths, file)
        return paths

    return world.on_main("mining: vectors", take)


def _by_name(vectors: Vectors, folder: Path, kind: str) -> Path:
    """Write the vectors of the table's ids, in table order, to a file and return its path."""
    names = (folder / "catalog" / f"{kind}.names").read_text(encoding="utf-8").split("\n")[:-1]
    row_of = {name: row for row, name in enumerate(vectors.ids)}
    missing = [name for name in names if name not in row_of]
    if missing:
        flag = "query_files" if kind == "queries" else "doc_files"
        raise UserError(
            f"--embeddings: {len(missing)} of {len(names)} texts have no vector in {vectors.path}, such as that of "
            f"{TABLES[kind][2]} '{missing[0]}'; encode them too (--{flag} of ds-embed generate)"
        )
    rows = np.array([row_of[name] for name in names], dtype=np.int64)
    path = folder / f"{kind}.npy"
    copy = np.lib.format.open_memmap(path, "w+", np.float32, (len(rows), vectors.rows.shape[1]))
    for start in range(0, len(rows), _COPIED_ROWS):
        copy[start : start + _COPIED_ROWS] = vectors.rows[rows[start : start + _COPIED_ROWS]]
    copy.flush()
    return path
