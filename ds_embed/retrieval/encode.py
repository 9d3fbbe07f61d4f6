"""A corpus to vectors on disk: rows in file order on any number of ranks, memory flat in its size.

The texts are taken in blocks. A block's texts are sorted by length and cut into micro-batches that do
not depend on the number of ranks; the ranks take them in turn, and rank 0 writes the block's rows.

Shapes: n texts of the corpus, T texts of a block, D dimensions.
"""

import logging
import shutil
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch

from ds_embed.data.batch import collate
from ds_embed.data.plan import cut_block
from ds_embed.data.store import TextStore
from ds_embed.distributed import World

logger = logging.getLogger(__name__)

BLOCK_TEXTS = 16384

Encode = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


def encode_store(
    store: TextStore, encode: Encode, world: World, *, micro_batch_tokens: int, target: Path, name: str
) -> None:
    """Write target/name.npy, float32 (n, D), and target/name.ids, a line per row in file order.

    encode: token ids (b, S), lengths (b,), has_padding -> (b, D). Every rank must call this, and all
    make the same number of forward passes. The files get their names when they are whole.
    """
    partial = target / f".{name}.npy.partial"
    world.on_main(f"start {target}", lambda: target.mkdir(parents=True, exist_ok=True))
    rows, progress = None, _progress_bar(store, world, name)
    for start in range(0, store.num_texts, BLOCK_TEXTS):
        texts = np.arange(start, min(start + BLOCK_TEXTS, store.num_texts))
        block = _encode_block(store, texts, encode, world, micro_batch_tokens, progress)
        if world.is_main:
            if rows is None:
                rows = np.lib.format.open_memmap(partial, "w+", np.float32, (store.num_texts, block.shape[1]))
            rows[start : start + len(texts)] = block
    if progress is not None:
        progress.close()

    def publish() -> None:
        rows.flush()
        ids = target / f".{name}.ids.partial"
        shutil.copyfile(store.ids_path, ids)
        ids.replace(target / f"{name}.ids")
        partial.replace(target / f"{name}.npy")

    world.on_main(f"publish {target}", publish)


def _encode_block(
    store: TextStore, texts: np.ndarray, encode: Encode, world: World, micro_batch_tokens: int, progress: Any
) -> np.ndarray | None:
    """Vectors (T, D) of the block's texts in file order, on rank 0."""
    batches = cut_block(store.lengths_of(texts), micro_batch_tokens)
    own = batches[world.rank :: world.size]
    rounds = -(-len(batches) // world.size)
    pieces = []
    for number in range(rounds):
        chosen = own[number] if number < len(own) else np.empty(0, np.int64)
        ids, token_counts = collate(store, texts[chosen])
        has_padding = bool(token_counts.min() < ids.shape[1])
        with torch.inference_mode():
            inputs = torch.from_numpy(ids).to(world.device), torch.from_numpy(token_counts).to(world.device)
            pieces.append(encode(*inputs, has_padding)[: len(chosen)].float())
        if progress is not None:
            progress.update(sum(len(b) for b in batches[number * world.size : (number + 1) * world.size]))
    counts = [sum(len(b) for b in batches[rank :: world.size]) for rank in range(world.size)]
    gathered = world.all_gather_rows(torch.cat(pieces), counts)
    if not world.is_main:
        return None
    rows = gathered.cpu().numpy()
    block = np.empty_like(rows)
    block[np.concatenate([b for rank in range(world.size) for b in batches[rank :: world.size]])] = rows
    return block


def _progress_bar(store: TextStore, world: World, name: str) -> Any:
    if not world.is_main:
        return None
    from tqdm import tqdm

    return tqdm(total=store.num_texts, unit="text", desc=f"encoding {name}", dynamic_ncols=True)
