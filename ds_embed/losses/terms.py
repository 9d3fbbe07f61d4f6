"""The terms of a loss, each a function of one Side: it adds its gradient to the side's and returns the Sums.

Arguments that all share: scale is 1 / temperature, `weight` is that of the summed loss of the anchors. smoothing
(Szegedy et al. 2016, sec. 7): the target is 1 - e on the positive, and e spread evenly over all candidates.
margin: negatives whose cosine exceeds the positive's by more are left out; which these are counts as given, so no
gradient runs through the choice. hardness: the exponential of an own negative's score is weighted by w_ij = exp(hardness
* cosine), which counts as given too; other negatives have w_ij = 1 (Schechter Vera et al. 2025, EmbeddingGemma, whose
hardness is 5).

Shapes: n anchors, c candidates of a block, C candidates, K own negatives per anchor.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ds_embed.losses.sides import OwnBlock, SharedBlock, Side, Sums, finish_tile


def softmax_loss(
    side: Side,
    *more: Side,
    scale: float | Tensor,
    weight: float,
    smoothing: float,
    margin: float | None,
    hardness: float,
    tile_candidates: int,
) -> Sums:
    """Cross entropy of each anchor's positive p among its negatives.

    InfoNCE (van den Oord et al. 2018, eq. 4) with in-batch negatives (Karpukhin et al. 2020, eq. 2):
        loss_i = log(exp(s_ip) + sum_j w_ij exp(s_ij)) - (1 - e) s_ip - e / C_i (s_ip + sum_j (s_ij + log w_ij)),
        s_ij = a_i . c_j * scale
    `more` are sides of the same n pairs of an anchor and its positive, all of whose candidates are further j of pair i.
    The scores of all candidates never exist at once: they are computed again for the gradient.
    """
    positive = side.positive_scores(scale)
    ceiling = None if margin is None else positive + margin * scale
    sides = [side, *more]
    gradients = [torch.zeros_like(one.anchors) for one in sides]
    blocks = [(block, gradient) for one, gradient in zip(sides, gradients) for block in one.blocks(tile_candidates)]
    keeps = sum(one.shared for one in sides) <= tile_candidates  # the first pass's scores serve the second

    log_sum = torch.full_like(positive, -torch.inf)
    highest = torch.full_like(positive, -torch.inf)
    excess = torch.zeros_like(positive)  # sum over negatives of s_ij + log w_ij - s_ip
    num_candidates = torch.ones_like(positive)
    kept = []
    for block, _ in blocks:
        scores = block.scores(scale, ceiling)
        if block.side is side:
            highest = torch.maximum(highest, scores.amax(1))
        scores = _weighted(block, scores, scale, hardness)
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(scores, 1))
        if smoothing:
            excess += (scores - positive[:, None]).masked_fill(_masked(scores), 0.0).sum(1)
            num_candidates += (~_masked(scores)).sum(1)
        kept.append(scores if keeps else None)

    loss = softplus(log_sum - positive) - smoothing * excess / num_candidates
    # d loss / d score; the scale turns it into d loss / d cosine.
    factor = weight * scale
    share = smoothing / num_candidates
    on_positive = smoothing - share - torch.sigmoid(log_sum - positive)
    side.add_positive_gradient(on_positive * factor, gradients[0])
    log_total = torch.logaddexp(log_sum, positive)[:, None]
    for (block, gradient), scores in zip(blocks, kept):
        scores = _weighted(block, block.scores(scale, ceiling), scale, hardness) if scores is None else scores
        masked = _masked(scores) if smoothing else None
        on_scores = scores.sub_(log_total).exp_()
        if smoothing:
            on_scores.sub_(share[:, None]).masked_fill_(masked, 0.0)
        block.add_gradient(on_scores.mul_(factor), gradient)
    sums = finish_tile(side, loss.sum() * weight, gradients[0], positive, highest, scale)
    for one, gradient in zip(more, gradients[1:]):
        sums = sums.plus_loss_of(finish_tile(one, torch.zeros_like(sums.loss), gradient, positive, highest, scale))
    return sums


def pair_loss(
    side: Side, *, scale: float | Tensor, weight: float, smoothing: float, margin: float | None, hardness: float
) -> Sums:
    """Two-way softmax of the positive against each own negative: RankNet (Burges et al. 2005, eq. 3), target 1 - e / 2.

        loss_i = 1 / K sum_k log(1 + w_ik exp(s_ik - s_ip))

    A negative that is left out counts as a pair without loss.
    """
    positive = side.positive_scores(scale)
    own = side.own_block()
    scores = own.scores(scale, None if margin is None else positive + margin * scale)
    difference = _weighted(own, scores, scale, hardness) - positive[:, None]  # (n, K)
    masked = _masked(difference)
    num_own = scores.shape[1]
    loss = softplus(difference) - smoothing / 2 * difference.masked_fill(masked, 0.0)
    on_scores = (torch.sigmoid(difference) - smoothing / 2).masked_fill(masked, 0.0) * (weight * scale / num_own)
    grad_anchors = torch.zeros_like(side.anchors)
    side.add_positive_gradient(-on_scores.sum(1), grad_anchors)
    own.add_gradient(on_scores, grad_anchors)
    total = loss.sum() * (weight / num_own)
    return finish_tile(side, total, grad_anchors, positive, scores.amax(1), scale)


def _weighted(block: SharedBlock | OwnBlock, scores: Tensor, scale: float | Tensor, hardness: float) -> Tensor:
    """Scores plus log w, which is hardness times the cosine, and so a multiple of the score."""
    return scores * (1 + hardness / scale) if hardness and isinstance(block, OwnBlock) else scores


def distillation_loss(
    side: Side, teacher_scores: Tensor, *, scale: float | Tensor, weight: float, teacher_temperature: float, kind: str
) -> Sums:
    """Learning a teacher's scores t of each anchor's positive and own negatives, which are divided by T.

    "kl": the Kullback-Leibler divergence of the student's distribution from the teacher's (Hinton et al. 2015, sec. 2;
    for retrieval, Izacard and Grave 2021, eq. 3):
        loss_i = sum_j t_ij (log t_ij - log p_ij),   t_i = softmax(teacher scores / T),   p_i = softmax(s_i)
    "margin_mse": the squared difference of the margins (Margin-MSE, Hofstätter et al. 2020), s the cosine times the scale:
        loss_i = 1 / K sum_k ((s_ip - s_ik) - (t_ip - t_ik) / T)^2
    teacher_scores (C,) are those of the candidates, each for its own anchor. Negatives equal to the positive are
    left out: of both distributions, or as a margin without loss.
    """
    assert side.own.shape[1] > 0, "distillation compares own negatives"
    positive = side.positive_scores(scale)
    own = side.own_block()
    scores = own.scores(scale, None)
    student = torch.cat([positive[:, None], scores], 1)  # (n, 1 + K)
    masked = _masked(student)
    teacher = torch.cat([teacher_scores[side.positives][:, None], teacher_scores[side.own]], 1) / teacher_temperature
    if kind == "kl":
        log_teacher = torch.log_softmax(teacher.masked_fill(masked, -torch.inf), 1)
        log_student = torch.log_softmax(student, 1)
        target = log_teacher.exp()
        loss = (target * (log_teacher - log_student).masked_fill(masked, 0.0)).sum()
        on_scores = log_student.exp() - target
    else:
        excess = (student - teacher).masked_fill(masked, 0.0)
        excess = (excess[:, :1] - excess[:, 1:]).masked_fill(masked[:, 1:], 0.0)  # of the student's margins
        loss = excess.square().mean(1).sum()
        on_negatives = excess * (-2 / excess.shape[1])
        on_scores = torch.cat([-on_negatives.sum(1, keepdim=True), on_negatives], 1)
    on_scores = on_scores * (weight * scale)
    grad_anchors = torch.zeros_like(side.anchors)
    side.add_positive_gradient(on_scores[:, 0], grad_anchors)
    own.add_gradient(on_scores[:, 1:], grad_anchors)
    return finish_tile(side, loss * weight, grad_anchors, positive, scores.amax(1), scale)


def batch_distillation_loss(
    side: Side, teacher: Side, *, scale: float | Tensor, weight: float, teacher_temperature: float, tile_candidates: int
) -> Sums:
    """distillation_loss with the teacher's cosines over T as its scores, of all shared candidates.

    `teacher` is the side in the teacher's vectors. Candidates equal to the positive are left out of both distributions.
    """
    scales = scale, 1 / teacher_temperature
    positives = [one.positive_scores(own_scale) for one, own_scale in zip((side, teacher), scales)]
    log_sums = positives
    blocks = list(zip(side.shared_blocks(tile_candidates), teacher.shared_blocks(tile_candidates)))

    def scores_of(block: tuple) -> list[Tensor]:
        return [one.scores(own_scale, None) for one, own_scale in zip(block, scales)]

    for block in blocks:
        log_sums = [torch.logaddexp(a, torch.logsumexp(s, 1)) for a, s in zip(log_sums, scores_of(block))]
    student, target = (positive - log_sum for positive, log_sum in zip(positives, log_sums))
    loss = target.exp() * (target - student)
    grad_anchors = torch.zeros_like(side.anchors)
    side.add_positive_gradient((student.exp() - target.exp()) * (weight * scale), grad_anchors)
    for block in blocks:
        student, target = (scores - log_sum[:, None] for scores, log_sum in zip(scores_of(block), log_sums))
        loss += (target.exp() * (target - student).masked_fill_(_masked(student), 0.0)).sum(1)
        block[0].add_gradient((student.exp() - target.exp()) * (weight * scale), grad_anchors)
    return finish_tile(side, loss.sum() * weight, grad_anchors, positives[0], positives[0], scale)


def vector_loss(vectors: Tensor, teacher: Tensor, *, kind: str, weight: float) -> tuple[Tensor, Tensor]:
    """Learning a teacher's unit vectors (n, F): the summed loss () and its gradient by vectors (n, F), times `weight`.

    "cosine": 1 - cos(vector, teacher); "mse": the squared distance (Reimers and Gurevych 2020, eq. 1, of unit vectors).
    """
    if kind == "mse":
        difference = vectors - teacher
        return weight * difference.square().sum(), 2 * weight * difference
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_min(1e-12)
    unit = vectors / norms
    cosine = (unit * teacher).sum(1, keepdim=True)
    return weight * (1 - cosine).sum(), weight * (cosine * unit - teacher) / norms


def _masked(scores: Tensor) -> Tensor:
    return scores == -torch.inf
