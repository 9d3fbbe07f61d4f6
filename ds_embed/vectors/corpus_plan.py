"""Which texts of a corpus share a forward pass, and in which order: a pure function of the token store.

In float arithmetic a row's last bits depend on the batch that it was computed in. So the micro-batches
depend neither on the number of ranks nor on where a job was interrupted or sharded: rows are taken in blocks
of BLOCK_TEXTS, and each block is sorted by length and cut for itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ds_embed.data.plan import cut_by_length
from ds_embed.data.store import TextStore

BLOCK_TEXTS = 16384
MIN_MICRO_BATCHES = 16  # of a block


@dataclass(frozen=True)
class CorpusPlan:
    """The micro-batches of `rows`, which start at a whole block, of a store; and which rows each block has."""

    store: TextStore
    rows: range
    micro_batch_tokens: int
    block_texts: int = BLOCK_TEXTS

    @property
    def blocks(self) -> range:
        """The numbers of the blocks."""
        return range(self.rows.start // self.block_texts, -(-self.rows.stop // self.block_texts))

    def rows_of(self, block: int) -> range:
        return range(block * self.block_texts, min((block + 1) * self.block_texts, self.rows.stop))

    def cut(self, block: int) -> list[np.ndarray]:
        """The micro-batches of a block, as text numbers (b,), in the order in which they are computed."""
        texts = np.arange(self.rows_of(block).start, self.rows_of(block).stop)
        return [texts[chosen] for chosen in cut_block(self.store.lengths_of(texts), self.micro_batch_tokens)]

    def batches(self, num_done: int) -> Iterator[np.ndarray]:
        """The micro-batches that follow when `num_done` rows are computed, which end one."""
        first = self.rows.start + num_done
        for block in self.blocks[num_done // self.block_texts :]:
            skipped = max(0, first - self.rows_of(block).start)
            for texts in self.cut(block):
                if skipped == 0:
                    yield texts
                skipped -= min(skipped, len(texts))


def cut_block(lengths: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Micro-batches of a block of at most BLOCK_TEXTS texts, longest texts first."""
    # A small block is cut finer than it must be, so that several ranks share it; by how much must not
    # depend on their number, or the rows' last bits would.
    budget = max(int(lengths.max()), min(micro_batch_tokens, int(lengths.sum()) // MIN_MICRO_BATCHES))
    return cut_by_length(lengths, budget)


def rows_of_shard(num_rows: int, shard_index: int, num_shards: int, block_texts: int = BLOCK_TEXTS) -> range:
    """The rows of one of `num_shards` shards, which are made of whole blocks; none where there are too few."""
    num_blocks = -(-num_rows // block_texts)
    first, last = (num_blocks * number // num_shards for number in (shard_index, shard_index + 1))
    return range(first * block_texts, max(first * block_texts, min(last * block_texts, num_rows)))
