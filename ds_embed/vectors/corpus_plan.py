"""Which texts of a corpus share a forward pass, and in which order: a pure function of the token store.

In float arithmetic a row's last bits depend on the batch that it was computed in. So the micro-batches
depend neither on the number of ranks nor on where a job was interrupted or sharded: rows are taken in blocks
of BLOCK_TEXTS, and each block is sorted by length and cut for itself. Rows of a block with the same tokens are one
text, which is encoded once.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ds_embed.data.plan import cut_by_length
from ds_embed.data.store import TextStore

BLOCK_TEXTS = 16384
MIN_MICRO_BATCHES = 16  # of a block


class MicroBatch(NamedTuple):
    """What one forward pass encodes: different texts, by the first row that has each; and all rows that have them."""

    texts: np.ndarray  # (u,)
    rows: np.ndarray  # (b,), at least as many
    uses: np.ndarray  # (b,) which of the texts each row has


@dataclass(frozen=True)
class CorpusPlan:
    """The micro-batches of `rows`, which start at a whole block, of a store; and which rows each block has."""

    store: TextStore
    rows: range
    micro_batch_tokens: int
    block_texts: int = BLOCK_TEXTS
    is_packed: bool = False

    @property
    def blocks(self) -> range:
        """The numbers of the blocks."""
        return range(self.rows.start // self.block_texts, -(-self.rows.stop // self.block_texts))

    def rows_of(self, block: int) -> range:
        return range(block * self.block_texts, min((block + 1) * self.block_texts, self.rows.stop))

    def cut(self, block: int) -> list[MicroBatch]:
        """The micro-batches of a block, in the order in which they are computed."""
        texts = np.arange(self.rows_of(block).start, self.rows_of(block).stop)
        keys: Iterable[bytes] = (self.store.tokens_of(text).tobytes() for text in texts.tolist())
        prompts = self.store.prompt_lengths_of(texts)
        if prompts is not None:  # the same tokens, pooled in another way, are another text
            keys = (prompt.tobytes() + key for prompt, key in zip(prompts, keys))
        batches = cut_block(keys, self.store.lengths_of(texts), self.micro_batch_tokens, self.is_packed)
        return [MicroBatch(texts[batch.texts], texts[batch.rows], batch.uses) for batch in batches]

    def batches(self, num_done: int) -> Iterator[MicroBatch]:
        """The micro-batches that follow when `num_done` rows are computed, which end one."""
        first = self.rows.start + num_done
        for block in self.blocks[num_done // self.block_texts :]:
            skipped = max(0, first - self.rows_of(block).start)
            for batch in self.cut(block):
                if skipped == 0:
                    yield batch
                skipped -= min(skipped, len(batch.rows))


def cut_block(keys: Iterable[bytes], lengths: np.ndarray, micro_batch_tokens: int, is_packed: bool) -> list[MicroBatch]:
    """Micro-batches of a block of at most BLOCK_TEXTS rows, longest texts first; rows with one key are one text.

    lengths: tokens (n,) of the rows.
    """
    numbers: dict[bytes, int] = {}
    text_of = np.array([numbers.setdefault(key, len(numbers)) for key in keys])  # (n,)
    first = np.unique(text_of, return_index=True)[1]
    lengths = lengths[first]
    # A small block is cut finer than it must be, so that several ranks share it; by how much must not
    # depend on their number, or the rows' last bits would.
    budget = max(int(lengths.max()), min(micro_batch_tokens, int(lengths.sum()) // MIN_MICRO_BATCHES))
    batches = cut_by_length(lengths, budget, is_packed)
    place = np.empty(len(first), np.int64)  # of each text in the order in which they are encoded
    place[np.concatenate(batches)] = np.arange(len(first))
    rows = np.argsort(place[text_of], kind="stable")
    uses = place[text_of[rows]]
    starts = np.cumsum([0, *map(len, batches)])
    bounds = np.searchsorted(uses, starts)
    parts = zip(batches, starts, bounds, bounds[1:])
    return [MicroBatch(first[texts], rows[a:b], uses[a:b] - start) for texts, start, a, b in parts]


def rows_of_shard(num_rows: int, shard_index: int, num_shards: int, block_texts: int = BLOCK_TEXTS) -> range:
    """The rows of one of `num_shards` shards, which are made of whole blocks; none where there are too few."""
    num_blocks = -(-num_rows // block_texts)
    first, last = (num_blocks * number // num_shards for number in (shard_index, shard_index + 1))
    return range(first * block_texts, max(first * block_texts, min(last * block_texts, num_rows)))
