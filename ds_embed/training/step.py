"""The contrastive step: plan, encode, gather, loss, backward. The batch belongs to the job, not to the rank.

Shapes: N queries, T texts, M = T - N documents, n_r texts of rank r, D dimensions, W ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_embed.data.batch import GlobalBatch, collate
from ds_embed.data.order import key_of
from ds_embed.data.plan import Plan, plan_micro_batches
from ds_embed.data.store import TrainingStore
from ds_embed.job.ranks import World
from ds_embed.losses import LossOptions, LossResult, contrastive_loss
from ds_embed.models.encoder import learned_temperature
from ds_embed.settings import StepArguments
from ds_embed.settings.step_arguments import MIN_LEARNED_TEMPERATURE


@dataclass(frozen=True)
class StepResult:
    """What one step saw; the same on every rank."""

    loss: float  # mean over the N queries
    accuracy: float  # share of queries whose positive scores above every negative
    positive_similarity: float  # mean cosine of query and positive
    negative_similarity: float  # mean cosine of query and its highest-scored negative
    margin: float  # mean of the positive's cosine less that of the highest-scored negative, where there is one
    temperature: float  # that the loss was computed with
    grad_log_scale: float  # of the loss by log(1 / temperature)
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
        self.options = loss_options(arguments)
        # ZeRO-0 has no notion of a boundary: each backward averages what has accumulated, and averaging
        # an average again changes nothing, so the sum over micro-batches comes out right.
        self.has_boundary = engine.zero_optimization_stage() > 0

    def run(self, batch: GlobalBatch) -> StepResult:
        """Encode the batch, compute its loss and, when that is finite, its gradient."""
        plan = plan_micro_batches(batch.lengths, self.arguments.micro_batch_tokens, self.world.size)
        inputs = [self._inputs(batch, texts) for texts in plan.micro_batches[self.world.rank]]
        keep_graphs, last = not self.arguments.grad_cache, len(inputs) - 1
        self.world.mark("encode")
        outputs = []
        for number, item in enumerate(inputs):
            # grad_cache holds one graph at a time; that of the last micro-batch needs no second pass.
            with torch.set_grad_enabled(keep_graphs or number == last):
                outputs.append(self._encode(batch, number, item))
        self.world.mark("gather")
        table = self._gather([vectors.detach() for vectors, _ in outputs], plan)
        temperature = self._temperature(outputs[0][1])
        self.world.mark("loss")
        loss = self._loss(table, batch, temperature)
        result = self._summarise(loss, plan, batch, temperature)
        if result.is_finite:
            self.world.mark("backward")
            rows = self._own_gradients(loss.gradient, plan)
            # The last micro-batch carries the gradient of a learned temperature, the others a zero.
            on_scale = [0.0] * (len(inputs) - 1) + [_temperature_gradient(result)]
            if keep_graphs:
                self._backward_kept(outputs, rows, on_scale)
            else:
                self._backward_again(batch, inputs, outputs, rows, on_scale)
        return result

    def evaluate(self, batch: GlobalBatch, first_query: int) -> tuple[float, float]:
        """The sum of the losses of queries first_query .. N, and how many of them have their positive first.

        No gradient is computed into the engine, which the caller puts into evaluation mode. Same on every rank.
        """
        plan = plan_micro_batches(batch.lengths, self.arguments.micro_batch_tokens, self.world.size)
        micro_batches = enumerate(plan.micro_batches[self.world.rank])
        with torch.no_grad():
            outputs = [self._encode(batch, number, self._inputs(batch, texts)) for number, texts in micro_batches]
        table = self._gather([vectors for vectors, _ in outputs], plan)
        loss, _, correct, *_ = self._sums(self._loss(table, batch, self._temperature(outputs[0][1]), first_query))
        return loss * batch.num_queries, correct

    def _inputs(self, batch: GlobalBatch, texts) -> tuple[Tensor, Tensor, bool, int]:
        """Token ids, lengths, whether there is padding, and the number of real texts (0: a dummy)."""
        ids, lengths = collate(self.store, batch.texts[texts])
        has_padding = bool(lengths.min() < ids.shape[1])
        device = self.world.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device), has_padding, len(texts)

    def _encode(self, batch: GlobalBatch, number: int, item) -> tuple[Tensor, Tensor | None]:
        """Embeddings (b, D) of one micro-batch, and the parameter of a learned temperature."""
        ids, lengths, has_padding, num_texts = item
        # Dropout is a pure function of (seed, step, rank, micro-batch): the second pass of grad_cache
        # draws what the first drew, and a resumed run what the interrupted one would have drawn.
        key = key_of(self.seed, batch.first_sample, self.world.rank, number)
        torch.manual_seed(int(key) % 2**63)
        outputs = self.engine(ids, lengths, has_padding)
        vectors, change = outputs if self.arguments.learnable_temperature else (outputs, None)
        return vectors[: max(1, num_texts)], change

    def _temperature(self, log_scale_change: Tensor | None) -> float:
        initial = self.arguments.temperature
        return initial if log_scale_change is None else learned_temperature(initial, log_scale_change.item())

    def _gather(self, own: list[Tensor], plan: Plan) -> Tensor:
        """The table (T, D) of all embeddings in batch order, on every rank."""
        texts = plan.micro_batches[self.world.rank]
        rows = torch.cat([e[: len(t)] for e, t in zip(own, texts)])
        gathered = self.world.all_gather_rows(rows, plan.rank_counts())
        order = torch.from_numpy(plan.rank_order()).to(gathered.device)
        table = torch.empty_like(gathered)
        table[order] = gathered
        return table

    def _loss(self, table: Tensor, batch: GlobalBatch, temperature: float, first_query: int = 0) -> LossResult:
        """The part of this rank's share of queries first_query .. N (and of their positives) in the loss."""
        num_queries, num_ranks = batch.num_queries - first_query, self.world.size
        return contrastive_loss(
            table,
            torch.from_numpy(batch.document_keys).to(table.device),
            torch.from_numpy(batch.own_negatives).to(table.device),
            num_queries=batch.num_queries,
            first_query=first_query + num_queries * self.world.rank // num_ranks,
            last_query=first_query + num_queries * (self.world.rank + 1) // num_ranks,
            temperature=temperature,
            options=self.options,
            teacher_scores=torch.from_numpy(batch.teacher_scores).to(table.device),
            positive_pairs=torch.from_numpy(batch.positive_pairs).to(table.device),
        )

    def _summarise(self, loss: LossResult, plan: Plan, batch: GlobalBatch, temperature: float) -> StepResult:
        total, on_log_scale, correct, positive, negative, with_negatives, margin = self._sums(loss)
        return StepResult(
            loss=total,
            accuracy=correct / batch.num_queries,
            positive_similarity=positive / batch.num_queries,
            negative_similarity=negative / max(1.0, with_negatives),
            margin=margin / max(1.0, with_negatives),
            temperature=temperature,
            grad_log_scale=on_log_scale,
            num_tokens=plan.num_tokens,
            padding_share=plan.padding_share,
        )

    def _sums(self, loss: LossResult) -> list[float]:
        """Add up the ranks' shares, so that all ranks know (and agree on) the loss of the batch."""
        return self.world.sum(torch.stack(loss.sums.values()).double().tolist())

    def _own_gradients(self, gradient: Tensor, plan: Plan) -> list[Tensor]:
        """Gradient of the batch loss by this rank's embeddings, micro-batch by micro-batch."""
        order = torch.from_numpy(plan.rank_order()).to(gradient.device)
        rows = self.world.reduce_scatter_rows(gradient[order], plan.rank_counts())
        return list(rows.split([len(texts) for texts in plan.micro_batches[self.world.rank]]))

    def _surrogate(self, outputs: tuple[Tensor, Tensor | None], gradient: Tensor, on_scale: float) -> Tensor:
        """A scalar whose gradient by the embeddings is `gradient` times W: DeepSpeed divides by W.

        `on_scale`, the gradient by a learned temperature's parameter, is the same on every rank, so
        that the mean over ranks leaves it as it is.
        """
        embeddings, change = outputs
        if gradient.shape[0] == 0:
            total = embeddings.sum() * 0.0
        else:
            total = (embeddings * gradient).sum() * self.world.size
        return total if change is None else total + change.sum() * on_scale

    def _backward_kept(self, outputs: list, gradients: list[Tensor], on_scale: list[float]) -> None:
        # One backward of the sum: one backward per graph is silently wrong under ZeRO-3.
        total = torch.stack([self._surrogate(*parts) for parts in zip(outputs, gradients, on_scale)]).sum()
        if self.has_boundary:
            self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(total, scale_wrt_gas=False)

    def _backward_again(
        self, batch: GlobalBatch, inputs: list, outputs: list, gradients: list[Tensor], on_scale: list[float]
    ) -> None:
        """The last micro-batch first, which has its graph; then the others, each encoded again."""
        numbers = [len(inputs) - 1, *range(len(inputs) - 1)]
        for number in numbers:
            if self.has_boundary:
                self.engine.set_gradient_accumulation_boundary(number == numbers[-1])
            output = outputs.pop() if number == numbers[0] else self._encode(batch, number, inputs[number])
            self.engine.backward(self._surrogate(output, gradients[number], on_scale[number]), scale_wrt_gas=False)
            del output  # its graph, before the next one grows


def loss_options(arguments: StepArguments) -> LossOptions:
    """The settings of the loss as the losses take them."""
    dims = tuple(arguments.matryoshka_dims)
    return LossOptions(
        negatives=arguments.negatives,
        label_smoothing=arguments.label_smoothing,
        symmetric=arguments.symmetric,
        false_negative_margin=arguments.false_negative_margin,
        matryoshka_dims=dims,
        matryoshka_weights=tuple(arguments.matryoshka_weights or [1.0] * len(dims)),
        distillation_weight=arguments.distillation_weight,
        distillation_temperature=arguments.distillation_temperature,
    )


def _temperature_gradient(result: StepResult) -> float:
    """By the parameter of a learned temperature. At its lower bound, none that would push it further."""
    at_bound = result.temperature <= MIN_LEARNED_TEMPERATURE
    return max(0.0, result.grad_log_scale) if at_bound else result.grad_log_scale
