"""A reranker's training run: like an embedder's, but its texts are pairs and its table has a single column of scores.

Plan, forward passes, gather, backward, checkpoints and log are those of training/step.py and loop.py; the loss compares
the documents of each query. So the result is the same for any number of ranks, ZeRO stage, micro-batch size and
grad_cache here too.

Shapes: N queries, M documents of the batch, each of which forms a pair with its query.
"""

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_embed.data.ahead import made_ahead
from ds_embed.data.batch import GlobalBatch
from ds_embed.data.pairs import PairFormat, as_pairs
from ds_embed.data.plan import plan_micro_batches
from ds_embed.data.store import TrainingStore
from ds_embed.job.ranks import World
from ds_embed.losses import LossResult
from ds_embed.losses.reranking import rerank_loss
from ds_embed.models.cpu import training_kernel, use_cpu_dropout
from ds_embed.models.engine import gather_weights, partitioned_loading
from ds_embed.models.loading import load_config, load_tokenizer
from ds_embed.models.lora_runs import resolve_lora
from ds_embed.models.reranker import (
    PairScorer,
    RerankerCard,
    add_lora_behind_head,
    choose_pairs,
    configure,
    empty_classifier,
    find_reranker,
    head_of_words,
    load_scorer,
    put_head,
    save_reranker,
)
from ds_embed.settings import OptimizerArguments, RunArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.reranker_arguments import (
    RerankerDataArguments,
    RerankerLoraArguments,
    RerankerModelArguments,
    RerankerStepArguments,
    RerankerValidationArguments,
)
from ds_embed.training.inputs import StepInputs
from ds_embed.training.loop import TrainingRun
from ds_embed.training.report import whole_size
from ds_embed.training.signals import StopRequest
from ds_embed.training.step import ContrastiveStep
from ds_embed.training.validation import Validation, leave_if_asked

_CUTOFF = 10

logger = logging.getLogger(__name__)


