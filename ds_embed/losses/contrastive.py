"""The loss of a global batch and its gradient by the table of embeddings, put together from its terms.

For queries q, documents d (positives first, then each query's hard negatives), s = q @ d.T / temperature, and
is_negative[i, j] false where document j equals query i's positive, the plain loss is

    negatives = s.masked_fill(~is_negative, -inf)                 # (N, M)
    positive = s.diagonal()                                       # (N,)
    loss = (logsumexp(cat([positive[:, None], negatives], 1), 1) - positive).mean()

Here it is computed without a score matrix (tiles), with its gradient in closed form (no autograd), and with the
options of LossOptions:

    loss = sum over prefixes m of w_m [ (query_to_document + document_to_query) / 2 + distillation ] + teacher

Prefixes are embeddings of their own (Matryoshka, Kusupati et al. 2022, eq. 1). A guide is another model whose vectors say
which documents are no negatives (GISTEmbed, Solatorio 2024): those above the positive less a margin. A teacher is
another model whose vectors, or whose similarities, are learned.

Shapes: N queries of the batch, n of them in this block, K hard negatives of a query at most, M documents
(N positives, then the hard negatives), T = N + M uses of texts, U distinct texts, D dimensions, J keys per document,
E dimensions of the guide, F of the teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ds_embed.losses.sides import Side, Sums
from ds_embed.losses.terms import batch_distillation_loss, distillation_loss, pair_loss, softmax_loss, vector_loss

# Tiles of the score matrix. 1024 x 8192 float32 scores take 32 MiB, and there are three such buffers.
TILE_QUERIES = 1024
TILE_DOCUMENTS = 8192


@dataclass(frozen=True)
class LossOptions:
    """What a loss is made of.

    negatives: "all" (every document), "own" (all positives and the query's own hard negatives), "hard" (its own hard
    negatives alone) or "pair" (mean over own hard negatives of the two-way softmax against the positive).
    """

    negatives: str = "all"
    label_smoothing: float = 0.0
    symmetric: bool = False  # also each positive against all queries (Radford et al. 2021, fig. 3)
    # Leave out negatives whose cosine is above the positive's by more (Moreira et al. 2024, TopK-MarginPos).
    false_negative_margin: float | None = None
    matryoshka_dims: tuple[int, ...] = ()
    matryoshka_weights: tuple[float, ...] = ()
    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0  # of the teacher's scores
    guide_margin: float = 0.0  # of cosines
    guide_is_relative: bool = False  # the margin is a share of the positive's cosine
    teacher_loss: str = "cosine"  # or "mse" or "scores"; of a teacher's vectors, where there are some
    teacher_weight: float = 1.0
    teacher_temperature: float = 1.0  # of the teacher's cosines
    tile_queries: int = TILE_QUERIES
    tile_documents: int = TILE_DOCUMENTS


class LossResult(NamedTuple):
    """One block's share: sums and gradients of all blocks add up to those of the batch."""

    sums: Sums  # the statistics are those of whole vectors, queries against documents
    gradient: Tensor  # (U, D) by every row of the table

    def plus(self, other: "LossResult") -> "LossResult":
        return LossResult(self.sums.plus(other.sums), self.gradient + other.gradient)

    def times(self, weight: float) -> "LossResult":
        """Of `weight` times the loss; the statistics stay."""
        loss, on_scale = self.sums.loss * weight, self.sums.grad_log_scale * weight
        return LossResult(self.sums._replace(loss=loss, grad_log_scale=on_scale), self.gradient * weight)


