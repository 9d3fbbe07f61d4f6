"""A corpus to vectors on disk: rows in file order on any number of ranks, memory flat in its size.

The ranks take the micro-batches of a CorpusPlan in turn; rank 0 writes the rows and notes how far they reach, so
that a job that was killed goes on from there.

Shapes: n texts of the corpus, t texts of a group, D dimensions.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_embed.data.batch import collate
from ds_embed.data.store import TextStore
from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError
from ds_embed.vectors.corpus_plan import BLOCK_TEXTS, CorpusPlan, MicroBatch, Position
from ds_embed.vectors.vectors_writer import VectorsWriter

# Rows are gathered when every rank has this many micro-batches, or all together BLOCK_TEXTS rows.
GROUP_ROUNDS = 8
_NO_TEXTS = np.empty(0, np.int64)

Encode = Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor]


def encode_store(
    store: TextStore,
    encode: Encode,
    world: World,
    *,
    micro_batch_tokens: int,
    target: Path,
    name: str,
    rows: range | None = None,
    made_from: dict[str, str] | None = None,
    save_seconds: float = 30.0,
) -> None:
    """Make the folder `target` with name.npy, float32 (n, D), and name.ids, a line per row in file order.

    encode: token ids (b, S), lengths (b,), has_padding -> (b, D). Every rank must call this, and all make the
    same number of forward passes. `rows` (default: all) start at a whole block. The folder gets its name when
    it is whole. With `made_from`, what decides the rows, an earlier call that was killed is gone on with: its
    made_from was compared by check_unchanged. Without it a folder that stands there is replaced.
    UserError when rows can't be written or are not finite; what was saved is kept.
    """
    plan = CorpusPlan(store, range(store.num_texts) if rows is None else rows, micro_batch_tokens)
    num_dims = _encode_texts(store, _NO_TEXTS, encode, world).shape[1]
    writer = VectorsWriter(plan, target, name, num_dims, made_from, save_seconds)
    start = Position(*world.on_main(f"start {target}", writer.open))
    problem: UserError | None = None
    progress = _progress_bar(plan, start, world, name)
    for group, block in _encode_groups(plan.batches(start), store, encode, world):
        # Of the group before, so that no rank waits for the disk.
        if world.max([float(problem is not None)])[0]:
            break
        if world.is_main:
            try:
                writer.add(group, block)
            except UserError as error:
                problem = error
            progress.update(len(block))
    if progress is not None:
        progress.close()

    def publish() -> None:
        if problem is not None:
            raise problem
        writer.publish()

    world.on_main(f"publish {target}", publish)


def _encode_groups(
    batches: Iterator[MicroBatch], store: TextStore, encode: Encode, world: World
) -> Iterator[tuple[list[MicroBatch], np.ndarray | None]]:
    """Groups of micro-batches in order, each with its vectors (t, D) on rank 0, in the same order."""
    while group := _next_group(batches, world.size):
        own = [batch.texts for batch in group[world.rank :: world.size]]
        own += [_NO_TEXTS] * (-(-len(group) // world.size) - len(own))
        pieces = [_encode_texts(store, texts, encode, world) for texts in own]
        counts = [sum(len(batch.texts) for batch in group[rank :: world.size]) for rank in range(world.size)]
        gathered = world.all_gather_rows(torch.cat(pieces), counts)
        if not world.is_main:
            yield group, None
            continue
        ends = np.cumsum([len(batch.texts) for batch in group])
        slots = np.split(np.arange(ends[-1]), ends[:-1])
        rows = np.empty(gathered.shape, np.float32)
        by_rank = [slot for rank in range(world.size) for slot in slots[rank :: world.size]]
        rows[np.concatenate(by_rank)] = gathered.cpu().numpy()
        yield group, rows


def _next_group(batches: Iterator[MicroBatch], num_ranks: int) -> list[MicroBatch]:
    """Whole rounds of a micro-batch a rank, but for the last round of all."""
    group: list[MicroBatch] = []
    while len(group) < GROUP_ROUNDS * num_ranks and sum(len(batch.texts) for batch in group) < BLOCK_TEXTS:
        group += (taken := list(islice(batches, num_ranks)))
        if len(taken) < num_ranks:
            break
    return group


def _encode_texts(store: TextStore, texts: np.ndarray, encode: Encode, world: World) -> torch.Tensor:
    """Vectors (b, D) of texts (b,). Without any, a dummy text is encoded: the other ranks may need the pass."""
    ids, token_counts = collate(store, texts)
    has_padding = bool(token_counts.min() < ids.shape[1])
    with torch.inference_mode():
        inputs = torch.from_numpy(ids).to(world.device), torch.from_numpy(token_counts).to(world.device)
        return encode(*inputs, has_padding)[: len(texts)].float()


def _progress_bar(plan: CorpusPlan, start: Position, world: World, name: str) -> Any:
    if not world.is_main:
        return None
    from tqdm import tqdm

    done = plan.num_texts_before(start)
    return tqdm(
        total=len(plan.rows), initial=done, unit="text", desc=f"encoding {name}", leave=None, dynamic_ncols=True
    )
