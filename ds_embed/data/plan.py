"""Which rank encodes which text in which micro-batch: a pure function of the text lengths.

Shapes: T texts, W ranks, B micro-batches in all, P micro-batches per rank (the same for every rank).
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Micro-batches of text positions (0..T-1); micro_batches[r][p] is what rank r encodes p-th.

    An empty micro-batch stands for a dummy text: the rank takes part in the forward and backward,
    which ZeRO-3 needs, and its gradient is zero.
    """

    micro_batches: list[list[np.ndarray]]
    num_tokens: int  # real tokens
    num_padded_tokens: int  # tokens that are encoded, padding included

    @property
    def padding_share(self) -> float:
        return 1.0 - self.num_tokens / self.num_padded_tokens

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per rank."""
        return len(self.micro_batches[0])

    def rank_order(self) -> np.ndarray:
        """Text positions (T,) in the order in which ranks hold them: rank 0's first."""
        return np.concatenate([texts for rank in self.micro_batches for texts in rank])

    def rank_counts(self) -> list[int]:
        """Number of texts of every rank."""
        return [sum(len(texts) for texts in rank) for rank in self.micro_batches]


def plan_micro_batches(lengths: np.ndarray, micro_batch_tokens: int, num_ranks: int) -> Plan:
    """Cut texts of `lengths` (T,) tokens into micro-batches of at most micro_batch_tokens padded tokens.

    Texts are sorted by length and cut, longest first, into the fewest micro-batches whose number
    is a multiple of W. The budget is then lowered as far as that number allows, so that all take
    about the same time; neighbours in length go to different ranks at the same time.
    Raises ValueError when one text is longer than micro_batch_tokens.
    """
    lengths = np.asarray(lengths)
    longest = _check_budget(lengths, micro_batch_tokens)
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    wanted = -(-len(_cut(descending, micro_batch_tokens)) // num_ranks) * num_ranks
    low, high = longest, micro_batch_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_cut(descending, middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    starts = _cut(descending, high)
    bounds = [*starts, len(order)]
    batches = [order[a:b] for a, b in zip(bounds, bounds[1:])]
    padded = sum(len(batch) * int(lengths[batch[0]]) for batch in batches)
    batches += [order[:0]] * (wanted - len(batches))
    return Plan([batches[rank::num_ranks] for rank in range(num_ranks)], int(lengths.sum()), padded)


def cut_by_length(lengths: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Micro-batches of text positions, longest texts first, whatever the number of ranks."""
    _check_budget(lengths, micro_batch_tokens)
    order = np.argsort(-lengths, kind="stable")
    return np.split(order, _cut(lengths[order], micro_batch_tokens)[1:])


def _check_budget(lengths: np.ndarray, micro_batch_tokens: int) -> int:
    longest = int(lengths.max(initial=0))
    if longest > micro_batch_tokens:
        raise ValueError(
            f"--micro_batch_tokens {micro_batch_tokens}: smaller than one text of {longest} tokens; "
            f"raise it to at least {longest} or lower --max_length"
        )
    return longest


def _cut(descending: np.ndarray, budget: int) -> list[int]:
    """First positions of the micro-batches when each takes texts while count * longest <= budget."""
    starts, start, total = [], 0, len(descending)
    while start < total:
        starts.append(start)
        start += max(1, budget // max(1, int(descending[start])))
    return starts
