"""What is scored against what: anchors on one side, candidates on the other, and where gradients are added.

The anchors are queries and the candidates documents, or the other way round. Each anchor has one positive
among the candidates. Its negatives are the shared candidates and its own ones, less those equal to the positive.
Where both are queries, or both documents, there are negatives alone.

Shapes: n anchors, C candidates, c of them in one block, K own candidates per anchor, D dimensions, J keys, P pairs.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Side:
    """One direction of a loss for some of its anchors; the gradients are views that losses add to."""

    anchors: Tensor  # (n, D)
    candidates: Tensor  # (C, D)
    keys: Tensor  # (C, J) a candidate that agrees with an anchor in a key is no negative of it
    anchor_keys: Tensor  # (n, J)
    pairs: tuple[Tensor, Tensor]  # (P,) anchors and (P,) candidates that are no negatives of them, beside the keys
    positives: Tensor  # (n,) candidate numbers
    shared: int  # the first `shared` candidates are scored against every anchor
    own: Tensor  # (n, K) candidate numbers, scored against their own anchor only; -1 where there are fewer
    grad_anchors: Tensor  # (n, D)
    grad_candidates: Tensor  # (C, D)
    guide: "Side | None" = None  # the same texts by another model, whose `ceiling` says which are no negatives
    ceiling: Tensor | None = None  # (n,) of a guide: cosines above it

    def tiles(self, num_anchors: int) -> list["Side"]:
        """The same side for at most `num_anchors` anchors at a time."""
        return [self._tile(slice(start, start + num_anchors)) for start in range(0, len(self.anchors), num_anchors)]

    def _tile(self, rows: slice) -> "Side":
        of_anchors = ["anchors", "anchor_keys", "positives", "own", "grad_anchors"] + ["ceiling"] * (
            self.ceiling is not None
        )
        pairs, guide = (self.pairs[0] - rows.start, self.pairs[1]), self.guide and self.guide._tile(rows)
        return replace(self, pairs=pairs, guide=guide, **{name: getattr(self, name)[rows] for name in of_anchors})

    def positive_scores(self, scale: float | Tensor) -> Tensor:
        """Scores (n,) of the positives."""
        return (self.anchors * self.candidates[self.positives]).sum(1) * scale

    def add_positive_gradient(self, weight: Tensor, grad_anchors: Tensor) -> None:
        """Add d loss / d positive score, `weight` (n,), to both sides' gradients."""
        grad_anchors += weight[:, None] * self.candidates[self.positives]
        self.grad_candidates.index_add_(0, self.positives, weight[:, None] * self.anchors)

    def shared_blocks(self, num_candidates: int) -> list["SharedBlock"]:
        stops = range(0, self.shared, num_candidates)
        return [SharedBlock(self, slice(a, min(a + num_candidates, self.shared))) for a in stops]

    def own_block(self) -> "OwnBlock":
        return OwnBlock(self)

    def blocks(self, num_candidates: int) -> list["SharedBlock | OwnBlock"]:
        """All candidates: the shared ones, at most so many at a time, and the own ones where there are some."""
        return [*self.shared_blocks(num_candidates), *[self.own_block()] * (self.own.shape[1] > 0)]


@dataclass(frozen=True)
class SharedBlock:
    """Candidates of a span against every anchor."""

    side: Side
    span: slice

    def scores(self, scale: float | Tensor, highest: Tensor | None) -> Tensor:
        """Scores (n, c); -inf where a candidate is no negative: equal to the positive, or above `highest` (n,)."""
        side = self.side
        scores = side.anchors @ side.candidates[self.span].T
        scores *= scale
        for key, own_key in zip(side.keys.T, side.anchor_keys.T):  # J is 2 or 4; no (n, c, J) buffer
            scores.masked_fill_(own_key[:, None] == key[None, self.span], -torch.inf)
        if len(side.pairs[0]):
            _mask_pairs(scores, side.pairs[0], side.pairs[1] - self.span.start)
        if side.guide is not None:
            guided = SharedBlock(side.guide, self.span).scores(1.0, side.guide.ceiling)
            scores.masked_fill_(guided == -torch.inf, -torch.inf)
        return scores if highest is None else scores.masked_fill_(scores > highest[:, None], -torch.inf)

    def add_gradient(self, weight: Tensor, grad_anchors: Tensor) -> None:
        """Add d loss / d score, `weight` (n, c), to both sides' gradients."""
        grad_anchors.addmm_(weight, self.side.candidates[self.span])
        self.side.grad_candidates[self.span].addmm_(weight.T, self.side.anchors)


