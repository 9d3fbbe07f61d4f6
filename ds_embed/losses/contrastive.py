"""The loss of a global batch and its gradient by the table of embeddings, put together from its terms.

For queries q, documents d (positives first, then each query's hard negatives), s = q @ d.T / temperature, and
is_negative[i, j] false where document j equals query i's positive, the plain loss is

    negatives = s.masked_fill(~is_negative, -inf)                 # (N, M)
    positive = s.diagonal()                                       # (N,)
    loss = (logsumexp(cat([positive[:, None], negatives], 1), 1) - positive).mean()

Here it is computed without a score matrix (tiles), with its gradient in closed form (no autograd), and with the
options of LossOptions:

    loss = sum over prefixes m of w_m [ (query_to_document + document_to_query) / 2 + distillation ] + teacher

With all directions, the softmax of pair i also holds the scores of its document, and those between texts of one kind (GTE's
improved contrastive loss, Li et al. 2023, sec. 3.1), where j is no false negative:

    Z_i = exp s(q_i, d_i) + sum_j exp s(q_i, d_j) + sum_j exp s(q_j, d_i) + sum_j exp s(q_i, q_j) + sum_j exp s(d_i, d_j)
    loss = mean over i of log Z_i - s(q_i, d_i)

The paper's Z_i has exp s(q_i, d_i) twice; here it is once, so that a pair without negatives has no loss.

Prefixes are embeddings of their own (Matryoshka, Kusupati et al. 2022, eq. 1). A guide is another model whose vectors say
which documents are no negatives (GISTEmbed, Solatorio 2024): those above the positive less a margin. A teacher is
another model whose vectors, or whose similarities, are learned.

Shapes: N queries of the batch, n of them in this block, K hard negatives of a query at most, M documents
(N positives, then the hard negatives), T = N + M uses of texts, U distinct texts, D dimensions, J keys per document,
E dimensions of the guide, F of the teacher.
"""

