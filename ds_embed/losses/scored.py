"""Losses of scored pairs: two texts and how alike they are. The higher its score, the higher a pair's similarity is to be.

    cosent   log(1 + sum over i, j with y_i > y_j of exp((s_j - s_i) / temperature))     (Su 2022), s the cosine
    angle    the same, s the difference of the two angles in the complex plane           (Li and Li 2024, eq. 4)
    cosine   mean of (s_i - y_i)^2, s the cosine                                         (Reimers and Gurevych 2019)

These are CoSENTLoss, AnglELoss and CosineSimilarityLoss of sentence-transformers. Each compares all n pairs of the batch that
are of one file. Shapes: n pairs, U rows of the table, D dimensions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ds_embed.losses.contrastive import LossResult
from ds_embed.losses.sides import Sums


def scored_loss(
    table: Tensor,
    rows: Tensor,
    scores: Tensor,
    block: slice,
    *,
    loss: str,
    temperature: float,
    weight: float,
    matryoshka_dims: Sequence[int] = (),
    matryoshka_weights: Sequence[float] = (),
) -> LossResult:
    """The share of the pairs `block` in `weight` times the loss of n pairs, and its gradient.

    table (U, D) unit vectors; rows (2, n): where the first and the second text of each pair stand; scores (n,). The loss is a
    function of n numbers, so every rank computes all of it, and adds the gradient by its own pairs' texts.
    """
    prefixes = list(zip(matryoshka_dims, matryoshka_weights)) or [(table.shape[1], 1.0)]
    with torch.enable_grad():
        pairs = table[rows].double().requires_grad_()  # (2, n, D)
        terms = []
        for dims, share in prefixes:
            first, second = normalize(pairs[..., :dims], dim=2)
            if loss == "cosine":
                terms.append(share * ((first * second).sum(1) - scores).square().mean())
            else:
                alike = _angle(first, second) if loss == "angle" else (first * second).sum(1)
                terms.append(share * _cosent(alike / temperature, scores))
        total = torch.stack(terms).sum() * weight
        (gradient,) = torch.autograd.grad(total, pairs)
    own = gradient[:, block].flatten(0, 1).to(table)
    on_table = torch.zeros_like(table).index_add_(0, rows[:, block].flatten(), own)
    own_share = (block.stop - block.start) / rows.shape[1]
    return LossResult(Sums.zero(table)._replace(loss=total.detach().to(table) * own_share), on_table)


def _cosent(alike: Tensor, scores: Tensor) -> Tensor:
    """In n log n: of pairs in the order of their scores, those below one are the first so many."""
    order = scores.argsort()
    alike, scores = alike[order], scores[order]
    num_below = torch.searchsorted(scores, scores)
    sum_below = alike.logcumsumexp(0)[(num_below - 1).clamp_min(0)]
    terms = torch.where(num_below > 0, sum_below - alike, -torch.inf)
    return torch.cat([alike.new_zeros(1), terms]).logsumexp(0)


def _angle(first: Tensor, second: Tensor) -> Tensor:
    """(n,) |sum of the real and imaginary parts of z / w|, the halves of unit vectors z and w (n, D) being these parts."""
    (a, b), (c, d) = (pad(side, (0, side.shape[1] % 2)).chunk(2, 1) for side in (first, second))
    return (a * c + b * d + b * c - a * d).sum(1).abs()
