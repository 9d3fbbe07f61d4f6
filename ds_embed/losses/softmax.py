"""Cross entropy of each anchor's positive among its negatives, in tiles.

InfoNCE (van den Oord et al. 2018, eq. 4) with in-batch negatives (Karpukhin et al. 2020, eq. 2):

    loss_i = -log( exp(s_ip) / (exp(s_ip) + sum_j exp(s_ij)) ),   s_ij = a_i . c_j / temperature

Label smoothing (Szegedy et al. 2016, sec. 7): the target is 1 - e on the positive, and e spread evenly over
the C_i candidates of anchor i, the positive among them:

    loss_i = log(sum_j exp(s_ij)) - (1 - e) s_ip - e / C_i sum_j s_ij

Shapes: n anchors, c candidates of a block.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ds_embed.losses.sides import Side, Sums, finish_tile


def softmax_loss(
    side: Side, *, scale: float, weight: float, smoothing: float, margin: float | None, tile_candidates: int
) -> Sums:
    """Add `weight` times the gradient of the anchors' summed loss to the side's gradients; return the sums.

    scale is 1 / temperature. margin: negatives whose cosine exceeds the positive's by more are left out;
    which these are counts as given, so no gradient runs through the choice.
    The scores of all candidates never exist at once: they are computed again for the gradient.
    """
    positive = side.positive_scores(scale)
    ceiling = None if margin is None else positive + margin * scale
    shared = side.shared_blocks(tile_candidates)
    blocks = [*shared, side.own_block()] if side.own.shape[1] else shared
    keeps = len(shared) <= 1  # then the first pass's scores are all there is, and serve the second

    log_sum = torch.full_like(positive, -torch.inf)
    highest = torch.full_like(positive, -torch.inf)
    excess = torch.zeros_like(positive)  # sum over negatives of s_ij - s_ip
    num_candidates = torch.ones_like(positive)
    kept = []
    for block in blocks:
        scores = block.scores(scale, ceiling)
        highest = torch.maximum(highest, scores.amax(1))
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(scores, 1))
        if smoothing:
            excess += (scores - positive[:, None]).masked_fill(_masked(scores), 0.0).sum(1)
            num_candidates += (~_masked(scores)).sum(1)
        kept.append(scores if keeps else None)

    loss = softplus(log_sum - positive) - smoothing * excess / num_candidates
    # d loss / d score; the scale turns it into d loss / d cosine.
    factor = weight * scale
    share = smoothing / num_candidates
    grad_anchors = torch.zeros_like(side.anchors)
    on_positive = smoothing - share - torch.sigmoid(log_sum - positive)
    side.add_positive_gradient(on_positive * factor, grad_anchors)
    log_total = torch.logaddexp(log_sum, positive)[:, None]
    for block, scores in zip(blocks, kept):
        scores = block.scores(scale, ceiling) if scores is None else scores
        masked = _masked(scores) if smoothing else None
        on_scores = scores.sub_(log_total).exp_()
        if smoothing:
            on_scores.sub_(share[:, None]).masked_fill_(masked, 0.0)
        block.add_gradient(on_scores.mul_(factor), grad_anchors)
    return finish_tile(side, loss.sum() * weight, grad_anchors, positive, highest, scale)


def _masked(scores: Tensor) -> Tensor:
    return scores == -torch.inf