from collections.abc import Iterable
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
    # Also each positive against all queries, in a softmax of its own (Radford et al. 2021, fig. 3).
    symmetric: bool = False
    # What is in the one softmax of a pair. document_document leaves out the query's own hard negatives, whose likeness to its
    # positive is the reason why they were chosen.
    directions: tuple[str, ...] = ("query_document",)  # or also document_query, query_query, document_document
    hardness_weight: float = 0.0  # of a query's own hard negatives; see terms.py
    # Leave out negatives whose cosine is above the positive's by more (Moreira et al. 2024, TopK-MarginPos).
    false_negative_margin: float | None = None
    matryoshka_dims: tuple[int, ...] = ()
    matryoshka_weights: tuple[float, ...] = ()
    distillation_weight: float = 0.0
    distillation_loss: str = "kl"  # or "margin_mse"
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
        texts=torch.arange(len(uses), device=uses.device) if rows is None else rows,
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
    texts: Tensor,
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
        scale=scale,
        weight=own_weight,
        smoothing=options.label_smoothing,
        margin=options.false_negative_margin,
        hardness=options.hardness_weight,
    )
    softmax = partial(softmax_loss, **common, tile_candidates=options.tile_documents)
    term = partial(pair_loss, **common) if options.negatives == "pair" else softmax
    to_documents = partial(_queries_to_documents, own=own, block=block)
    same_kind = partial(_same_kind, texts=texts, own=own, block=block)
    visible = len(keys) if options.negatives == "all" else len(own)
    make = {
        "query_document": partial(to_documents, negatives=options.negatives, weighted=options.hardness_weight > 0),
        "document_query": partial(_documents_to_queries, num_queries=len(own), block=block),
        "query_query": partial(same_kind, candidates=slice(0, len(own))),
        "document_document": partial(same_kind, candidates=slice(len(own), len(own) + visible)),
    }
    if guide is not None:
        positive = make["query_document"](guide, guide, keys, pairs).positive_scores(1.0)
        ceiling = positive - options.guide_margin * (positive.abs() if options.guide_is_relative else 1.0)

    def tiles_of(*directions: str) -> Iterable[tuple[Side, ...]]:
        sides = [make[one](uses, gradient, keys, pairs) for one in directions]
        if guide is not None:  # equal documents are left out by the side itself
            guides = [make[one](guide, guide, keys[:, :0], pairs[:0]) for one in directions]
            sides = [replace(one, guide=replace(other, ceiling=ceiling)) for one, other in zip(sides, guides)]
        return zip(*(one.tiles(options.tile_queries) for one in sides))

    sums = Sums.zero(uses)
    for tiles in tiles_of(*options.directions):
        sums = sums.plus(term(*tiles))
    if options.symmetric:
        for tiles in tiles_of("document_query"):
            sums = sums.plus_loss_of(softmax(*tiles))
    if options.distillation_weight:
        for tile in to_documents(uses, gradient, keys, pairs, negatives="own").tiles(options.tile_queries):
            distilled = distillation_loss(
                tile,
                teacher_scores,
                scale=scale,
                weight=weight * options.distillation_weight,
                teacher_temperature=options.distillation_temperature,
                kind=options.distillation_loss,
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
    uses: Tensor,
    gradient: Tensor,
    keys: Tensor,
    pairs: Tensor,
    *,
    own: Tensor,
    block: slice,
    negatives: str,
    weighted: bool = False,
) -> Side:
    """The queries of `block` against the documents that `negatives` names.

    With "all", a query's own hard negatives are among the shared documents, unless they are `weighted`.
    """
    num_queries = len(own)
    is_shared = negatives == "all" and not weighted
    if weighted and negatives == "all":
        pairs = torch.cat([pairs, _own_pairs(own, block)])
    return Side(
        anchors=uses[block],
        candidates=uses[num_queries:],
        keys=keys,
        anchor_keys=keys[block],
        pairs=(pairs[:, 0] - block.start, pairs[:, 1]),
        positives=torch.arange(block.start, block.stop, device=uses.device),
        shared={"all": len(keys), "own": num_queries, "hard": 0, "pair": 0}[negatives],
        own=own[block, : 0 if is_shared else None],
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
        anchor_keys=keys[block],
        pairs=(pairs[:, 1] - block.start, pairs[:, 0]),
        positives=rows,
        shared=num_queries,
        own=rows.new_empty(len(rows), 0),
        grad_anchors=gradient[documents],
        grad_candidates=gradient[:num_queries],
    )


def _same_kind(
    uses: Tensor,
    gradient: Tensor,
    keys: Tensor,
    pairs: Tensor,
    *,
    texts: Tensor,
    own: Tensor,
    block: slice,
    candidates: slice,
) -> Side:
    """The queries, or the positives, of `block` against `candidates` among the uses: all queries, or documents.

    Two queries with one positive, in any record, are not each other's negatives, and no more are two positives of one query. Nor
    is what is the same text, by texts (T,), as the query or the positive of `block`.
    """
    num_queries, rows = len(own), torch.arange(block.start, block.stop, device=uses.device)
    pairs = torch.cat([pairs, pairs.flip(1)] + [_own_pairs(own, block)] * (candidates.start > 0))
    anchors = slice(candidates.start + block.start, candidates.start + block.stop)
    positives = slice(num_queries + block.start, num_queries + block.stop)
    own_texts = torch.stack([texts[block], texts[positives]], 1)
    number = candidates.stop - candidates.start
    return Side(
        anchors=uses[anchors],
        candidates=uses[candidates],
        keys=torch.cat([keys[:number], texts[candidates, None].expand(-1, 2)], 1),
        anchor_keys=torch.cat([keys[block], own_texts], 1),
        pairs=(pairs[:, 0] - block.start, pairs[:, 1]),
        positives=rows,
        shared=number,
        own=rows.new_empty(len(rows), 0),
        grad_anchors=gradient[anchors],
        grad_candidates=gradient[candidates],
    )


def _own_pairs(own: Tensor, block: slice) -> Tensor:
    """Pairs (n K, 2) of a query of `block` and a hard negative of it; -1 where there is none."""
    queries = torch.arange(block.start, block.stop, device=own.device)[:, None].expand(-1, own.shape[1])
    return torch.stack([queries, own[block]], 2).flatten(0, 1)
