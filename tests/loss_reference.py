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
    directions=("query_document",),
    hardness_weight=0.0,
    false_negative_margin=None,
    matryoshka_dims=(),
    matryoshka_weights=(),
    distillation_weight=0.0,
    distillation_temperature=1.0,
    distillation_loss="kl",
    teacher_scores=None,
    own=None,
    pairs=(),
    guide=None,
    guide_margin=0.0,
    guide_is_relative=False,
    teacher=None,
    teacher_loss="cosine",
    teacher_weight=1.0,
    teacher_temperature=1.0,
    projected=None,
    queries=None,
    texts=None,
):
    """Mean loss over all queries (or some) of the table (queries, positives, hard negatives) of unit vectors.

    own: the documents that are each query's hard negatives (default: as many for each, in order).
    pairs: of a query and a document that is no negative of it, beside what the keys say.
    texts: which of the table's rows are one text (default: none).
    guide, teacher: the table in unit vectors of other models; projected: what the teacher's are compared with.
    """
    if own is None:
        num_hard = (len(table) - 2 * num_queries) // num_queries
        own = [range(num_queries + i * num_hard, num_queries + (i + 1) * num_hard) for i in range(num_queries)]
    options = dict(
        negatives=negatives,
        label_smoothing=label_smoothing,
        symmetric=symmetric,
        directions=directions,
        hardness=hardness_weight,
        margin=false_negative_margin,
        distillation_weight=distillation_weight,
        distillation_temperature=distillation_temperature,
        distillation_loss=distillation_loss,
        teacher=teacher_scores,
        owns=own,
        pairs={tuple(pair) for pair in pairs},
        guide=guide,
        ceiling=lambda p: p - guide_margin * (abs(p) if guide_is_relative else 1),
        batch_teacher=teacher if teacher_loss == "scores" else None,
        teacher_weight=teacher_weight,
        teacher_temperature=teacher_temperature,
        chosen=range(num_queries) if queries is None else queries,
        texts=list(range(len(table)) if texts is None else texts),
    )
    tables = [(1.0, table)]
    if matryoshka_dims:
        tables = [(w, normalize(table[:, :m], dim=1)) for m, w in zip(matryoshka_dims, matryoshka_weights)]
    loss = sum(weight * _one_table(one, keys, num_queries, temperature, **options) for weight, one in tables)
    if teacher is not None and teacher_loss != "scores":
        student = table if projected is None else projected
        cosine = torch.cosine_similarity(student, teacher, dim=1)
        term = 1 - cosine if teacher_loss == "cosine" else (student - teacher).square().sum(1)
        loss = loss + teacher_weight * term.mean()
    return loss


def _one_table(
    table,
    keys,
    num_queries,
    temperature,
    *,
    negatives,
    label_smoothing,
    symmetric,
    directions,
    hardness,
    margin,
    distillation_weight,
    distillation_temperature,
    distillation_loss,
    teacher,
    owns,
    pairs,
    guide,
    ceiling,
    batch_teacher,
    teacher_weight,
    teacher_temperature,
    chosen,
    texts,
):
    queries, documents = table[:num_queries], table[num_queries:]
    losses = []
    for i in chosen:
        own = owns[i]
        visible = {"all": range(len(documents)), "own": [*range(num_queries), *own]}.get(negatives, own)
        score = documents @ queries[i] / temperature
        differs = [j for j in range(len(documents)) if not (keys[j] == keys[i]).any() and (i, j) not in pairs]
        other_queries = [j for j in range(num_queries) if not (keys[j] == keys[i]).any() and (j, i) not in pairs]

        def rivals_of(anchor, candidates):
            """{row: score} of those rows of the table that are rivals of the positive as seen from the row `anchor`."""
            scores = table[candidates] @ table[anchor] / temperature
            near = torch.ones(len(candidates), dtype=bool)
            if margin is not None:
                near &= scores <= score[i] + margin / temperature
            if guide is not None:
                near &= guide[candidates] @ guide[anchor] <= ceiling(guide[i] @ guide[num_queries + i])
            return {row: one for row, one, is_near in zip(candidates, scores, near.tolist()) if is_near}

        found = rivals_of(i, [num_queries + j for j in visible if j in differs])
        weights = {num_queries + j: hardness * cosine for j, cosine in zip(own, (score[own] * temperature).tolist())}
        rivals = [one + weights.get(row, 0.0) for row, one in found.items()]
        own_texts = texts[i], texts[num_queries + i]
        if "document_query" in directions:
            rivals += rivals_of(num_queries + i, other_queries).values()
        siblings = [j for j in differs if j >= num_queries or j in other_queries]
        if "query_query" in directions:
            near = [j for j in siblings if j < num_queries and texts[j] not in own_texts]
            rivals += rivals_of(i, near).values()
        if "document_document" in directions:
            seen = [j for j in siblings if (negatives == "all" or j < num_queries) and j not in own]
            seen = [num_queries + j for j in seen if texts[num_queries + j] not in own_texts]
            rivals += rivals_of(num_queries + i, seen).values()
        if negatives == "pair":
            two_way = [_cross_entropy([score[i], rival], label_smoothing) for rival in rivals]
            loss = sum(two_way, score[i] * 0) / max(1, len(own))
        else:
            loss = _cross_entropy([score[i], *rivals], label_smoothing)
        if symmetric:
            back = rivals_of(num_queries + i, other_queries).values()
            loss = (loss + _cross_entropy([score[i], *back], label_smoothing)) / 2
        if distillation_weight:
            kept = [i, *(j for j in own if j in differs)]
            target, student = teacher[kept] / distillation_temperature, score[kept]
            if distillation_loss == "kl":
                target, student = torch.log_softmax(target, 0), torch.log_softmax(student, 0)
                distilled = (target.exp() * (target - student)).sum()
            else:
                margins = (student[0] - student[1:]) - (target[0] - target[1:])
                distilled = margins.square().sum() / max(1, len(own))
            loss = loss + distillation_weight * distilled
        if batch_teacher is not None:
            target = batch_teacher[num_queries:] @ batch_teacher[i] / teacher_temperature
            kept = [i, *differs]
            target, student = torch.log_softmax(target[kept], 0), torch.log_softmax(score[kept], 0)
            loss = loss + teacher_weight * (target.exp() * (target - student)).sum()
        losses.append(loss)
    return torch.stack(losses).mean()


def _cross_entropy(scores, smoothing):
    """Of the first score among all of them."""
    log_p = torch.log_softmax(torch.stack(scores), 0)
    return -(1 - smoothing) * log_p[0] - smoothing * log_p.mean()


def scored_reference(first, second, scores, loss, temperature):
    """Loss of scored pairs, pair by pair, as CoSENTLoss, AnglELoss and CosineSimilarityLoss of sentence-transformers have it."""
    alike = (first * second).sum(1)
    if loss == "cosine":
        return (alike - scores).square().mean()
    if loss == "angle":
        (a, b), (c, d) = first.chunk(2, 1), second.chunk(2, 1)
        z, w = torch.complex(a, b), torch.complex(c, d)
        alike = (z * w.conj()).sum(1)
        alike = (alike.real + alike.imag).abs()
    terms = [
        (alike[j] - alike[i]) / temperature
        for i in range(len(scores))
        for j in range(len(scores))
        if scores[i] > scores[j]
    ]
    return torch.stack([alike.sum() * 0, *terms]).logsumexp(0)