@dataclass(frozen=True)
class OwnBlock:
    """Each anchor's own K candidates; as SharedBlock."""

    side: Side

    def scores(self, scale: float | Tensor, highest: Tensor | None) -> Tensor:
        side = self.side
        scores = torch.einsum("nd,nkd->nk", side.anchors, side.candidates[side.own]) * scale
        dropped = (side.keys[side.own] == side.anchor_keys[:, None, :]).any(2) | (side.own < 0)
        if highest is not None:
            dropped |= scores > highest[:, None]
        if side.guide is not None:
            dropped |= side.guide.own_block().scores(1.0, side.guide.ceiling) == -torch.inf
        return scores.masked_fill(dropped, -torch.inf)

    def add_gradient(self, weight: Tensor, grad_anchors: Tensor) -> None:
        side = self.side
        grad_anchors += torch.einsum("nk,nkd->nd", weight, side.candidates[side.own])
        grad_own = weight[:, :, None] * side.anchors[:, None, :]
        # Where there is no candidate, -1 stands for the last one and its weight is 0.
        places = side.own.flatten() % len(side.candidates)
        side.grad_candidates.index_add_(0, places, grad_own.flatten(0, 1))


def _mask_pairs(scores: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Set scores (n, c) to -inf at the pairs (P,) that lie inside, without a wait for the device to count them."""
    num_rows, num_columns = scores.shape
    inside = (rows >= 0) & (rows < num_rows) & (columns >= 0) & (columns < num_columns)
    places = torch.where(inside, rows * num_columns + columns, 0)
    bounds = torch.where(inside, -torch.inf, torch.inf).to(scores)
    scores.view(-1).scatter_reduce_(0, places, bounds, "amin")


class Sums(NamedTuple):
    """Sums over anchors, as a loss returns them and the caller adds them up: tensors (), or numbers."""

    loss: Tensor  # times the weight that the caller gave
    grad_log_scale: Tensor  # d loss / d log(1 / temperature)
    num_correct: Tensor  # anchors whose positive scores above every negative
    positive_similarity: Tensor  # sum of the positives' cosines
    negative_similarity: Tensor  # sum of the highest negative cosine, over anchors that have a negative
    num_with_negatives: Tensor
    margin: Tensor  # sum of the positive's cosine less the highest negative's, over the same anchors

    @classmethod
    def zero(cls, like: Tensor) -> "Sums":
        return cls(*like.new_zeros(len(cls._fields)))

    def plus(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(self, other)))

    def plus_loss_of(self, other: "Sums") -> "Sums":
        """With the other's loss and gradient added; the statistics stay."""
        return self._replace(loss=self.loss + other.loss, grad_log_scale=self.grad_log_scale + other.grad_log_scale)


def finish_tile(
    side: Side, loss: Tensor, grad_anchors: Tensor, positive: Tensor, highest: Tensor, scale: float | Tensor
) -> Sums:
    """Add the tile's gradient by its anchors, and sum up loss () and scores (n,) of positives and best negatives.

    Every score is the scale times a cosine, so d loss / d log(scale) is sum_ij (d loss / d s_ij) s_ij, which is
    the scalar product of the anchors and their gradient: no further pass over the scores is needed.
    """
    side.grad_anchors.add_(grad_anchors)
    has_negatives = highest > -torch.inf
    return Sums(
        loss=loss,
        grad_log_scale=(side.anchors * grad_anchors).sum(),
        num_correct=(positive > highest).sum().to(loss),
        positive_similarity=positive.sum() / scale,
        negative_similarity=torch.where(has_negatives, highest, 0.0).sum() / scale,
        num_with_negatives=has_negatives.sum().to(loss),
        margin=torch.where(has_negatives, positive - highest, 0.0).sum() / scale,
    )
