"""Losses of a reranker: of each query's group, which is its positive and its hard negatives.

    listwise   -log softmax(s)[positive]                                 (Nogueira et al. 2020; Gao et al. 2021)
    bce        mean over the group of softplus(s) - y s, y 1 for the positive
    kl         KL(softmax(t / T) || softmax(s)), t a teacher's scores    (Hinton et al. 2015)

Each is averaged over the queries. Shapes: N queries, n of them in this block, K hard negatives at most, M documents.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ds_embed.losses.contrastive import LossResult
from ds_embed.losses.sides import Sums


def rerank_loss(
    scores: Tensor,
    own_negatives: Tensor,
    teacher_scores: Tensor,
    *,
    first_query: int,
    last_query: int,
    loss: str,
    teacher_temperature: float = 1.0,
) -> LossResult:
    """The share of queries first_query .. last_query in the mean loss of the N, and its gradient (M, 1).

    scores (M, 1): document i is query i's positive for i < N; own_negatives (N, K) documents, -1 where there are
    fewer; teacher_scores (M,).
    """
    queries = torch.arange(first_query, last_query, device=scores.device)
    group = torch.cat([queries[:, None], own_negatives[first_query:last_query]], 1)
    is_there = group >= 0
    group = group.clamp_min(0)
    own = scores.double().squeeze(1)[group]
    masked = own.masked_fill(~is_there, -torch.inf)
    target = torch.zeros_like(own)
    target[:, 0] = 1
    if loss == "bce":
        sizes = is_there.sum(1, keepdim=True)
        losses = torch.where(is_there, softplus(own) - target * own, 0).div(sizes).sum(1)
        on_scores = torch.where(is_there, own.sigmoid() - target, 0).div(sizes)
    else:
        if loss == "kl":
            teacher = teacher_scores.double()[group] / teacher_temperature
            target = teacher.masked_fill(~is_there, -torch.inf).softmax(1)
        log_shares = masked.log_softmax(1)
        losses = torch.special.xlogy(target, target).sum(1) - torch.where(is_there, target * log_shares, 0).sum(1)
        on_scores = log_shares.exp() - target
    on_scores = torch.where(is_there, on_scores, 0) / len(own_negatives)
    gradient = torch.zeros_like(scores, dtype=torch.float64)
    gradient.index_add_(0, group.flatten(), on_scores.flatten()[:, None])
    has_negatives = is_there[:, 1:].any(1)
    best = (
        torch.where(has_negatives, masked[:, 1:].max(1).values, 0) if group.shape[1] > 1 else torch.zeros_like(losses)
    )
    sums = Sums(
        loss=losses.sum() / len(own_negatives),
        grad_log_scale=torch.zeros_like(losses).sum(),
        num_correct=(own[:, 0] > torch.where(has_negatives, best, -torch.inf)).sum().double(),
        positive_similarity=own[:, 0].sum(),
        negative_similarity=best.sum(),
        num_with_negatives=has_negatives.sum().double(),
        margin=torch.where(has_negatives, own[:, 0] - best, 0).sum(),
    )
    return LossResult(sums, gradient.to(scores.dtype))
