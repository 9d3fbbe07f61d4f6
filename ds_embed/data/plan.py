"""Which rank encodes which text in which micro-batch: a pure function of the text lengths.

A micro-batch is a matrix of texts padded to the longest, or, packed, a row of texts one after the other without padding.

Shapes: T texts, W ranks, B micro-batches in total, P micro-batches per rank (the same for every rank).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from ds_embed.settings.errors import UserError

# The overhead of another micro-batch, as a share of a full one: kernel launches, accumulating gradients and, under
# ZeRO-3, gathering weights. Smaller micro-batches need less padding, so more than the minimum number often pay off.
ROUND_COST = 1 / 32
# A corpus is encoded in micro-batches of texts of similar length: at most this share shorter than the longest one, once
# a micro-batch has enough tokens that another forward pass costs little.
LARGEST_GAP = 1 / 32
SMALLEST_MICRO_BATCH = 1024
# Resolution of the search for a plan: how many micro-batch sizes are tried, down to this fraction of the largest;
# positions at which a round may start; and rounds whose sizes are optimized jointly.
_FEWEST_SIZES, _MOST_SIZES, _LARGEST_PART = 32, 256, 8
_FEWEST_POSITIONS, _POSITIONS_PER_ROUND, _MOST_DECISIONS = 256, 12, 64


@dataclass(frozen=True)
class Plan:
    """Micro-batches of text positions (0..T-1); micro_batches[r][p] is what rank r encodes p-th.

    An empty micro-batch stands for a dummy text with zero gradient, so that the rank takes part in the forward and
    backward passes, as ZeRO-3 requires.
    """

    micro_batches: list[list[np.ndarray]]
    num_tokens: int  # real tokens
    num_padded_tokens: int  # encoded tokens, including padding
    is_packed: bool = False

    @property
    def padding_share(self) -> float:
        return 1.0 - self.num_tokens / self.num_padded_tokens

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches per rank."""
        return len(self.micro_batches[0])

    def tokens_taken(self, lengths: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """Tokens (b,) that each text of a micro-batch takes, padding included; lengths (T,) of all."""
        own = lengths[texts]
        return own if self.is_packed else np.full_like(own, own.max(initial=0))

    def rank_order(self) -> np.ndarray:
        """Text positions (T,) in the order of the ranks that hold them: rank 0's first."""
        return np.concatenate([texts for rank in self.micro_batches for texts in rank])

    def rank_counts(self) -> list[int]:
        """Number of texts of every rank."""
        return [sum(len(texts) for texts in rank) for rank in self.micro_batches]


def plan_micro_batches(lengths: np.ndarray, micro_batch_tokens: int, num_ranks: int, is_packed: bool = False) -> Plan:
    """Cut texts of `lengths` (T,) tokens into micro-batches of at most micro_batch_tokens tokens, padding included.

    Texts are sorted by length and cut, longest first, into rounds of W micro-batches of about the same padded size, so
    that ranks wait little for each other. The cut minimizes padding, idle time and the overhead of rounds. Packed
    micro-batches are full, except in the last round, where they are about equal. UserError if a text is longer than
    micro_batch_tokens.
    """
    lengths = np.asarray(lengths)
    check_budget(int(lengths.max(initial=0)), micro_batch_tokens)
    order = _longest_first(lengths)
    descending = lengths[order]
    cut = _fullest_cut if is_packed else _cheapest_cut
    starts = cut(descending, micro_batch_tokens, num_ranks)
    ends = [*starts[1:], len(order)]
    tokens = int(lengths.sum())
    padded = tokens if is_packed else int(np.dot(np.subtract(ends, starts), descending[starts]))
    batches = [order[start:end] for start, end in zip(starts, ends)]
    batches += [order[:0]] * (-len(batches) % num_ranks)
    return Plan([batches[rank::num_ranks] for rank in range(num_ranks)], tokens, padded, is_packed)


def _fullest_cut(descending: np.ndarray, budget: int, num_ranks: int) -> list[int]:
    """First positions of packed micro-batches: full ones, but for the last round, whose largest is as small as can be."""
    starts = _cut_packed(descending, budget)
    starts, (first, *_) = np.split(starts, [(len(starts) - 1) // num_ranks * num_ranks])
    rest = descending[first:]
    low, high = int(rest[0]), budget
    while low < high:
        middle = (low + high) // 2
        fits = len(_cut_packed(rest, middle)) <= num_ranks
        low, high = (low, middle) if fits else (middle + 1, high)
    return [*starts.tolist(), *(int(first) + start for start in _cut_packed(rest, low))]


def _cut_packed(lengths: np.ndarray, budget: int) -> list[int]:
    """First positions of the micro-batches, each of which takes texts (T,) as long as their tokens fit into the budget."""
    ends = np.cumsum(lengths)
    starts, start = [], 0
    while start < len(lengths):
        starts.append(start)
        before = int(ends[start] - lengths[start])
        start = int(np.searchsorted(ends, before + budget, side="right"))
    return starts


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """Text positions (T,), longest first; texts of equal length keep their order."""
    longest = int(lengths.max(initial=0))
    # numpy sorts 16-bit integers by radix, ten times as fast.
    return np.argsort((longest - lengths).astype(np.min_scalar_type(longest)), kind="stable")


def _cheapest_cut(descending: np.ndarray, budget: int, num_ranks: int) -> list[int]:
    """First positions of the micro-batches of the cheapest sequence of rounds; `descending` (T,).

    A round has one micro-batch for each rank, and costs the padded tokens of its largest micro-batch plus a constant.
    It takes as many texts as fit into micro-batches of the chosen size. Far from the end, this is the size with the
    lowest cost per token where the round starts; for the last _MOST_DECISIONS rounds, dynamic programming chooses it,
    from the shortest text backwards. With many texts, costs are computed at some positions only.
    """
    before = np.append(0, np.cumsum(descending))  # tokens before each text
    find = partial(_rounds, np.append(descending, 1), num_ranks=num_ranks, round_cost=budget * ROUND_COST)
    lengths = descending.tolist()
    first, starts = 0, []
    last_rounds = int(np.searchsorted(before, before[-1] - _MOST_DECISIONS * budget * num_ranks))
    if last_rounds:
        positions = _spread_positions(descending[:last_rounds], max(64, min(_FEWEST_POSITIONS, 2**13 // num_ranks)))[
            :-1
        ]
        sizes = _sizes(budget // _LARGEST_PART, budget, len(positions) * num_ranks)
        ends, costs = find(positions[:, None], sizes=sizes)
        best = sizes[((before[ends] - before[positions][:, None]) / costs).argmax(1)].tolist()
        nearest = np.searchsorted(positions, np.arange(last_rounds), side="right") - 1
        starts, first = _walk(lengths, 0, last_rounds, num_ranks, lambda place: best[nearest[place]])
    rest, num_rest = descending[first:], len(descending) - first
    if not num_rest:
        return starts
    share = int(rest.sum()) / num_ranks
    spread = max(_POSITIONS_PER_ROUND * share / budget, min(_FEWEST_POSITIONS, 2**13 / num_ranks))
    positions = first + _spread_positions(rest, int(spread))
    largest = min(budget, int(1.5 * share) + int(rest[0]))  # enough for all texts, if the budget is
    smallest = min(largest, max(int(rest[-1]), int(min(share, budget) / _LARGEST_PART)))
    sizes = _sizes(smallest, largest, len(positions) * num_ranks)
    least = _least_costs(positions, *find(positions[:-1, None], sizes=sizes))

    def cheapest(place: int) -> int:
        ends, costs = find(np.array([place]), sizes=sizes)
        return int(sizes[(costs + _between(least, positions, ends)).argmin()])

    return starts + _walk(lengths, first, len(lengths), num_ranks, cheapest)[0]


def _sizes(smallest: int, largest: int, places: int) -> np.ndarray:
    """Sizes of micro-batches to try, given the number of places to try them at."""
    number = min(_MOST_SIZES, max(_FEWEST_SIZES, 2**20 // places))
    return np.geomspace(max(1, smallest), largest, number).round().astype(np.int64)


def _walk(
    lengths: list[int], first: int, end: int, num_ranks: int, size_at: Callable[[int], int]
) -> tuple[list[int], int]:
    """First positions of the micro-batches of rounds that start in [first, end), and the end of the last one."""
    starts, total = [], len(lengths)
    while first < end:
        size = max(size_at(first), lengths[first])
        for _ in range(num_ranks):
            if first < total:
                starts.append(first)
                first = min(total, first + size // lengths[first])
    return starts, first


def _spread_positions(descending: np.ndarray, spread: int) -> np.ndarray:
    """Positions from 0 to T with about equally many tokens between them; all positions if there are few."""
    num_texts = len(descending)
    if num_texts <= 2 * spread:
        return np.arange(num_texts + 1)
    marks = np.linspace(0, int(descending.sum()), spread + 1)[1:-1]
    return np.unique(np.concatenate([[0], np.searchsorted(np.cumsum(descending), marks), [num_texts]]))


def _least_costs(positions: np.ndarray, ends: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The least cost from each position (G + 1,) on; ends and costs (G, sizes): of rounds starting at the first G."""
    before, part = _cells(positions, ends)
    # If a size does not reach the next position, the cost from its end on is not known yet.
    costs = np.where(before > np.arange(len(ends))[:, None], costs, np.inf)
    least, is_exact = np.zeros(len(positions)), not part.any()
    for first in range(len(ends) - 1, -1, -1):
        after = before[first]
        total = costs[first] + least[after]
        if not is_exact:
            total += part[first] * (least[np.minimum(after + 1, len(ends))] - least[after])
        least[first] = total.min()
    return least


def _between(least: np.ndarray, positions: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The least costs from `ends` on, interpolated between positions."""
    before, part = _cells(positions, ends)
    return least[before] + part * (least[np.minimum(before + 1, len(least) - 1)] - least[before])


def _cells(positions: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of the last position at or before each end, and the fraction of the way from it to the next position.

    In the last interval the fraction is 0: whatever is left there takes a whole round.
    """
    before = np.searchsorted(positions, ends, side="right") - 1
    part = (ends - positions[before]) / np.diff(positions, append=positions[-1] + 1)[before]
    return before, np.where(before < len(positions) - 2, part, 0.0)


def _rounds(
    lengths: np.ndarray, starts: np.ndarray, *, sizes: np.ndarray, num_ranks: int, round_cost: float
) -> tuple[np.ndarray, np.ndarray]:
    """Where rounds with micro-batches of `sizes` that start at `starts` end, and their costs; both broadcast."""
    last, ends, largest = len(lengths) - 1, starts, 0
    sizes = np.maximum(sizes, lengths[starts])  # at least one text
    for _ in range(num_ranks):
        length = lengths[ends]
        following = np.minimum(ends + (sizes / length).astype(np.int64), last)
        largest = np.maximum(largest, (following - ends) * length)
        ends = following
    return ends, np.where(starts < last, largest + round_cost, 0.0)


def cut_by_length(lengths: np.ndarray, micro_batch_tokens: int, is_packed: bool = False) -> list[np.ndarray]:
    """Micro-batches of text positions, longest texts first, independent of the number of ranks."""
    check_budget(int(lengths.max(initial=0)), micro_batch_tokens)
    order = _longest_first(lengths)
    cut = _cut_packed if is_packed else _cut
    return np.split(order, cut(lengths[order], micro_batch_tokens)[1:])


def check_budget(longest: int, micro_batch_tokens: int) -> None:
    """UserError if a text of `longest` tokens does not fit into a micro-batch."""
    if longest > micro_batch_tokens:
        raise UserError(
            f"--micro_batch_tokens {micro_batch_tokens}: smaller than one text of {longest} tokens; "
            f"raise it to at least {longest} or lower --max_length"
        )


def _cut(descending: np.ndarray, budget: int) -> list[int]:
    """First positions of the micro-batches. Each takes texts while count * longest <= budget, but ends at a text that
    is shorter by LARGEST_GAP if it already is worth a forward pass."""
    ascending, total = descending[::-1], len(descending)
    starts, start = [], 0
    while start < total:
        starts.append(start)
        longest = max(1, int(descending[start]))
        shorter = total - int(np.searchsorted(ascending, longest * (1 - LARGEST_GAP)))
        worth_it = start + -(-SMALLEST_MICRO_BATCH // longest)
        start = max(start + 1, min(start + budget // longest, max(shorter, worth_it)))
    return starts
