"""The contrastive step: plan, encode, gather, loss, backward. The batch belongs to the job, not to the rank.

The host waits for the device once, between loss and backward, when the ranks tell each other their shares.

Shapes: N queries, T uses of texts, U distinct texts, n_r texts of rank r, D dimensions, W ranks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ds_embed.data.batch import GlobalBatch, Group, collate, collate_prompts
from ds_embed.data.store import TrainingStore
from ds_embed.job.ranks import World
from ds_embed.losses import LossOptions, LossResult, Sums, contrastive_loss
from ds_embed.losses.scored import scored_loss
from ds_embed.models.encoder import learned_temperature
from ds_embed.settings import StepArguments
from ds_embed.settings.step_arguments import MIN_LEARNED_TEMPERATURE
from ds_embed.training.inputs import MicroBatch, StepInputs, prepare_inputs
from ds_embed.training.stored_vectors import StoredVectors


@dataclass(frozen=True)
class StepResult:
    """What one step saw; the same on every rank."""

    loss: float  # mean over the N queries and the scored pairs, each of which has the loss of its file's
    # Of the N queries; nan where there are none.
    accuracy: float  # share of queries whose positive scores above every negative
    positive_similarity: float  # mean cosine of query and positive
    negative_similarity: float  # mean cosine of query and its highest-scored negative
    margin: float  # mean of the positive's cosine less that of the highest-scored negative, where there is one
    without_negatives: float  # share of queries that no document was a negative of
    temperature: float  # that the loss was computed with
    grad_log_scale: float  # of the loss by log(1 / temperature)
    num_tokens: int  # of the T uses
    num_tokens_encoded: int  # of the U distinct texts
    padding_share: float
    told: tuple[float, ...] = ()  # the largest over the ranks of what each gave to run()

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss)


class ContrastiveStep:
    """Computes the gradient of a global batch into the engine; the caller then runs engine.step()."""

    def __init__(
        self,
        engine: Any,
        store: TrainingStore,
        world: World,
        arguments: StepArguments,
        seed: int,
        vectors: Mapping[str, StoredVectors] = MappingProxyType({}),
    ):
        """vectors: those of a "guide" and a "teacher"."""
        self.engine = engine
        self.store = store
        self.world = world
        self.arguments = arguments
        self.seed = seed
        self.vectors = vectors
        self.is_packed = engine.module.is_packed
        # Of each file that has its own, and of all others.
        num_files = len(store.file_sizes)
        modes = arguments.negatives_per_file or [arguments.negatives] * num_files
        self.options = [loss_options(arguments, negatives) for negatives in (*modes, arguments.negatives)]
        self.temperatures = [*(arguments.temperature_per_file or [None] * num_files), None]
        # ZeRO-0 has no notion of a boundary: each backward averages what has accumulated, and averaging
        # an average again changes nothing, so the sum over micro-batches comes out right.
        self.has_boundary = engine.zero_optimization_stage() > 0

    def prepare(self, batch: GlobalBatch) -> StepInputs:
        """Move 1, the plan, and the texts on this rank's device. It may run in a thread."""
        tokens = self.arguments.micro_batch_tokens
        return prepare_inputs(batch, self._collate, self.world, tokens, self.seed, self.vectors, self.is_packed)

    def _collate(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        return *collate(self.store, texts, self.is_packed), collate_prompts(self.store, texts)

    def run(self, inputs: StepInputs, tell: Sequence[float] = ()) -> StepResult:
        """Encode the batch, compute its loss and, when that is finite, its gradient.

        tell: numbers of this rank whose largest over all ranks the result holds, at no cost.
        """
        micro_batches, keep_graphs = inputs.micro_batches, not self.arguments.grad_cache
        self.world.mark("encode")
        outputs = []
        for micro_batch in micro_batches:
            # grad_cache holds one graph at a time; that of the last micro-batch needs no second pass.
            with torch.set_grad_enabled(keep_graphs or micro_batch is micro_batches[-1]):
                outputs.append(self._encode(micro_batch))
        self.world.mark("gather")
        table = self._gather([vectors.detach() for vectors, _ in outputs], inputs)
        self.world.mark("loss")
        temperature = self._temperature(table, outputs[0][1])
        loss = self._loss(table, inputs, temperature)
        result = self._summarise(loss, inputs, temperature, tell)
        if result.is_finite:
            self.world.mark("backward")
            rows = self._own_gradients(loss.gradient, inputs)
            # The last micro-batch carries the gradient of a learned temperature, the others a zero.
            on_scale = [0.0] * (len(micro_batches) - 1) + [_temperature_gradient(result)]
            if keep_graphs:
                self._backward_kept(outputs, rows, on_scale)
            else:
                self._backward_again(micro_batches, outputs, rows, on_scale)
        return result

    def evaluate(self, inputs: StepInputs, first_query: int) -> tuple[float, float]:
        """The sum of the losses of queries first_query .. N, and how many of them have their positive first.

        No gradient is computed into the engine, which the caller puts into evaluation mode. Same on every rank.
        """
        with torch.no_grad():
            outputs = [self._encode(micro_batch) for micro_batch in inputs.micro_batches]
        table = self._gather([vectors for vectors, _ in outputs], inputs)
        loss = self._loss(table, inputs, self._temperature(table, outputs[0][1]), first_query)
        sums = Sums(*map(sum, zip(*self._tell_all(torch.stack(loss.sums)))))
        return sums.loss * inputs.batch.num_queries, sums.num_correct

    def similarities(self, inputs: StepInputs) -> list[float]:
        """The cosines of the batch's P scored pairs, on every rank."""
        with torch.no_grad():
            outputs = [self._encode(micro_batch) for micro_batch in inputs.micro_batches]
        first, second = self._gather([vectors for vectors, _ in outputs], inputs)[self._pair_rows(inputs)]
        return (first * second).sum(1).tolist()

    def _encode(self, micro_batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Embeddings (b, D) of one micro-batch, and the parameter of a learned temperature."""
        torch.manual_seed(micro_batch.noise_seed)
        outputs = self.engine(*micro_batch.arguments)
        vectors, change = outputs if self.arguments.learnable_temperature else (outputs, None)
        return vectors[: max(1, micro_batch.num_texts)], change

    def _temperature(self, table: Tensor, log_scale_change: Tensor | None) -> Tensor:
        """The temperature (), on the table's device."""
        initial = self.arguments.temperature
        if log_scale_change is None:
            return torch.full((), initial, dtype=torch.float64, device=table.device)
        return learned_temperature(initial, log_scale_change.detach().squeeze())

    def _gather(self, own: list[Tensor], inputs: StepInputs) -> Tensor:
        """The table (U, D) of the embeddings of all distinct texts, in batch order, on every rank."""
        rows = torch.cat([vectors[: m.num_texts] for vectors, m in zip(own, inputs.micro_batches)])
        gathered = self.world.all_gather_rows(rows, inputs.plan.rank_counts())
        return torch.empty_like(gathered).index_copy_(0, inputs.rank_order, gathered)

    def _loss(self, table: Tensor, inputs: StepInputs, temperature: Tensor, first_query: int = 0) -> LossResult:
        """The part of this rank's share of queries first_query .. N (and of their positives) in the loss."""
        batch, options, projected = inputs.batch, self.options[-1], self._projected(inputs)
        num_samples = len(batch.records)
        result = LossResult(Sums.zero(table), torch.zeros_like(table))
        first, last = self._share(first_query, batch.num_queries)
        found = {"guide": inputs.guide, "teacher": inputs.teacher}
        models = {name: normalize(vectors, dim=1) for name, vectors in found.items() if vectors is not None}
        for group in batch.groups:
            start, stop = max(first, group.start), min(last, group.stop)
            if start < stop:
                result = result.plus(self._contrastive(table, inputs, models, temperature, group, start, stop))
        if batch.num_queries < num_samples:
            result = result.times(batch.num_queries / num_samples)
        for file, start, stop, _ in batch.scored_groups:
            scored = scored_loss(
                table[:, : table.shape[1] - projected],
                self._pair_rows(inputs)[:, start:stop],
                inputs.pair_scores[start:stop],
                slice(*self._share(0, stop - start)),
                loss=self.arguments.pair_loss,
                temperature=self.temperatures[file] or self.arguments.pair_temperature,
                weight=(stop - start) / num_samples,
                matryoshka_dims=options.matryoshka_dims,
                matryoshka_weights=options.matryoshka_weights,
            )
            result = result.plus(scored._replace(gradient=pad(scored.gradient, (0, projected))))
        return result

    def _share(self, first: int, last: int) -> tuple[int, int]:
        """This rank's of the numbers first .. last."""
        rank, num_ranks = self.world.rank, self.world.size
        return first + (last - first) * rank // num_ranks, first + (last - first) * (rank + 1) // num_ranks

    def _pair_rows(self, inputs: StepInputs) -> Tensor:
        """Rows (2, P) of the table: the first and the second text of each scored pair."""
        return inputs.rows[inputs.batch.num_document_uses :].view(2, -1)

    def _projected(self, inputs: StepInputs) -> int:
        """How many columns of the table are not the embeddings', but what is compared with a teacher's vectors."""
        return 0 if inputs.teacher is None or self.engine.module.projection is None else inputs.teacher.shape[1]

    def _contrastive(
        self,
        table: Tensor,
        inputs: StepInputs,
        models: Mapping[str, Tensor],
        temperature: Tensor,
        group: Group,
        first: int,
        last: int,
    ) -> LossResult:
        """The part of the queries first .. last, which are some of a group; `models` are a guide's and a teacher's unit vectors."""
        batch, own_temperature = inputs.batch, self.temperatures[group.file]
        return contrastive_loss(
            table,
            inputs.document_keys,
            inputs.own_negatives[:, : group.num_own],
            num_queries=batch.num_queries,
            first_query=first,
            last_query=last,
            temperature=temperature if own_temperature is None else own_temperature,
            options=self.options[group.file],
            rows=None if inputs.rows is None else inputs.rows[: batch.num_document_uses],
            teacher_scores=inputs.teacher_scores,
            positive_pairs=inputs.positive_pairs,
            projected=self._projected(inputs),
            **models,
        )

    def _tell_all(self, values: Tensor) -> list[list[float]]:
        """The values (k,) of every rank, in float64 and the same order everywhere: ranks agree to the bit."""
        return self.world.all_gather_rows(values.double()[None], [1] * self.world.size).tolist()

    def _summarise(
        self, loss: LossResult, inputs: StepInputs, temperature: Tensor, tell: Sequence[float]
    ) -> StepResult:
        """Add up the ranks' shares, so that all ranks know (and agree on) the loss of the batch."""
        own = torch.stack([value.double() for value in (*loss.sums, temperature)])
        all_told = self._tell_all(torch.cat([own, torch.tensor(tell, dtype=own.dtype, device=own.device)]))
        sums = Sums(*map(sum, list(zip(*all_told))[: len(Sums._fields)]))
        queries = inputs.batch.num_queries or math.nan
        with_negatives = max(1.0, sums.num_with_negatives) if inputs.batch.num_queries else math.nan
        return StepResult(
            loss=sums.loss,
            accuracy=sums.num_correct / queries,
            positive_similarity=sums.positive_similarity / queries,
            negative_similarity=sums.negative_similarity / with_negatives,
            margin=sums.margin / with_negatives,
            without_negatives=1 - sums.num_with_negatives / queries,
            temperature=all_told[0][len(Sums._fields)],
            grad_log_scale=sums.grad_log_scale,
            num_tokens=inputs.batch.num_tokens_named,
            num_tokens_encoded=inputs.plan.num_tokens,
            padding_share=inputs.plan.padding_share,
            told=tuple(map(max, list(zip(*all_told))[len(Sums._fields) + 1 :])),
        )

    def _own_gradients(self, gradient: Tensor, inputs: StepInputs) -> list[Tensor]:
        """Gradient of the batch loss by this rank's embeddings, micro-batch by micro-batch."""
        rows = self.world.reduce_scatter_rows(gradient[inputs.rank_order], inputs.plan.rank_counts())
        return list(rows.split([micro_batch.num_texts for micro_batch in inputs.micro_batches]))

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
        self, micro_batches: list[MicroBatch], outputs: list, gradients: list[Tensor], on_scale: list[float]
    ) -> None:
        """The last micro-batch first, which has its graph; then the others, each encoded again."""
        numbers = [len(outputs) - 1, *range(len(outputs) - 1)]
        for number in numbers:
            if self.has_boundary:
                self.engine.set_gradient_accumulation_boundary(number == numbers[-1])
            output = outputs.pop() if number == numbers[0] else self._encode(micro_batches[number])
            self.engine.backward(self._surrogate(output, gradients[number], on_scale[number]), scale_wrt_gas=False)
            del output  # its graph, before the next one grows


def loss_options(arguments: StepArguments, negatives: str) -> LossOptions:
    """The settings of the loss as the losses take them, for one way of scoring queries."""
    dims = tuple(arguments.matryoshka_dims)
    return LossOptions(
        negatives=negatives,
        label_smoothing=arguments.label_smoothing,
        symmetric=arguments.symmetric,
        directions=tuple(arguments.directions),
        hardness_weight=arguments.hardness_weight,
        false_negative_margin=arguments.false_negative_margin,
        matryoshka_dims=dims,
        matryoshka_weights=tuple(arguments.matryoshka_weights or [1.0] * len(dims)),
        distillation_weight=arguments.distillation_weight,
        distillation_loss=arguments.distillation_loss,
        distillation_temperature=arguments.distillation_temperature,
        guide_margin=arguments.guide_margin,
        guide_is_relative=arguments.guide_margin_strategy == "relative",
        teacher_loss=arguments.teacher_loss,
        teacher_weight=arguments.teacher_weight,
        teacher_temperature=arguments.teacher_temperature or arguments.temperature,
    )


def _temperature_gradient(result: StepResult) -> float:
    """By the parameter of a learned temperature. At its lower bound, none that would push it further."""
    at_bound = result.temperature <= MIN_LEARNED_TEMPERATURE
    return max(0.0, result.grad_log_scale) if at_bound else result.grad_log_scale
