"""The contrastive step: plan, encode, gather, loss, backward. The batch belongs to the job, not to the rank.

Shapes: N queries, T texts, M = T - N documents, n_r texts of rank r, D dimensions, W ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_embed.config import StepArguments
from ds_embed.data.batch import GlobalBatch, collate
from ds_embed.data.order import key_of
from ds_embed.data.plan import Plan, plan_micro_batches
from ds_embed.data.store import TrainingStore
from ds_embed.distributed import World
from ds_embed.losses import ContrastiveResult, contrastive_loss


@dataclass(frozen=True)
class StepResult:
    """What one step saw; the same on every rank."""

    loss: float  # mean over the N queries
    accuracy: float  # share of queries whose positive scores above every negative
    positive_similarity: float  # mean cosine of query and positive
    negative_similarity: float  # mean cosine of query and its highest-scored negative
    num_tokens: int
    padding_share: float

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(torch.tensor(self.loss)))


class ContrastiveStep:
    """Computes the gradient of a global batch into the engine; the caller then runs engine.step()."""

    def __init__(self, engine: Any, store: TrainingStore, world: World, arguments: StepArguments, seed: int):
        self.engine = engine
        self.store = store
        self.world = world
        self.arguments = arguments
        self.seed = seed
        # ZeRO-0 has no notion of a boundary: each backward averages what has accumulated, and averaging
        # an average again changes nothing, so the sum over micro-batches comes out right.
        self.has_boundary = engine.zero_optimization_stage() > 0

    def run(self, batch: GlobalBatch) -> StepResult:
        """Encode the batch, compute its loss and, when that is finite, its gradient."""
        plan = plan_micro_batches(batch.lengths, self.arguments.micro_batch_tokens, self.world.size)
        inputs = [self._inputs(batch, texts) for texts in plan.micro_batches[self.world.rank]]
        keep_graphs = not self.arguments.grad_cache
        with torch.set_grad_enabled(keep_graphs):
            embeddings = [self._encode(batch, number, item) for number, item in enumerate(inputs)]
        table = self._gather([e.detach() for e in embeddings], plan)
        loss = self._loss(table, batch)
        result = self._summarise(loss, plan, batch)
        if result.is_finite:
            gradients = self._own_gradients(table, loss, plan)
            if keep_graphs:
                self._backward_kept(embeddings, gradients)
            else:
                self._backward_again(batch, inputs, gradients)
        return result

    def _inputs(self, batch: GlobalBatch, texts) -> tuple[Tensor, Tensor, bool, int]:
        """Token ids, lengths, whether there is padding, and the number of real texts (0: a dummy)."""
        ids, lengths = collate(self.store, batch.texts[texts])
        has_padding = bool(lengths.min() < ids.shape[1])
        device = self.world.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device), has_padding, len(texts)

    def _encode(self, batch: GlobalBatch, number: int, item) -> Tensor:
        """Embeddings (b, D) of one micro-batch."""
        ids, lengths, has_padding, num_texts = item
        # Dropout is a pure function of (seed, step, rank, micro-batch): the second pass of grad_cache
        # draws what the first drew, and a resumed run what the interrupted one would have drawn.
        key = key_of(self.seed, batch.first_sample, self.world.rank, number)
        torch.manual_seed(int(key) % 2**63)
        return self.engine(ids, lengths, has_padding)[: max(1, num_texts)]

    def _gather(self, own: list[Tensor], plan: Plan) -> Tensor:
        """The table (T, D) of all embeddings in batch order, on every rank."""
        texts = plan.micro_batches[self.world.rank]
        rows = torch.cat([e[: len(t)] for e, t in zip(own, texts)])
        gathered = self.world.all_gather_rows(rows, plan.rank_counts())
        order = torch.from_numpy(plan.rank_order()).to(gathered.device)
        table = torch.empty_like(gathered)
        table[order] = gathered
        return table

    def _loss(self, table: Tensor, batch: GlobalBatch) -> tuple[ContrastiveResult, int]:
        """Loss of this rank's share of the query rows against all documents."""
        first = batch.num_queries * self.world.rank // self.world.size
        last = batch.num_queries * (self.world.rank + 1) // self.world.size
        result = contrastive_loss(
            table[first:last],
            table[batch.num_queries :],
            torch.from_numpy(batch.document_keys).to(table.device),
            num_queries=batch.num_queries,
            first_query=first,
            temperature=self.arguments.temperature,
            negatives=self.arguments.negatives,
        )
        return result, first

    def _summarise(self, loss: tuple[ContrastiveResult, int], plan: Plan, batch: GlobalBatch) -> StepResult:
        """Add up the ranks' shares, so that all ranks know (and agree on) the loss of the batch."""
        own = loss[0]
        parts = [own.loss, own.num_correct, own.positive_similarity, own.negative_similarity, own.num_with_negatives]
        total, correct, positive, negative, with_negatives = self.world.sum(torch.stack(parts).double().tolist())
        return StepResult(
            loss=total,
            accuracy=correct / batch.num_queries,
            positive_similarity=positive / batch.num_queries,
            negative_similarity=negative / max(1.0, with_negatives),
            num_tokens=plan.num_tokens,
            padding_share=plan.padding_share,
        )

    def _own_gradients(self, table: Tensor, loss: tuple[ContrastiveResult, int], plan: Plan) -> list[Tensor]:
        """Gradient of the batch loss by this rank's embeddings, micro-batch by micro-batch."""
        own, first = loss
        gradient = torch.zeros_like(table)
        num_queries = table.shape[0] - own.grad_documents.shape[0]
        gradient[first : first + own.grad_queries.shape[0]] = own.grad_queries
        gradient[num_queries:] = own.grad_documents
        order = torch.from_numpy(plan.rank_order()).to(table.device)
        rows = self.world.reduce_scatter_rows(gradient[order], plan.rank_counts())
        return list(rows.split([len(texts) for texts in plan.micro_batches[self.world.rank]]))

    def _surrogate(self, embeddings: Tensor, gradient: Tensor) -> Tensor:
        """A scalar whose gradient by the embeddings is `gradient` times W: DeepSpeed divides by W."""
        if gradient.shape[0] == 0:
            return embeddings.sum() * 0.0
        return (embeddings * gradient).sum() * self.world.size

    def _backward_kept(self, embeddings: list[Tensor], gradients: list[Tensor]) -> None:
        # One backward of the sum: one backward per graph is silently wrong under ZeRO-3.
        total = torch.stack([self._surrogate(e, g) for e, g in zip(embeddings, gradients)]).sum()
        if self.has_boundary:
            self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(total, scale_wrt_gas=False)

    def _backward_again(self, batch: GlobalBatch, inputs: list, gradients: list[Tensor]) -> None:
        for number, (item, gradient) in enumerate(zip(inputs, gradients)):
            if self.has_boundary:
                self.engine.set_gradient_accumulation_boundary(number == len(inputs) - 1)
            embeddings = self._encode(batch, number, item)
            self.engine.backward(self._surrogate(embeddings, gradient), scale_wrt_gas=False)
