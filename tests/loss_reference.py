"""The losses score by score in a few lines of float64, for autograd to differentiate."""

import torch
from torch.nn.functional import normalize


def reference(
    table,
    keys,
    num_queries,
    temperature,
    negatives="all",
    label_smoothing=0.0,
    symmetric=False,
    false_negative_margin=None,
    matryoshka_dims=(),
    matryoshka_weights=(),
    distillation_weight=0.0,
    distillation_temperature=1.0,
    teacher_scores=None,
    own=None,
    pairs=(),
):
    """Mean loss over all queries of the table (queries, positives, hard negatives) of unit vectors.

    own: the documents that are each query's hard negatives (default: as many for each, in order).
    pairs: of a query and a document that is no negative of it, beside what the keys say.
    """
    if own is None:
        num_hard = (len(table) - 2 * num_queries) // num_queries
        own = [range(num_queries + i * num_hard, num_queries + (i + 1) * num_hard) for i in range(num_queries)]
    options = dict(
        negatives=negatives,
        label_smoothing=label_smoothing,
        symmetric=symmetric,
        margin=false_negative_margin,
        distillation_weight=distillation_weight,
        distillation_temperature=distillation_temperature,
        teacher=teacher_scores,
        owns=own,
        pairs={tuple(pair) for pair in pairs},
    )
    if not matryoshka_dims:
        return _one_table(table, keys, num_queries, temperature, **options)
    terms = [
        weight * _one_table(normalize(table[:, :m], dim=1), keys, num_queries, temperature, **options)
        for m, weight in zip(matryoshka_dims, matryoshka_weights)
    ]
    return sum(terms)


def _one_table(
    table,
    keys,
    num_queries,
    temperature,
    *,
    negatives,
    label_smoothing,
    symmetric,
    margin,
    distillation_weight,
    distillation_temperature,
    teacher,
    owns,
    pairs,
):
    queries, documents = table[:num_queries], table[num_queries:]
    losses = []
    for i in range(num_queries):
        own = owns[i]
        visible = {"all": range(len(documents)), "own": [*range(num_queries), *own], "pair": own}[negatives]
        score = documents @ queries[i] / temperature
        differs = [j for j in range(len(documents)) if not (keys[j] == keys[i]).any() and (i, j) not in pairs]
        near = margin is None or score <= score[i] + margin / temperature
        rivals = [score[j] for j in visible if j in differs and (near is True or near[j])]
        if negatives == "pair":
            two_way = [_cross_entropy([score[i], rival], label_smoothing) for rival in rivals]
            loss = sum(two_way, score[i] * 0) / max(1, len(own))
        else:
            loss = _cross_entropy([score[i], *rivals], label_smoothing)
        if symmetric:
            back = queries @ documents[i] / temperature
            rivals = [
                back[j]
                for j in range(num_queries)
                if not (keys[j] == keys[i]).any()
                and (j, i) not in pairs
                and (margin is None or back[j] <= back[i] + margin / temperature)
            ]
            loss = (loss + _cross_entropy([back[i], *rivals], label_smoothing)) / 2
        if distillation_weight:
            kept = [i, *(j for j in own if j in differs)]
            target = torch.log_softmax(teacher[kept] / distillation_temperature, 0)
            student = torch.log_softmax(score[kept], 0)
            loss = loss + distillation_weight * (target.exp() * (target - student)).sum()
        losses.append(loss)
    return torch.stack(losses).mean()


def _cross_entropy(scores, smoothing):
    """Of the first score among all of them."""
    log_p = torch.log_softmax(torch.stack(scores), 0)
    return -(1 - smoothing) * log_p[0] - smoothing * log_p.mean()