def contrastive_loss(
    table: Tensor,
    document_keys: Tensor,
    own_negatives: Tensor,
    *,
    num_queries: int,
    first_query: int,
    last_query: int,
    temperature: float | Tensor,
    options: LossOptions = LossOptions(),
    rows: Tensor | None = None,
    teacher_scores: Tensor | None = None,
    positive_pairs: Tensor | None = None,
    guide: Tensor | None = None,
    teacher: Tensor | None = None,
    projected: int = 0,
) -> LossResult:
    """The share of queries first_query .. last_query in the mean loss of the batch, and its gradient.

    table (U, D): unit vectors; rows (T,): which of them is each of the N queries, then of the M documents (None: they
    stand in this order). document_keys (M, J) integers: document j is equal to query i's positive, and so no negative
    of it, when they agree in any of the J keys, or when (i, j) is among positive_pairs (P, 2). own_negatives (N, K):
    documents that are each query's hard negatives, -1 where it has fewer. teacher_scores (M,), for distillation: each
    document's for its own query. temperature: a number, or a tensor () on the table's device. guide (T, E), teacher (T, F):
    unit vectors of each use by other models. projected: the last F columns of the table, which are (U, D + F) then, are
    what is compared with the teacher's vectors; 0: the vectors themselves. Nothing here waits for a value from the
    device.
    """
    if positive_pairs is None:
        positive_pairs = document_keys.new_empty(0, 2)
    uses = table if rows is None else table[rows]
    gradient = torch.zeros_like(uses)
    add = partial(
        _add_terms,
        keys=document_keys,
        own=own_negatives,
        pairs=positive_pairs,
        block=slice(first_query, last_query),
        scale=1.0 / temperature,
        options=options,
        teacher_scores=teacher_scores,
        guide=guide,
        teacher=teacher if options.teacher_loss == "scores" else None,
    )
    assert len(uses) == num_queries + len(document_keys) and num_queries == len(own_negatives)
    num_dims = uses.shape[1] - projected
    if not options.matryoshka_dims:
        sums = add(uses[:, :num_dims], gradient[:, :num_dims], weight=1.0)
    else:
        sums = Sums.zero(table)
        for dims, weight in sorted(zip(options.matryoshka_dims, options.matryoshka_weights)):
            # Of unit vectors u = x / |x|, a gradient g means (g - (g . u) u) / |x| for x.
            norms = torch.linalg.vector_norm(uses[:, :dims], dim=1, keepdim=True).clamp_min(1e-12)
            prefix = uses[:, :dims] / norms
            grad_prefix = torch.zeros_like(prefix)
            sums = add(prefix, grad_prefix, weight=weight).plus_loss_of(sums)  # the longest one's statistics stay
            radial = (grad_prefix * prefix).sum(1, keepdim=True)
            gradient[:, :dims] += (grad_prefix - radial * prefix) / norms
    if teacher is not None and options.teacher_loss != "scores":
        share = slice(len(uses) * first_query // num_queries, len(uses) * last_query // num_queries)
        columns = slice(num_dims, None) if projected else slice(None)
        weight = options.teacher_weight / len(uses)
        loss, on_vectors = vector_loss(uses[share, columns], teacher[share], kind=options.teacher_loss, weight=weight)
        gradient[share, columns] += on_vectors
        sums = sums._replace(loss=sums.loss + loss)
    if rows is not None:
        gradient = torch.zeros_like(table).index_add_(0, rows, gradient)
    return LossResult(sums, gradient)


def _add_terms(
    uses: Tensor,
    gradient: Tensor,
    *,
    weight: float,
    keys: Tensor,
    own: Tensor,
    pairs: Tensor,
    block: slice,
    scale: float | Tensor,
    options: LossOptions,
    teacher_scores: Tensor | None,
    guide: Tensor | None,
    teacher: Tensor | None,
) -> Sums:
    """Add the gradient by unit vectors `uses` (T, D) to `gradient` (T, D), and return the sums."""
    weight = weight / len(own)
    own_weight = weight / 2 if options.symmetric else weight
    common = dict(
        scale=scale, weight=own_weight, smoothing=options.label_smoothing, margin=options.false_negative_margin
    )
    softmax = partial(softmax_loss, **common, tile_candidates=options.tile_documents)
    term = partial(pair_loss, **common) if options.negatives == "pair" else softmax
    to_documents = partial(_queries_to_documents, own=own, block=block)
    to_queries = partial(_documents_to_queries, num_queries=len(own), block=block)

    def guided(make: Callable[..., Side]) -> Side:
        side = make(uses, gradient, keys, pairs)
        if guide is None:
            return side
        other = make(guide, guide, keys[:, :0], pairs[:0])  # equal documents are left out by the side itself
        positive = other.positive_scores(1.0)
        margin = options.guide_margin * (positive.abs() if options.guide_is_relative else 1.0)
        return replace(side, guide=replace(other, ceiling=positive - margin))

    sums = Sums.zero(uses)
    for tile in guided(partial(to_documents, negatives=options.negatives)).tiles(options.tile_queries):
        sums = sums.plus(term(tile))
    if options.symmetric:
        for tile in guided(to_queries).tiles(options.tile_queries):
            sums = sums.plus_loss_of(softmax(tile))
    if options.distillation_weight:
        for tile in to_documents(uses, gradient, keys, pairs, negatives="own").tiles(options.tile_queries):
            distilled = distillation_loss(
                tile,
                teacher_scores,
                scale=scale,
                weight=weight * options.distillation_weight,
                teacher_temperature=options.distillation_temperature,
            )
            sums = sums.plus_loss_of(distilled)
    if teacher is not None:
        side, other = (
            to_documents(*both, keys, pairs, negatives="all") for both in ((uses, gradient), (teacher, teacher))
        )
        for tile, teaching in zip(side.tiles(options.tile_queries), other.tiles(options.tile_queries)):
            distilled = batch_distillation_loss(
                tile,
                teaching,
                scale=scale,
                weight=weight * options.teacher_weight,
                teacher_temperature=options.teacher_temperature,
                tile_candidates=options.tile_documents,
            )
            sums = sums.plus_loss_of(distilled)
    return sums


def _queries_to_documents(
    uses: Tensor, gradient: Tensor, keys: Tensor, pairs: Tensor, *, own: Tensor, block: slice, negatives: str
) -> Side:
    """The queries of `block` against the documents that `negatives` names."""
    num_queries = len(own)
    return Side(
        anchors=uses[block],
        candidates=uses[num_queries:],
        keys=keys,
        pairs=(pairs[:, 0] - block.start, pairs[:, 1]),
        positives=torch.arange(block.start, block.stop, device=uses.device),
        shared={"all": len(keys), "own": num_queries, "hard": 0, "pair": 0}[negatives],
        # With "all", a query's own hard negatives are among the shared documents.
        own=own[block, : 0 if negatives == "all" else None],
        grad_anchors=gradient[block],
        grad_candidates=gradient[num_queries:],
    )


def _documents_to_queries(
    uses: Tensor, gradient: Tensor, keys: Tensor, pairs: Tensor, *, num_queries: int, block: slice
) -> Side:
    """Each positive of `block` against the N queries; those that it is a positive of are not its negatives."""
    rows = torch.arange(block.start, block.stop, device=uses.device)
    documents = slice(num_queries + block.start, num_queries + block.stop)
    return Side(
        anchors=uses[documents],
        candidates=uses[:num_queries],
        keys=keys[:num_queries],
        pairs=(pairs[:, 1] - block.start, pairs[:, 0]),
        positives=rows,
        shared=num_queries,
        own=rows.new_empty(len(rows), 0),
        grad_anchors=gradient[documents],
        grad_candidates=gradient[:num_queries],
    )
