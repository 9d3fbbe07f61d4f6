"""A training run from settings to RUN/model/: prepare, step until done, save."""

import logging
import math
import time
from dataclasses import replace
from typing import Any

from ds_embed.config import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    OptimizerArguments,
    RunArguments,
    StepArguments,
    resolve_deepspeed_config,
)
from ds_embed.data.batch import GlobalBatch, assemble_batch
from ds_embed.data.plan import plan_micro_batches
from ds_embed.data.store import TrainingStore
from ds_embed.distributed import World
from ds_embed.models.loading import (
    choose_card,
    find_model,
    is_decoder,
    load_config,
    load_encoder,
    load_tokenizer,
)
from ds_embed.models.lora import add_lora
from ds_embed.engine import partitioned_loading, start_engine, take_step
from ds_embed.training.prepare import check_prefixes, prepare_store, sample_order
from ds_embed.training.run_folder import RunFolder
from ds_embed.training.save import save_model
from ds_embed.training.schedule import learning_rate
from ds_embed.training.step import ContrastiveStep, StepResult

logger = logging.getLogger(__name__)


class TrainingRun:
    """One run on this rank. Building it checks every setting before anything large is loaded or written."""

    def __init__(
        self,
        world: World,
        model: ModelArguments,
        lora: LoraArguments,
        data: DataArguments,
        step: StepArguments,
        optimizer: OptimizerArguments,
        run: RunArguments,
    ):
        self.world, self.model, self.lora, self.data = world, model, lora, data
        self.step_arguments, self.optimizer, self.run = step, optimizer, run
        self.deepspeed_config = resolve_deepspeed_config(
            run.deepspeed, bf16=run.bf16, max_grad_norm=optimizer.max_grad_norm
        )
        self.folder = RunFolder(run.output_dir)
        world.on_main("check output_dir", self.folder.check_is_new)
        self.source = find_model(model.model_name_or_path)
        config = load_config(self.source, model.trust_remote_code)
        self.is_decoder = is_decoder(config)
        if step.matryoshka_dims:
            check_prefixes(step, config.get_text_config().hidden_size)
        self.card = choose_card(self.source, data, model)
        self.tokenizer = load_tokenizer(self.source, model.trust_remote_code)
        self.store = prepare_store(world, data, step, self.tokenizer, self.card)
        self.order = sample_order(self.store, data, step, run.seed)
        self.max_steps = count_steps(self.store.num_records, step.global_batch_size, optimizer)

    def require_decoder(self) -> None:
        """ValueError unless the base model is a causal decoder."""
        if not self.is_decoder:
            raise ValueError(
                f"--model_name_or_path {self.model.model_name_or_path}: is a BERT-style encoder; "
                "recipes/train_gpt.py trains decoders, recipes/train_bert.py encoders"
            )

    def require_encoder(self) -> None:
        """ValueError unless the base model is a BERT-style encoder."""
        if self.is_decoder:
            raise ValueError(
                f"--model_name_or_path {self.model.model_name_or_path}: is a causal decoder; "
                "recipes/train_bert.py trains encoders, recipes/train_gpt.py decoders"
            )

    def train(self) -> None:
        """Load the model, run max_steps steps, write RUN/model/."""
        settings = [self.model, self.lora, self.data, self.step_arguments, self.optimizer, self.run]
        encoder = self._load_encoder()
        engine = start_engine(encoder, self.deepspeed_config, self.optimizer, self.world)
        # Opened last, so that a run that could not start leaves no folder behind.
        self.world.on_main("open run", lambda: self.folder.open(settings, self.deepspeed_config, self.run))
        if self.world.is_main:
            self._print_arithmetic(encoder)
        contrastive = ContrastiveStep(engine, self.store, self.world, self.step_arguments, self.run.seed)
        size = self.step_arguments.global_batch_size
        engine.train()
        progress = self._progress_bar()
        for number in range(1, self.max_steps + 1):
            started = time.perf_counter()
            batch = self._batch((number - 1) * size)
            rate = learning_rate(number, self.max_steps, self.optimizer)
            result = contrastive.run(batch)
            if not result.is_finite:
                raise ValueError(_non_finite_message(number, result, batch, self.store))
            norm = take_step(engine, rate)
            seconds = time.perf_counter() - started
            self._log(number, rate, norm, result, seconds, progress)
        if progress is not None:
            progress.close()

        card = replace(
            self.card, consumed_samples=self.max_steps * size, temperature=self.step_arguments.temperature
        )
        save_model(encoder, self.tokenizer, card, self.folder, self.world)
        self.folder.close()
        if self.world.is_main:
            logger.info("model written to %s", self.folder.model_dir)

    def _load_encoder(self):
        import torch

        with partitioned_loading(self.deepspeed_config):
            encoder = load_encoder(
                self.source,
                pooling=self.card.pooling,
                bf16=self.run.bf16,
                attn_implementation=self.model.attn_implementation,
                trust_remote_code=self.model.trust_remote_code,
            )
        if self.step_arguments.gradient_checkpointing:
            # The reentrant kind fails under ZeRO-2 and 3 when one graph holds several forwards.
            encoder.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.lora.lora_rank:
            dtype = torch.bfloat16 if self.run.bf16 else torch.float32
            add_lora(encoder, self.lora, seed=self.run.seed, dtype=dtype)
        if self.step_arguments.learnable_temperature:
            encoder.learn_temperature()
        return encoder

    def _batch(self, first_sample: int) -> GlobalBatch:
        return assemble_batch(
            self.store,
            self.order,
            first_sample=first_sample,
            num_queries=self.step_arguments.global_batch_size,
            hard_negatives=self.data.hard_negatives,
            hard_negatives_sampling=self.data.hard_negatives_sampling,
        )

    def _print_arithmetic(self, encoder: Any) -> None:
        """Say what a step is made of, from the first batch: the numbers a user would otherwise guess."""
        batch = self._batch(0)
        plan = plan_micro_batches(batch.lengths, self.step_arguments.micro_batch_tokens, self.world.size)
        trained = sum(_size(p) for p in encoder.parameters() if p.requires_grad)
        total = sum(_size(p) for p in encoder.parameters())
        hard = self.data.hard_negatives
        seen = {"all": batch.num_queries * (1 + hard), "own": batch.num_queries + hard, "pair": 1 + hard}
        zero = self.deepspeed_config["zero_optimization"].get("stage", 0)
        lines = [
            f"records        {self.store.num_records:,} in {len(self.data.train_files)} file(s)",
            f"steps          {self.max_steps:,} of {batch.num_queries:,} queries",
            f"weights        {trained:,} trained of {total:,}, "
            f"{'bf16' if self.run.bf16 else 'fp32'}, ZeRO-{zero}, {self.world.size} rank(s)",
            f"first step     {len(batch.texts):,} texts, {plan.num_tokens:,} tokens, at most "
            f"{seen[self.step_arguments.negatives] - 1:,} negatives per query",
            f"micro-batches  {plan.num_micro_batches} per rank of at most {self.step_arguments.micro_batch_tokens:,} "
            f"tokens, padding {plan.padding_share:.1%}",
        ]
        if self.order.probabilities is not None:
            unit = "batches" if self.order.batch_size else "samples"
            shares = zip(self.data.train_files, self.store.file_sizes, self.order.probabilities)
            lines += [f"file           {share:.2%} of {unit}, {size:,} records: {path}" for path, size, share in shares]
        logger.info("\n".join(lines))

    def _progress_bar(self) -> Any:
        if not self.world.is_main:
            return None
        from tqdm import tqdm

        return tqdm(total=self.max_steps, unit="step", desc="training", dynamic_ncols=True)

    def _log(
        self, number: int, rate: float, norm: float, result: StepResult, seconds: float, progress: Any
    ) -> None:
        if not self.world.is_main:
            return
        tokens_per_second = result.num_tokens / seconds
        progress.update()
        progress.set_postfix(
            loss=f"{result.loss:.4f}",
            rate=f"{rate:.2e}",
            tokens_per_s=f"{tokens_per_second:,.0f}",
            padding=f"{result.padding_share:.1%}",
        )
        if number % self.run.log_interval and number != self.max_steps:
            return
        self.folder.log(
            {
                "step": number,
                "loss": result.loss,
                "accuracy": result.accuracy,
                "positive_similarity": result.positive_similarity,
                "negative_similarity": result.negative_similarity,
                "temperature": result.temperature,
                "learning_rate": rate,
                "grad_norm": norm,
                "consumed_samples": number * self.step_arguments.global_batch_size,
                "tokens_per_second": tokens_per_second,
                "padding_share": result.padding_share,
                "seconds": seconds,
            }
        )


