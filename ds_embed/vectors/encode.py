"""A corpus to vectors on disk: rows in file order on any number of ranks, memory flat in its size.

The ranks take the micro-batches of a CorpusPlan in turn; rank 0 makes the rows a corpus, so that a job that was
killed goes on from what it saved.

Shapes: n texts of the corpus, t texts of a group, D dimensions.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from ds_embed.data.batch import collate, collate_prompts
from ds_embed.data.store import TextStore
from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError
from ds_embed.vectors.corpus import Corpus, CorpusWriter
from ds_embed.vectors.corpus_plan import BLOCK_TEXTS, CorpusPlan

# Rows are gathered when every rank has this many micro-batches, or all together BLOCK_TEXTS rows.
GROUP_ROUNDS = 8
_NO_TEXTS = np.empty(0, np.int64)

Encode = Callable[..., torch.Tensor]


def encode_store(
    store: TextStore,
    encode: Encode,
    world: World,
    corpus: Corpus,
    *,
    micro_batch_tokens: int,
    rows: range | None = None,
    goes_on: bool = False,
    save_seconds: float = 30.0,
    block_texts: int = BLOCK_TEXTS,
) -> None:
    """Make the corpus: float32 (n, D), and a line per row in file order.

    encode: as TextEncoder.forward. Every rank must call this, and all make the
    same number of forward passes. `rows` (default: all) start at a whole block. With `goes_on`, an earlier call that
    was killed is gone on with: corpus.is_finished has compared what both are made from. Without it a corpus that
    stands there is replaced. UserError when rows can't be written or are not finite; what was saved is kept.
    """
    plan = CorpusPlan(store, range(store.num_texts) if rows is None else rows, micro_batch_tokens, block_texts)
    num_dims = _encode_texts(store, _NO_TEXTS, encode, world).shape[1]
    writer = CorpusWriter(corpus, plan, num_dims, goes_on, save_seconds)
    num_done = world.on_main(f"start {corpus.path}", writer.open)
    problem: UserError | None = None
    progress = _progress_bar(len(plan.rows), num_done, world, corpus.name)
    for texts, block in _encode_groups(plan.batches(num_done), store, encode, world):
        # Of the group before, so that no rank waits for the disk.
        if world.max([float(problem is not None)])[0]:
            break
        if world.is_main:
            try:
                writer.add(texts, block)
            except UserError as error:
                problem = error
            progress.update(len(block))
    if progress is not None:
        progress.close()

    def publish() -> None:
        if problem is not None:
            raise problem
        writer.publish()

    world.on_main(f"publish {corpus.path}", publish)


def _encode_groups(
    batches: Iterator[np.ndarray], store: TextStore, encode: Encode, world: World
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Texts (t,) of groups of micro-batches in order, each with its vectors (t, D) on rank 0."""
    while group := _next_group(batches, world.size):
        own = group[world.rank :: world.size]
        own += [_NO_TEXTS] * (-(-len(group) // world.size) - len(own))
        pieces = [_encode_texts(store, texts, encode, world) for texts in own]
        counts = [sum(map(len, group[rank :: world.size])) for rank in range(world.size)]
        gathered = world.all_gather_rows(torch.cat(pieces), counts)
        texts = np.concatenate(group)
        if not world.is_main:
            yield texts, None
            continue
        slots = np.split(np.arange(len(texts)), np.cumsum([len(batch) for batch in group])[:-1])
        rows = np.empty(gathered.shape, np.float32)
        by_rank = [slot for rank in range(world.size) for slot in slots[rank :: world.size]]
        rows[np.concatenate(by_rank)] = gathered.cpu().numpy()
        yield texts, rows


def _next_group(batches: Iterator[np.ndarray], num_ranks: int) -> list[np.ndarray]:
    """Whole rounds of a micro-batch a rank, but for the last round of all."""
    group: list[np.ndarray] = []
    while len(group) < GROUP_ROUNDS * num_ranks and sum(map(len, group)) < BLOCK_TEXTS:
        group += (taken := list(islice(batches, num_ranks)))
        if len(taken) < num_ranks:
            break
    return group


def _encode_texts(store: TextStore, texts: np.ndarray, encode: Encode, world: World) -> torch.Tensor:
    """Vectors (b, D) of texts (b,). Without any, a dummy text is encoded: the other ranks may need the pass."""
    ids, token_counts = collate(store, texts)
    prompts = collate_prompts(store, texts)
    with torch.inference_mode():
        inputs = [torch.from_numpy(ids).to(world.device), torch.from_numpy(token_counts).to(world.device)]
        inputs.append(bool(token_counts.min() < ids.shape[1]))
        if prompts is not None:
            inputs.append(torch.from_numpy(prompts).to(world.device))
        return encode(*inputs)[: len(texts)].float()


def _progress_bar(num_rows: int, num_done: int, world: World, name: str) -> Any:
    if not world.is_main:
        return None
    from tqdm import tqdm

    description = f"encoding {name}"
    return tqdm(total=num_rows, initial=num_done, unit="text", desc=description, leave=None, dynamic_ncols=True)
