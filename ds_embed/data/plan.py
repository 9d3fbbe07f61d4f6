"""Which rank encodes which text in which micro-batch: a pure function of the text lengths.

Shapes: T texts, W ranks, B micro-batches in all, P micro-batches per rank (the same for every rank).
"""

from dataclasses import dataclass

import numpy as np

# What one more micro-batch costs, as a share of a full one: launches, and under ZeRO-3 a gather of the weights.
# More and smaller micro-batches pad less, so a few more than must be often pay.
ROUND_COST = 1 / 64
MIN_MICRO_BATCHES = 16  # of a block of texts to encode


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

    Texts are sorted by length and cut, longest first, into at most W P micro-batches of about the
    same padded size, for P from the fewest that fit upwards; the P with the least padding and
    idling is taken. Neighbours in length go to different ranks at the same time.
    Raises ValueError when one text is longer than micro_batch_tokens.
    """
    lengths = np.asarray(lengths)
    longest = _check_budget(lengths, micro_batch_tokens)
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order]
    fewest = -(-len(_cut(descending, micro_batch_tokens)) // num_ranks)
    cuts = [
        _even_cut(descending, per_rank * num_ranks, longest, micro_batch_tokens)
        for per_rank in range(fewest, fewest + 1 + max(4, fewest // 2))
    ]
    starts = min(cuts, key=lambda cut: _cost(descending, cut, num_ranks, micro_batch_tokens))
    batches = np.split(order, starts[1:])
    padded = sum(len(batch) * int(lengths[batch[0]]) for batch in batches)
    batches += [order[:0]] * (-len(batches) % num_ranks)
    return Plan([batches[rank::num_ranks] for rank in range(num_ranks)], int(lengths.sum()), padded)


def _even_cut(descending: np.ndarray, num_batches: int, low: int, high: int) -> list[int]:
    """The cut into at most num_batches whose largest micro-batch is smallest, so that all take about as long."""
    while low < high:
        middle = (low + high) // 2
        if len(_cut(descending, middle)) <= num_batches:
            high = middle
        else:
            low = middle + 1
    return _cut(descending, high)


def _cost(descending: np.ndarray, starts: list[int], num_ranks: int, micro_batch_tokens: int) -> float:
    """Tokens that the slowest rank of each round computes, plus the fixed cost of a round."""
    bounds = [*starts, len(descending)]
    padded = [(b - a) * int(descending[a]) for a, b in zip(bounds, bounds[1:])]
    rounds = [max(padded[i : i + num_ranks]) for i in range(0, len(padded), num_ranks)]
    return sum(rounds) + len(rounds) * micro_batch_tokens * ROUND_COST


def cut_by_length(lengths: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Micro-batches of text positions, longest texts first, whatever the number of ranks."""
    _check_budget(lengths, micro_batch_tokens)
    order = np.argsort(-lengths, kind="stable")
    return np.split(order, _cut(lengths[order], micro_batch_tokens)[1:])


def cut_block(lengths: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Micro-batches of a block of texts to encode, longest texts first, the same for any number of ranks."""
    # A small block is cut finer than it must be, so that several ranks share it; by how much must not
    # depend on their number, or the rows' last bits would.
    budget = max(int(lengths.max()), min(micro_batch_tokens, int(lengths.sum()) // MIN_MICRO_BATCHES))
    return cut_by_length(lengths, budget)


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
