"""The loss of a global batch, put together from its parts, and its gradient by the table of embeddings.

    loss = sum over prefixes m of w_m [ (query_to_document + document_to_query) / 2 + distillation ]

where everything but query_to_document is there only when asked for. A document equal to a query's positive
never counts as its negative, in either direction.

Shapes: N queries of the batch, n of them in this block, K hard negatives of a query at most, M documents
(N positives, then the hard negatives), T = N + M texts, D dimensions, J keys per document.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ds_embed.losses.distillation import distillation_loss
from ds_embed.losses.matryoshka import add_prefix_gradient, prefix_of
from ds_embed.losses.pairwise import pair_loss
from ds_embed.losses.sides import Side, Sums
from ds_embed.losses.softmax import softmax_loss

# Tiles of the score matrix. 1024 x 8192 float32 scores take 32 MiB, and there are three such buffers.
TILE_QUERIES = 1024
TILE_DOCUMENTS = 8192


@dataclass(frozen=True)
class LossOptions:
    """What a loss is made of.

    negatives: "all" (every document), "own" (all positives and the query's own hard negatives) or
    "pair" (mean over own hard negatives of the two-way softmax against the positive).
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
    tile_queries: int = TILE_QUERIES
    tile_documents: int = TILE_DOCUMENTS


@dataclass
class LossResult:
    """One block's share: losses, gradients and sums of all blocks add up to those of the batch.

    `sums` holds the loss, the gradient by log(1 / temperature), and for the whole vectors, queries
    against documents, what Sums says.
    """

    sums: Sums
    gradient: Tensor  # (T, D) by every row of the table


def contrastive_loss(
    table: Tensor,
    document_keys: Tensor,
    own_negatives: Tensor,
    *,
    num_queries: int,
    first_query: int,
    last_query: int,
    temperature: float,
    options: LossOptions = LossOptions(),
    teacher_scores: Tensor | None = None,
    positive_pairs: Tensor | None = None,
) -> LossResult:
    """The share of queries first_query .. last_query in the mean loss of the batch, and its gradient.

    table (T, D): unit vectors of the N queries, then of the M documents. document_keys (M, J)
    integers: document j is equal to query i's positive, and so no negative of it, when they agree in
    any of the J keys, or when (i, j) is among positive_pairs (P, 2). own_negatives (N, K): documents that
    are each query's hard negatives, -1 where it has fewer.
    teacher_scores (M,), for distillation: each document's for its own query.
    """
    if positive_pairs is None:
        positive_pairs = document_keys.new_empty(0, 2)
    add = partial(
        _add_loss,
        keys=document_keys,
        own=own_negatives,
        pairs=positive_pairs,
        num_queries=num_queries,
        block=slice(first_query, last_query),
        scale=1.0 / temperature,
        options=options,
        teacher_scores=teacher_scores,
    )
    gradient = torch.zeros_like(table)
    if not options.matryoshka_dims:
        return LossResult(add(table, gradient, weight=1.0), gradient)
    sums = Sums.zero(table)
    # The longest prefix last: the statistics are those of the whole vectors.
    for dims, weight in sorted(zip(options.matryoshka_dims, options.matryoshka_weights)):
        prefix, norms = prefix_of(table, dims)
        grad_prefix = torch.zeros_like(prefix)
        sums = _add_losses(add(prefix, grad_prefix, weight=weight), sums)
        add_prefix_gradient(gradient, prefix, norms, grad_prefix)
    return LossResult(sums, gradient)


def _add_loss(
    table: Tensor,
    gradient: Tensor,
    *,
    weight: float,
    keys: Tensor,
    own: Tensor,
    pairs: Tensor,
    num_queries: int,
    block: slice,
    scale: float,
    options: LossOptions,
    teacher_scores: Tensor | None,
) -> Sums:
    """Add the gradient of one table of unit vectors to `gradient`, of the same shape, and return the sums."""
    weight = weight / num_queries
    own_weight = weight / 2 if options.symmetric else weight
    common = dict(scale=scale, smoothing=options.label_smoothing, margin=options.false_negative_margin)
    softmax = partial(softmax_loss, **common, tile_candidates=options.tile_documents)
    to_documents = partial(_queries_to_documents, table, gradient, keys, own, pairs, num_queries, block)
    side = to_documents(options.negatives)
    sums = Sums.zero(table)
    for tile in side.tiles(options.tile_queries):
        if options.negatives == "pair":
            sums += pair_loss(tile, **common, weight=own_weight)
        else:
            sums += softmax(tile, weight=own_weight)
    if options.symmetric:
        side = _documents_to_queries(table, gradient, keys, pairs, num_queries, block)
        for tile in side.tiles(options.tile_queries):
            sums = _add_losses(sums, softmax(tile, weight=own_weight))
    if options.distillation_weight:
        for tile in to_documents("own").tiles(options.tile_queries):
            distilled = distillation_loss(
                tile,
                teacher_scores,
                scale=scale,
                weight=weight * options.distillation_weight,
                teacher_temperature=options.distillation_temperature,
            )
            sums = _add_losses(sums, distilled)
    return sums


def _queries_to_documents(
    table: Tensor,
    gradient: Tensor,
    keys: Tensor,
    own: Tensor,
    pairs: Tensor,
    num_queries: int,
    block: slice,
    negatives: str,
) -> Side:
    num_documents = len(table) - num_queries
    assert num_documents == len(keys) and num_queries == len(own)
    return Side(
        anchors=table[block],
        candidates=table[num_queries:],
        keys=keys,
        pairs=(pairs[:, 0] - block.start, pairs[:, 1]),
        positives=torch.arange(block.start, block.stop, device=table.device),
        shared={"all": num_documents, "own": num_queries, "pair": 0}[negatives],
        # With "all", a query's own hard negatives are among the shared documents.
        own=own[block, : 0 if negatives == "all" else None],
        grad_anchors=gradient[block],
        grad_candidates=gradient[num_queries:],
    )


def _documents_to_queries(
    table: Tensor, gradient: Tensor, keys: Tensor, pairs: Tensor, num_queries: int, block: slice
) -> Side:
    """Each positive against the N queries; those that it is a positive of are not its negatives."""
    rows = torch.arange(block.start, block.stop, device=table.device)
    documents = slice(num_queries + block.start, num_queries + block.stop)
    return Side(
        anchors=table[documents],
        candidates=table[:num_queries],
        keys=keys[:num_queries],
        pairs=(pairs[:, 1] - block.start, pairs[:, 0]),
        positives=rows,
        shared=num_queries,
        own=rows.new_empty(len(rows), 0),
        grad_anchors=gradient[documents],
        grad_candidates=gradient[:num_queries],
    )


def _add_losses(sums: Sums, other: Sums) -> Sums:
    """`sums` with the other's loss and gradient added, and its statistics left as they are."""
    sums.loss = sums.loss + other.loss
    sums.grad_log_scale = sums.grad_log_scale + other.grad_log_scale
    return sums
