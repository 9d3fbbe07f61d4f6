"""Which rank encodes which text in which micro-batch: a pure function of the text lengths.

Shapes: T texts, W ranks, B micro-batches in all, P micro-batches per rank (the same for every rank).
"""

from dataclasses import dataclass

import numpy as np

from ds_embed.settings.errors import UserError

# What one more micro-batch costs, as a share of a full one: launches, adding up gradients, under ZeRO-3 a gather of
# the weights. More and smaller micro-batches pad less, so some more than must be often pay.
ROUND_COST = 1 / 32
# A corpus is encoded in micro-batches whose texts are about equally long: at most by this share shorter than the longest
# one, once there are so many tokens that one more forward pass costs little.
LARGEST_GAP = 1 / 32
SMALLEST_MICRO_BATCH = 1024
# Sizes of micro-batches that are tried: a step's time allows many when there are few texts.
_FEWEST_SIZES, _MOST_SIZES = 48, 512


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

    Texts are sorted by length and cut, longest first, into rounds of W micro-batches of about the same padded size, so
    that the ranks wait little for each other; the cut with the least padding, idling and cost of rounds is taken.
    Raises UserError when one text is longer than micro_batch_tokens.
    """
    lengths = np.asarray(lengths)
    check_budget(int(lengths.max(initial=0)), micro_batch_tokens)
    order = np.argsort(-lengths, kind="stable")
    starts = _cheapest_cut(lengths[order], micro_batch_tokens, num_ranks)
    batches = np.split(order, starts[1:])
    padded = sum(len(batch) * int(lengths[batch[0]]) for batch in batches)
    batches += [order[:0]] * (-len(batches) % num_ranks)
    return Plan([batches[rank::num_ranks] for rank in range(num_ranks)], int(lengths.sum()), padded)


def _cheapest_cut(descending: np.ndarray, budget: int, num_ranks: int) -> list[int]:
    """First positions of the micro-batches of the rounds that together cost least; `descending` (T,).

    A round, a micro-batch for every rank, costs the padded tokens of its largest micro-batch and a constant. It takes
    as many texts as fit into micro-batches of one of many sizes; which size, from which text on, dynamic
    programming decides from the shortest text backwards.
    """
    num_texts, position = len(descending), np.arange(len(descending) + 1)
    num_sizes = min(_MOST_SIZES, max(_FEWEST_SIZES, 2**18 // num_texts))
    sizes = np.geomspace(max(descending[-1], budget / 1024), budget, num_sizes).round().astype(np.int64)
    lengths = np.append(descending, 1)  # and one to stand on behind the last text
    taken = np.maximum(1, sizes[:, None] // lengths)
    following = np.minimum(position + taken, num_texts)  # of a size and the first text of a micro-batch
    padded = (following - position) * lengths
    ends, costs = _in_sequence((following, padded), num_ranks)
    # (A text longer than the size is a micro-batch of its own; none is longer than the budget.)
    costs = costs + budget * ROUND_COST
    least, choice = np.zeros(num_texts + 1), np.zeros(num_texts, np.int64)
    for first in range(num_texts - 1, -1, -1):
        total = costs[:, first] + least[ends[:, first]]
        choice[first] = number = total.argmin()
        least[first] = total[number]
    starts, first = [], 0
    while first < num_texts:
        row = following[choice[first]]
        for _ in range(num_ranks):
            if first < num_texts:
                starts.append(first)
                first = int(row[first])
    return starts


def _in_sequence(step: tuple[np.ndarray, np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where `count` steps in sequence lead, and the largest cost among them, from where each leads and costs."""
    if count == 1:
        return step
    twice = _after(step, step)
    return _in_sequence(twice, count // 2) if count % 2 == 0 else _after(step, _in_sequence(twice, count // 2))


def _after(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    ends, costs = first
    return np.take_along_axis(second[0], ends, 1), np.maximum(costs, np.take_along_axis(second[1], ends, 1))


def cut_by_length(lengths: np.ndarray, micro_batch_tokens: int) -> list[np.ndarray]:
    """Micro-batches of text positions, longest texts first, whatever the number of ranks."""
    check_budget(int(lengths.max(initial=0)), micro_batch_tokens)
    order = np.argsort(-lengths, kind="stable")
    return np.split(order, _cut(lengths[order], micro_batch_tokens)[1:])


def check_budget(longest: int, micro_batch_tokens: int) -> None:
    """UserError when a text of `longest` tokens fits into no micro-batch."""
    if longest > micro_batch_tokens:
        raise UserError(
            f"--micro_batch_tokens {micro_batch_tokens}: smaller than one text of {longest} tokens; "
            f"raise it to at least {longest} or lower --max_length"
        )


def _cut(descending: np.ndarray, budget: int) -> list[int]:
    """First positions of the micro-batches: each takes texts while count * longest <= budget, and ends before that
    where a text is shorter by LARGEST_GAP and the micro-batch is worth a forward pass."""
    ascending, total = descending[::-1], len(descending)
    starts, start = [], 0
    while start < total:
        starts.append(start)
        longest = max(1, int(descending[start]))
        shorter = total - int(np.searchsorted(ascending, longest * (1 - LARGEST_GAP)))
        worth_it = start + -(-SMALLEST_MICRO_BATCH // longest)
        start = max(start + 1, min(start + budget // longest, max(shorter, worth_it)))
    return starts
