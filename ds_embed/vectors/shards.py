"""Vectors in parts, for job arrays: shards/00003_of_00008/ beside the whole, and how parts become the whole.

A shard is made of whole blocks of rows (corpus_plan), so the merged files are those of one job, byte by byte.
"""

import logging
import shutil
from pathlib import Path

from ds_embed.artifact.durable import sync_and_close
from ds_embed.data.store import TextStore
from ds_embed.settings.errors import UserError
from ds_embed.vectors.corpus_plan import rows_of_shard
from ds_embed.vectors.vectors_folder import (
    MANIFEST,
    check_room,
    check_unchanged,
    kernels_of,
    npy_header,
    publish,
    read_manifest,
    unfinished_folder,
)

_COPY_BYTES = 16 << 20

logger = logging.getLogger(__name__)


def shard_folder(embeddings: Path, shard_index: int, num_shards: int) -> Path:
    return embeddings / "shards" / f"{shard_index:05d}_of_{num_shards:05d}"


def merge_shards(
    target: Path, name: str, store: TextStore, num_shards: int, made_from: dict[str, str], accepted: list[str]
) -> None:
    """Make the folder `target` from the finished shards of its name, in order, with flat memory.

    UserError when shards are unfinished, differ in what they were made from or are not as they were
    written. The shards stay where they are.
    """
    parts = [shard_folder(target.parent, index, num_shards) / target.name for index in range(num_shards)]
    missing = [index for index, part in enumerate(parts) if not (part / MANIFEST).exists()]
    if missing:
        shown = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise UserError(
            f"--merge_shards true: {len(missing)} of {num_shards} shards of {target} are missing or unfinished; run "
            f"with --num_shards {num_shards} --shard_index {shown}"
        )
    manifests = [read_manifest(part, name) for part in parts]
    # The shards must agree with each other; this machine computes nothing.
    made_from = made_from | kernels_of(manifests[0]["made_from"])
    for index, (part, manifest) in enumerate(zip(parts, manifests)):
        check_unchanged(part, manifest["made_from"], made_from, accepted)
        assert manifest["num_rows"] == len(rows_of_shard(store.num_texts, index, num_shards)), part
        assert manifest["num_dims"] == manifests[0]["num_dims"], part
    num_dims = manifests[0]["num_dims"]
    folder = unfinished_folder(target)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path, header = folder / f"{name}.npy", npy_header(store.num_texts, num_dims)
    check_room(path, len(header) + store.num_texts * num_dims * 4)
    with open(path, "wb") as whole:
        whole.write(header)
        for part, manifest in zip(parts, manifests):
            with open(part / f"{name}.npy", "rb") as file:
                file.seek(len(npy_header(manifest["num_rows"], num_dims)))
                shutil.copyfileobj(file, whole, _COPY_BYTES)
        sync_and_close(whole)
    publish(target, name, store, range(store.num_texts), num_dims, made_from)
    logger.info("%s: merged from %d shards", target, num_shards)
