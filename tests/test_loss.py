"""The contrastive loss against a few-line reference in float64, for every kind of negatives and any tiling."""

import pytest
import torch

from ds_embed.losses import contrastive_loss


def reference(queries, documents, keys, temperature, negatives):
    """Mean loss over all queries, score by score; autograd gives the gradients."""
    num_queries = queries.shape[0]
    num_hard = documents.shape[0] // num_queries - 1
    losses = []
    for i in range(num_queries):
        own = range(num_queries + i * num_hard, num_queries + (i + 1) * num_hard)
        visible = {
            "all": range(documents.shape[0]),
            "own": [*range(num_queries), *own],
            "pair": own,
        }[negatives]
        score = documents @ queries[i] / temperature
        rivals = [score[j] for j in visible if j != i and not (keys[j] == keys[i]).any()]
        if negatives == "pair":
            masked = num_hard - len(rivals)
            terms = [torch.logsumexp(torch.stack([score[i], r]), 0) - score[i] for r in rivals]
            losses.append(sum(terms, score[i] * 0) / (len(rivals) + masked))
        else:
            losses.append(torch.logsumexp(torch.stack([score[i], *rivals]), 0) - score[i])
    return torch.stack(losses).mean()


def make_batch(num_queries, num_hard, dim=7, seed=0, equal_documents=True):
    generator = torch.Generator().manual_seed(seed)
    unit = lambda n: torch.nn.functional.normalize(  # noqa: E731
        torch.randn(n, dim, generator=generator, dtype=torch.float64), dim=1
    )
    num_documents = num_queries * (1 + num_hard)
    keys = torch.arange(3 * num_documents).view(3, num_documents).T.clone()
    if equal_documents:
        keys[1, 0] = keys[0, 0]  # two queries share a document
        keys[-1, 1] = keys[num_queries - 1, 1]  # an own (or foreign) document equal to a positive
        keys[num_queries // 2, 2] = keys[2, 2]
    return unit(num_queries), unit(num_documents), keys


def run_in_blocks(queries, documents, keys, bounds, **options):
    """The loss as ranks compute it: each a block of queries, sums added up."""
    grad_queries, grad_documents, loss, parts = [], torch.zeros_like(documents), 0.0, []
    for first, last in zip(bounds, bounds[1:]):
        part = contrastive_loss(
            queries[first:last], documents, keys, num_queries=len(queries), first_query=first, **options
        )
        loss += part.loss
        grad_queries.append(part.grad_queries)
        grad_documents += part.grad_documents
        parts.append(part)
    return loss, torch.cat(grad_queries), grad_documents, parts


CASES = [("all", 0), ("all", 3), ("own", 0), ("own", 2), ("pair", 1), ("pair", 3)]


@pytest.mark.parametrize("negatives, num_hard", CASES)
@pytest.mark.parametrize("tiles", [(1024, 8192), (3, 4), (2, 100), (5, 1)])
@pytest.mark.parametrize("equal_documents", [False, True])
def test_equals_reference(negatives, num_hard, tiles, equal_documents):
    queries, documents, keys = make_batch(9, num_hard, equal_documents=equal_documents)
    q, d = queries.clone().requires_grad_(), documents.clone().requires_grad_()
    expected = reference(q, d, keys, 0.05, negatives)
    expected.backward()
    options = dict(temperature=0.05, negatives=negatives, tile_queries=tiles[0], tile_documents=tiles[1])
    for bounds in ([0, 9], [0, 4, 9], [0, 1, 1, 8, 9]):
        loss, grad_queries, grad_documents, _ = run_in_blocks(queries, documents, keys, bounds, **options)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grad_queries, q.grad, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(grad_documents, d.grad, rtol=1e-8, atol=1e-11)


def test_large_scores_do_not_overflow():
    queries, documents, keys = make_batch(6, 1)
    loss, grad_queries, grad_documents, _ = run_in_blocks(
        queries.float(), documents.float(), keys, [0, 6], temperature=1e-4, tile_documents=4
    )
    assert torch.isfinite(loss) and torch.isfinite(grad_queries).all() and torch.isfinite(grad_documents).all()
    expected = reference(queries, documents, keys, 1e-4, "all")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("negatives, num_hard", CASES)
def test_query_whose_every_negative_equals_its_positive_has_no_loss(negatives, num_hard):
    queries, documents, keys = make_batch(4, num_hard, equal_documents=False)
    keys[:, 0] = 1
    loss, grad_queries, grad_documents, parts = run_in_blocks(
        queries, documents, keys, [0, 4], temperature=0.05, negatives=negatives
    )
    assert loss == 0 and not grad_queries.any() and not grad_documents.any()
    assert parts[0].num_with_negatives == 0 and parts[0].negative_similarity == 0 and parts[0].num_correct == 4


def test_statistics():
    queries, documents, keys = make_batch(8, 2, equal_documents=False)
    part = contrastive_loss(queries, documents, keys, num_queries=8, first_query=0, temperature=0.1, tile_documents=5)
    cosine = queries @ documents.T
    positive = cosine.diagonal()
    others = cosine.clone()
    others[torch.arange(8), torch.arange(8)] = -2
    torch.testing.assert_close(part.positive_similarity, positive.sum())
    torch.testing.assert_close(part.negative_similarity, others.max(1).values.sum())
    assert part.num_correct == (positive > others.max(1).values).sum() and part.num_with_negatives == 8
