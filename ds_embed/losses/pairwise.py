"""Two-way softmax of an anchor's positive against each of its own negatives, one at a time.

    loss_i = 1 / K sum_k -log( exp(s_ip) / (exp(s_ip) + exp(s_ik)) ) = 1 / K sum_k log(1 + exp(s_ik - s_ip))

(RankNet, Burges et al. 2005, eq. 3, with target 1.) Label smoothing e makes the target 1 - e / 2.

Shapes: n anchors, K own negatives per anchor.
"""

import torch
from torch.nn.functional import softplus

from ds_embed.losses.sides import Side, Sums, finish_tile


def pair_loss(side: Side, *, scale: float, weight: float, smoothing: float, margin: float | None) -> Sums:
    """As softmax_loss. A negative that is left out counts as a pair without loss."""
    positive = side.positive_scores(scale)
    own = side.own_block()
    scores = own.scores(scale, None if margin is None else positive + margin * scale)
    difference = scores - positive[:, None]  # (n, K)
    masked = difference == -torch.inf
    num_own = scores.shape[1]
    loss = softplus(difference) - smoothing / 2 * difference.masked_fill(masked, 0.0)
    on_scores = (torch.sigmoid(difference) - smoothing / 2).masked_fill(masked, 0.0)
    on_scores *= weight * scale / num_own
    grad_anchors = torch.zeros_like(side.anchors)
    side.add_positive_gradient(-on_scores.sum(1), grad_anchors)
    own.add_gradient(on_scores, grad_anchors)
    total = loss.sum() * (weight / num_own)
    return finish_tile(side, total, grad_anchors, positive, scores.amax(1), scale)