class RerankStep(ContrastiveStep):
    """The step of a batch whose texts are pairs."""

    def __init__(
        self,
        engine: Any,
        store: TrainingStore,
        world: World,
        arguments: RerankerStepArguments,
        seed: int,
        pair_format: PairFormat,
    ):
        super().__init__(engine, store, world, arguments, seed)
        self.pair_format = pair_format

    def _collate(self, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.pair_format.collate(self.store, texts)

    def _loss(self, table: Tensor, inputs: StepInputs, temperature: Tensor, first_query: int = 0) -> LossResult:
        num_queries = inputs.batch.num_queries - first_query
        rank, num_ranks = self.world.rank, self.world.size
        return rerank_loss(
            table,
            inputs.own_negatives,
            inputs.teacher_scores,
            first_query=first_query + num_queries * rank // num_ranks,
            last_query=first_query + num_queries * (rank + 1) // num_ranks,
            loss=self.arguments.loss,
            teacher_temperature=self.arguments.distillation_temperature,
        )

    def measure(self, inputs: StepInputs, first_query: int) -> np.ndarray:
        """Sums over queries first_query to N of nDCG@10, RR@10, loss and whether the positive is ranked first.

        Each query ranks its own documents; ties with the positive are ranked above it.
        """
        with torch.no_grad():
            outputs = [self._encode(micro_batch) for micro_batch in inputs.micro_batches]
        table = self._gather([scores for scores, _ in outputs], inputs)
        sums = rerank_loss(
            table,
            inputs.own_negatives,
            inputs.teacher_scores,
            first_query=first_query,
            last_query=inputs.batch.num_queries,
            loss=self.arguments.loss,
            teacher_temperature=self.arguments.distillation_temperature,
        ).sums
        scores, own = table[:, 0], inputs.own_negatives
        better = (scores[own.clamp_min(0)] >= scores[: len(own), None]) & (own >= 0)
        places = 1 + better.sum(1)[first_query:].double().cpu().numpy()
        seen = places <= _CUTOFF
        loss = float(sums.loss) * inputs.batch.num_queries
        return np.array([(seen / np.log2(1 + places)).sum(), (seen / places).sum(), loss, (places == 1).sum()])


class RerankValidation(Validation):
    """Validation on held-out records: each query's own documents are reranked."""

    of_batches = ["nDCG@10", "RR@10", "val_loss", "val_accuracy"]

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.pair_format = arguments[6].pair_format

    def _held_out_loss(self, engine: Any, stop: StopRequest) -> dict[str, float]:
        step = RerankStep(engine, self.store, self.world, self.step, self.seed, self.pair_format)
        sums = np.zeros(len(self.of_batches))
        pairs = ((as_pairs(batch, self.store, self.pair_format), first) for batch, first in self._batches())
        inputs = made_ahead(lambda item: (step.prepare(item[0]), item[1]), pairs)
        with contextlib.closing(inputs):
            for step_inputs, first_query in inputs:
                leave_if_asked(stop)
                sums += step.measure(step_inputs, first_query)
        return dict(zip(self.of_batches, (sums / self.store.num_records).tolist()))


class RerankerRun(TrainingRun):
    """One run on this rank. The constructor checks the settings and the model; it does not read data, write or lock."""

    validation_class = RerankValidation
    next_command = "rerank with: ds-embed rerank --model_name_or_path %s --run_file ... --output_file OUT.trec"

    def __init__(
        self,
        world: World,
        model: RerankerModelArguments,
        lora: RerankerLoraArguments,
        data: RerankerDataArguments,
        step: RerankerStepArguments,
        optimizer: OptimizerArguments,
        run: RunArguments,
        validation: RerankerValidationArguments,
    ):
        self._take(world, model, data, step, optimizer, run, validation)
        self.source = find_reranker(model.model_name_or_path, model.model_revision)
        self.tokenizer = load_tokenizer(self.source, model.trust_remote_code)
        self.config = load_config(self.source, model.trust_remote_code)
        self.lora = resolve_lora(lora, self.source, self.config, model.trust_remote_code)
        self.config = configure(self.config, self.tokenizer, model.model_name_or_path)
        empty = empty_classifier(self.config, model.trust_remote_code)
        self.card: RerankerCard = choose_pairs(self.source, model.template, self.tokenizer, data.max_length, empty)
        if model.yes_no and not hasattr(empty, "score"):
            raise UserError(
                f"--yes_no {' '.join(model.yes_no)}: {self.source.base} is not a decoder with a head on one token"
            )

    def _check_batches(self, batches: Iterable[GlobalBatch]) -> None:
        first = self.store.manifest["first_record_without_scores"]
        if self.step_arguments.loss == "kl" and first:
            raise UserError(
                f"{first}: has no pos_score and neg_scores, which --loss kl needs in every record "
                f"({self.store.manifest['records_without_scores']:,} records lack them); add them or choose listwise"
            )

    def batch(self, first_sample: int) -> GlobalBatch:
        """The global batch that starts at sample `first_sample`, as pairs."""
        return as_pairs(super().batch(first_sample), self.store, self.card.pair_format)

    def _step(self, engine: Any) -> RerankStep:
        world, seed = self.world, self.run.seed
        return RerankStep(engine, self.store, world, self.step_arguments, seed, self.card.pair_format)

    def _card_after(self, consumed: int) -> RerankerCard:
        return replace(self.card, consumed_samples=consumed)

    def _load_encoder(self) -> PairScorer:
        source, model, words = self.source, self.model, self.model.yes_no
        row = None
        if words:
            row = self.world.on_main(
                "head of words",
                lambda: head_of_words(source, self.tokenizer, words, self.card, model.trust_remote_code),
            )
        kernel = training_kernel(self.config, model.attn_implementation, self.world.device.type)
        dtype = torch.bfloat16 if self.run.bf16 else torch.float32
        with partitioned_loading(self.deepspeed_config):
            scorer, new = load_scorer(
                source,
                self.config,
                self.card,
                bf16=self.run.bf16,
                kernel=kernel,
                trust_remote_code=model.trust_remote_code,
                seed=self.run.seed,
            )
            if row is not None:
                put_head(scorer, row)
            if self.lora.lora_rank:
                add_lora_behind_head(scorer, self.lora, seed=self.run.seed, dtype=dtype)
        if self.world.is_main and new:
            start = f"the logit of '{words[0]}' minus that of '{words[1]}'" if words else "random initialization"
            logger.info("new head       %s: %s", ", ".join(new), start)
        if self.step_arguments.gradient_checkpointing:
            scorer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.world.device.type == "cpu":
            use_cpu_dropout(scorer)
        return scorer

    def _save_model(self, encoder: PairScorer, consumed: int) -> None:
        weights = gather_weights(encoder, None, self.world)
        card = self._card_after(consumed)

        def fill(folder: Any) -> None:
            save_reranker(encoder, weights, self.tokenizer, card, folder)

        self.world.on_main("save model", lambda: self.folder.publish_model(fill))

    def _print_arithmetic(self, encoder: Any) -> None:
        """Print what a step consists of, as computed from the first batch."""
        batch, step = self.batch(0), self.step_arguments
        plan = plan_micro_batches(batch.lengths, step.micro_batch_tokens, self.world.size)
        trained, total = (
            sum(whole_size(p) for p in encoder.parameters() if p.requires_grad or not only) for only in (True, False)
        )
        lines = [
            f"records        {self.store.num_records:,} in {len(self.data.train_files)} file(s)",
            f"steps          {self.max_steps:,} of {batch.num_queries:,} queries",
            f"weights        {trained:,} trained of {total:,}, "
            f"{'bf16' if self.run.bf16 else 'fp32'}, ZeRO-{self._stage}, {self.world.size} rank(s)",
            f"first step     {len(batch.lengths):,} pairs with {batch.num_tokens_named:,} tokens, {step.loss} loss over groups of "
            f"at most {1 + self.data.hard_negatives:,}",
            f"micro-batches  {plan.num_micro_batches} per rank, at most {step.micro_batch_tokens:,} tokens each, "
            f"{plan.padding_share:.1%} padding",
        ]
        if self.lora.lora_rank:
            lines.insert(3, f"{self.lora.lora_variant:<15}rank {self.lora.lora_rank}, alpha {self.lora.lora_alpha:g}")
        if self.validation is not None:
            lines.append(f"validation     {self.validation.describe()}")
        logger.info("\n".join(lines + self.card.describe(self.tokenizer)))
