"""Learning a teacher's ranking of each anchor's positive and own negatives.

The Kullback-Leibler divergence of the student's distribution from the teacher's (Hinton et al. 2015, sec. 2;
for retrieval, Izacard and Grave 2021, eq. 3), over the positive and the K own negatives:

    loss_i = sum_j t_ij (log t_ij - log p_ij),   t_i = softmax(teacher scores / T),   p_i = softmax(s_i)

with s_ij = a_i . c_j / temperature, the scores of the contrastive loss.

Shapes: n anchors, K own negatives per anchor.
"""

import torch
from torch import Tensor

from ds_embed.losses.sides import Side, Sums, finish_tile


def distillation_loss(
    side: Side, teacher_scores: Tensor, *, scale: float, weight: float, teacher_temperature: float
) -> Sums:
    """As softmax_loss; teacher_scores (C,) are those of the candidates, each for its own anchor.

    Negatives equal to the positive are left out of both distributions.
    """
    assert side.own.shape[1] > 0, "distillation compares own negatives"
    positive = side.positive_scores(scale)
    own = side.own_block()
    scores = own.scores(scale, None)
    student = torch.cat([positive[:, None], scores], 1)  # (n, 1 + K)
    masked = student == -torch.inf
    teacher = torch.cat([teacher_scores[side.positives][:, None], teacher_scores[side.own]], 1)
    log_teacher = torch.log_softmax((teacher / teacher_temperature).masked_fill(masked, -torch.inf), 1)
    log_student = torch.log_softmax(student, 1)
    target = log_teacher.exp()
    loss = (target * (log_teacher - log_student).masked_fill(masked, 0.0)).sum() * weight
    on_scores = (log_student.exp() - target) * (weight * scale)
    grad_anchors = torch.zeros_like(side.anchors)
    side.add_positive_gradient(on_scores[:, 0], grad_anchors)
    own.add_gradient(on_scores[:, 1:], grad_anchors)
    return finish_tile(side, loss, grad_anchors, positive, scores.amax(1), scale)
