"""A corpus to vectors on disk: rows in file order on any number of ranks, memory flat in its size.

The ranks take the micro-batches of a CorpusPlan in turn; rank 0 makes the rows a corpus, so that a job that was
killed goes on from what it saved.

Shapes: n rows of the corpus, u texts of a micro-batch, D dimensions.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ds_embed.data.batch import collate, collate_prompts, pad
from ds_embed.data.store import TextStore
from ds_embed.job.ranks import World
from ds_embed.models.encoder import TextEncoder
from ds_embed.settings.errors import UserError
from ds_embed.vectors.corpus import Corpus, CorpusWriter
from ds_embed.vectors.corpus_plan import BLOCK_TEXTS, CorpusPlan, MicroBatch

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
    is_packed: bool = False,
    rows: range | None = None,
    goes_on: bool = False,
    save_seconds: float = 30.0,
    block_texts: int = BLOCK_TEXTS,
) -> None:
    """Make the corpus: float32 (n, D), and a line per row in file order.

    encode: as TextEncoder.forward, and whether it takes texts packed. Every rank must call this. `rows` (default: all) start at a whole block. With
    `goes_on` it goes on from an earlier call that was killed: corpus.is_finished has compared what both are made from.
    Without it a corpus that stands there is replaced. UserError when rows can't be written or are not finite; what was
    saved is kept.
    """
    rows = range(store.num_texts) if rows is None else rows
    plan = CorpusPlan(store, rows, micro_batch_tokens, block_texts, is_packed)

    def encode_texts(texts: np.ndarray) -> torch.Tensor:
        """Vectors (u, D) of texts (u,). Without any, a dummy text is encoded: the other ranks may need the pass."""
        ids, lengths = collate(store, texts, is_packed)
        return _forward(encode, ids, lengths, collate_prompts(store, texts), world.device)[: len(texts)]

    num_dims = encode_texts(_NO_TEXTS).shape[1]
    writer = CorpusWriter(corpus, plan, num_dims, goes_on, save_seconds)
    num_done = world.on_main(f"start {corpus.path}", writer.open)
    problem: UserError | None = None
    bar: dict[str, Any] = {"unit": "text", "desc": f"encoding {corpus.name}", "leave": None, "dynamic_ncols": True}
    progress = tqdm(total=len(plan.rows), initial=num_done, disable=not world.is_main, **bar)
    batches = plan.batches(num_done)
    while group := _next_group(batches, world.size):
        vectors = world.rows_in_turn(
            [len(batch.texts) for batch in group],
            lambda number: encode_texts(_NO_TEXTS if number is None else group[number].texts),
        )
        # Of the group before, so that no rank waits for the disk.
        if world.max([float(problem is not None)])[0]:
            break
        if world.is_main:
            try:
                writer.add(group, vectors)
            except UserError as error:
                problem = error
        progress.update(_num_rows(group))
    progress.close()

    def publish() -> None:
        if problem is not None:
            raise problem
        writer.publish()

    world.on_main(f"publish {corpus.path}", publish)


def _next_group(batches: Iterator[MicroBatch], num_ranks: int) -> list[MicroBatch]:
    """Whole rounds of a micro-batch a rank, but for the last round of all."""
    group: list[MicroBatch] = []
    while len(group) < GROUP_ROUNDS * num_ranks and _num_rows(group) < BLOCK_TEXTS:
        group += (taken := list(islice(batches, num_ranks)))
        if len(taken) < num_ranks:
            break
    return group


def _num_rows(group: list[MicroBatch]) -> int:
    return sum(len(batch.rows) for batch in group)


def encode_tokens(encoder: TextEncoder, tokens: list[np.ndarray], prompt_length: int) -> torch.Tensor:
    """Vectors (u, D) float32 of u texts, at least one, by their token ids; prompt_length: see TextEncoder.forward."""
    lengths = np.array([len(ids) for ids in tokens])
    prompts = np.full(len(tokens), prompt_length) if prompt_length else None
    row = np.concatenate(tokens)
    ids = row.astype(np.int64) if encoder.is_packed else pad(row, lengths)
    return _forward(encoder, ids, lengths, prompts, next(encoder.parameters()).device)


def _forward(
    encode: Encode, ids: np.ndarray, lengths: np.ndarray, prompts: np.ndarray | None, device: torch.device
) -> torch.Tensor:
    """Vectors (u, D) float32 of token ids (u, S), or packed (S,); lengths and prompts (u,)."""
    with torch.inference_mode():
        inputs: list[Any] = [torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device)]
        inputs.append(ids.ndim > 1 and bool(lengths.min() < ids.shape[1]))
        if prompts is not None or ids.ndim == 1:
            inputs.append(None if prompts is None else torch.from_numpy(prompts).to(device))
        if ids.ndim == 1:
            inputs.append(int(lengths.max()))
        return encode(*inputs).float()
