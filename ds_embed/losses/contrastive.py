"""Contrastive losses of a block of queries against the documents of the global batch, in tiles.

InfoNCE (van den Oord et al. 2018, eq. 4) with in-batch negatives (Karpukhin et al. 2020, eq. 2):

    loss_i = -log( exp(s_ip) / (exp(s_ip) + sum_j exp(s_ij)) ),   s_ij = q_i . d_j / temperature

with p the positive of query i and j its negatives. Documents equal to the positive never count as negatives.

Shapes: N queries of the batch, n of them in this block, K hard negatives per query, M = N + N K documents
(N positives, then the hard negatives query by query), D dimensions, J keys per document.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Tiles of the score matrix. 1024 x 8192 float32 scores take 32 MiB, and there are three such buffers.
TILE_QUERIES = 1024
TILE_DOCUMENTS = 8192


@dataclass
class ContrastiveResult:
    """Sums over the n queries of the block; the caller adds blocks up.

    `loss` is already divided by N, so that the blocks' losses and gradients add up to those of the mean.
    """

    loss: Tensor  # ()
    grad_queries: Tensor  # (n, D)
    grad_documents: Tensor  # (M, D)
    num_correct: Tensor  # () queries whose positive scores above every negative
    positive_similarity: Tensor  # () sum of q_i . d_p
    negative_similarity: Tensor  # () sum of the highest q_i . d_j, over the queries that have a negative
    num_with_negatives: Tensor  # ()


def contrastive_loss(
    queries: Tensor,
    documents: Tensor,
    document_keys: Tensor,
    *,
    num_queries: int,
    first_query: int,
    temperature: float,
    negatives: str = "all",
    tile_queries: int = TILE_QUERIES,
    tile_documents: int = TILE_DOCUMENTS,
) -> ContrastiveResult:
    """Loss of queries first_query .. first_query + n of the batch, and its gradients by every input row.

    queries (n, D), documents (M, D), document_keys (M, J) integers: document j is equal to the
    positive of query i, and so no negative of it, when they agree in any of the J keys.
    negatives: "all" (every document), "own" (all positives and the query's own hard negatives) or
    "pair" (mean over own hard negatives of the two-way softmax against the positive).
    The full score matrix never exists: scores are recomputed for the gradient, tile by tile.
    """
    n, num_documents = queries.shape[0], documents.shape[0]
    num_hard = num_documents // num_queries - 1
    assert num_documents == num_queries * (1 + num_hard) and first_query + n <= num_queries
    block = _Block(
        documents=documents,
        keys=document_keys,
        scale=1.0 / temperature,
        shared=num_documents if negatives == "all" else num_queries if negatives == "own" else 0,
        num_queries=num_queries,
        num_hard=0 if negatives == "all" else num_hard,
        pairwise=negatives == "pair",
        tile_documents=tile_documents,
        grad_documents=torch.zeros_like(documents),
    )
    grad_queries = torch.empty_like(queries)
    sums = queries.new_zeros(5)
    for start in range(0, n, tile_queries):
        stop = min(start + tile_queries, n)
        rows = torch.arange(first_query + start, first_query + stop, device=queries.device)
        grad_queries[start:stop], tile_sums = block.tile(queries[start:stop], rows)
        sums += tile_sums
    return ContrastiveResult(sums[0], grad_queries, block.grad_documents, *sums[1:])


@dataclass
class _Block:
    """What all query tiles share, and the document gradient that they add to."""

    documents: Tensor
    keys: Tensor
    scale: float
    shared: int  # the first `shared` documents are scored against every query
    num_queries: int
    num_hard: int  # own hard negatives, scored against their own query only
    pairwise: bool
    tile_documents: int
    grad_documents: Tensor

    def tile(self, queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient by `queries` (t, D), batch rows `rows` (t,), and the five sums of ContrastiveResult."""
        positive = self.documents[rows]
        positive_score = (queries * positive).sum(1) * self.scale
        own_score, own = self._own_scores(queries, rows)
        spans = [
            slice(start, min(start + self.tile_documents, self.shared))
            for start in range(0, self.shared, self.tile_documents)
        ]
        log_sum = torch.full_like(positive_score, -torch.inf)
        highest = torch.full_like(positive_score, -torch.inf)
        kept = None
        for span in spans:
            score = self._shared_scores(queries, rows, span)
            highest = torch.maximum(highest, score.amax(1))
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(score, 1))
            kept = score if len(spans) == 1 else None
        if own_score.shape[1]:
            highest = torch.maximum(highest, own_score.amax(1))

        if self.pairwise:
            difference = own_score - positive_score[:, None]
            loss = torch.nn.functional.softplus(difference).mean(1)
            own_weight = torch.sigmoid(difference) / self.num_hard
            positive_weight = -own_weight.sum(1)
        else:
            if own_score.shape[1]:
                log_sum = torch.logaddexp(log_sum, torch.logsumexp(own_score, 1))
            loss = torch.nn.functional.softplus(log_sum - positive_score)
            positive_weight = -torch.sigmoid(log_sum - positive_score)
            log_total = torch.logaddexp(log_sum, positive_score)
            own_weight = torch.exp(own_score - log_total[:, None])

        # d loss / d score, with the 1/N of the mean and the 1/temperature of the score folded in.
        factor = self.scale / self.num_queries
        positive_weight = (positive_weight * factor)[:, None]
        grad_queries = positive_weight * positive
        self.grad_documents.index_add_(0, rows, positive_weight * queries)
        for span in spans:
            score = kept if kept is not None else self._shared_scores(queries, rows, span)
            weight = score.sub_(log_total[:, None]).exp_().mul_(factor)
            grad_queries.addmm_(weight, self.documents[span])
            self.grad_documents[span].addmm_(weight.T, queries)
        if own_score.shape[1]:
            own_weight = own_weight * factor
            grad_queries += torch.einsum("tk,tkd->td", own_weight, own)
            own_rows = self._own_rows(rows).flatten()
            grad_own = own_weight[:, :, None] * queries[:, None, :]
            self.grad_documents.index_add_(0, own_rows, grad_own.flatten(0, 1))

        has_negatives = highest > -torch.inf
        sums = torch.stack(
            [
                loss.sum() / self.num_queries,
                (positive_score > highest).sum().to(loss),
                positive_score.sum() / self.scale,
                highest[has_negatives].sum() / self.scale,
                has_negatives.sum().to(loss),
            ]
        )
        return grad_queries, sums

    def _shared_scores(self, queries: Tensor, rows: Tensor, span: slice) -> Tensor:
        score = queries @ self.documents[span].T
        score *= self.scale
        for key in self.keys.T:  # J is 2 or 3; no (t, M, J) buffer
            score.masked_fill_(key[rows][:, None] == key[None, span], -torch.inf)
        return score

    def _own_rows(self, rows: Tensor) -> Tensor:
        """Document rows (t, K) of the queries' own hard negatives."""
        offsets = torch.arange(self.num_hard, device=rows.device)
        return self.num_queries + rows[:, None] * self.num_hard + offsets

    def _own_scores(self, queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        own_rows = self._own_rows(rows)
        own = self.documents[own_rows]
        score = torch.einsum("td,tkd->tk", queries, own) * self.scale
        equal = (self.keys[own_rows] == self.keys[rows][:, None, :]).any(2)
        return score.masked_fill(equal, -torch.inf), own