def count_steps(num_records: int, global_batch_size: int, arguments: OptimizerArguments) -> int:
    """Steps of a run: max_steps or num_train_epochs, whichever ends first; one epoch if neither is given."""
    if num_records < global_batch_size:
        raise ValueError(
            f"--global_batch_size {global_batch_size}: the training files hold only {num_records} records; "
            f"lower it to at most {num_records}"
        )
    epochs = arguments.num_train_epochs or (None if arguments.max_steps else 1.0)
    limits = [] if arguments.max_steps is None else [arguments.max_steps]
    if epochs is not None:
        limits.append(math.ceil(epochs * num_records / global_batch_size))
    steps = min(limits)
    if arguments.warmup_steps + arguments.constant_steps > steps:
        raise ValueError(
            f"--warmup_steps {arguments.warmup_steps} and --constant_steps {arguments.constant_steps} "
            f"exceed the {steps} steps of the run; lower them"
        )
    return steps


def _size(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _non_finite_message(number: int, result: StepResult, batch: GlobalBatch, store: TrainingStore) -> str:
    shown = ", ".join(store.location(int(record)) for record in batch.records[:3])
    return (
        f"step {number}: the loss is {result.loss}; samples {batch.first_sample} to "
        f"{batch.first_sample + batch.num_queries - 1}, the first from {shown}; no weight was changed by this step. "
        "Lower --learning_rate, raise --warmup_steps, or try --bf16 false"
    )
