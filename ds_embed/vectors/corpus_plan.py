"""Which texts of a corpus share a forward pass, and in which order: a pure function of the token store.

In float arithmetic a row's last bits depend on the batch that it was computed in. So the micro-batches
depend neither on the number of ranks nor on where a job was interrupted or sharded: rows are taken in blocks
of BLOCK_TEXTS, and each block is sorted by length and cut for itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ds_embed.data.plan import cut_by_length
from ds_embed.data.store import TextStore

BLOCK_TEXTS = 16384
MIN_MICRO_BATCHES = 16  # of a block


class Position(NamedTuple):
    """A place in the sequence of micro-batches: before it lie all blocks below `block`, and `batch` of that one's."""

    block: int
    batch: int


class MicroBatch(NamedTuple):
    texts: np.ndarray  # (b,) text numbers in the store
    end: Position  # the place behind it


@dataclass(frozen=True)
class CorpusPlan:
    """The micro-batches of `rows`, which start at a whole block, of a store."""

    store: TextStore
    rows: range
    micro_batch_tokens: int

    @property
    def start(self) -> Position:
        return Position(self.rows.start // BLOCK_TEXTS, 0)

    def batches(self, start: Position, end: Position | None = None) -> Iterator[MicroBatch]:
        """The micro-batches from `start` on, to `end` or to the last."""
        for first in range(start.block * BLOCK_TEXTS, self.rows.stop, BLOCK_TEXTS):
            block = first // BLOCK_TEXTS
            for number, texts in enumerate(self._cut(block)):
                here = Position(block, number)
                if end is not None and here >= end:
                    return
                if here >= start:
                    yield MicroBatch(texts, Position(block, number + 1))

    def num_texts_before(self, position: Position) -> int:
        """How many rows are done when everything before `position` is."""
        if position.batch == 0:
            return position.block * BLOCK_TEXTS - self.rows.start
        inside = sum(len(texts) for texts in self._cut(position.block)[: position.batch])
        return position.block * BLOCK_TEXTS - self.rows.start + inside

    def _cut(self, block: int) -> list[np.ndarray]:
        texts = np.arange(block * BLOCK_TEXTS, min((block + 1) * BLOCK_TEXTS, self.rows.stop))
        return [texts[chosen] for chosen in cut_block(self.store.lengths_of(texts), self.micro_batch_tokens)]


def cut_block(lengths: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Micro-batches of a block of at most BLOCK_TEXTS texts, longest texts first."""
    # A small block is cut finer than it must be, so that several ranks share it; by how much must not
    # depend on their number, or the rows' last bits would.
    budget = max(int(lengths.max()), min(micro_batch_tokens, int(lengths.sum()) // MIN_MICRO_BATCHES))
    return cut_by_length(lengths, budget)


def rows_of_shard(num_rows: int, shard_index: int, num_shards: int) -> range:
    """The rows of one of `num_shards` shards, which are made of whole blocks; none where there are too few."""
    num_blocks = -(-num_rows // BLOCK_TEXTS)
    first, last = (num_blocks * number // num_shards for number in (shard_index, shard_index + 1))
    return range(first * BLOCK_TEXTS, max(first * BLOCK_TEXTS, min(last * BLOCK_TEXTS, num_rows)))
