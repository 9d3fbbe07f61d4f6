"""A training run from settings to RUN/model/: prepare, step until done, save."""

import contextlib
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
from ds_embed.distributed import EXIT_REQUEUE, World
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.loading import find_model, is_decoder, load_config, load_encoder, load_tokenizer
from ds_embed.models.lora import add_lora
from ds_embed.engine import partitioned_loading, start_engine, take_step
from ds_embed.training.checkpoint import load_checkpoint, prune, save_checkpoint
from ds_embed.training.fingerprint import fingerprint
from ds_embed.training.prepare import prepare_store
from ds_embed.training.resume import Start, clear_way, find_start
from ds_embed.training.run_folder import RunFolder
from ds_embed.training.save import save_model
from ds_embed.training.schedule import learning_rate
from ds_embed.training.signals import StopRequest
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
        world.on_main("check output_dir", lambda: self.folder.claim(run.resume_if_exists))
        self.source = find_model(model.model_name_or_path)
        config = load_config(self.source, model.trust_remote_code)
        self.is_decoder = decoder = is_decoder(config)
        self.card = EmbeddingCard.choose(
            data, model.pooling, decoder=decoder, base=self.source.base, known=self.source.card
        )
        self.tokenizer = load_tokenizer(self.source, model.trust_remote_code)
        self.store = prepare_store(world, data, step, self.tokenizer, self.card)
        self.max_steps = count_steps(self.store.num_records, step.global_batch_size, optimizer)
        self.fingerprint: dict[str, str] = {}  # on rank 0, which reads and writes checkpoints
        commit = getattr(config, "_commit_hash", None)
        self.start = world.on_main("find checkpoint", lambda: self._find_start(commit))

    def _find_start(self, commit: str | None) -> Start:
        self.fingerprint = fingerprint(
            self.store.manifest, self.source, commit, self.card,
            self.lora, self.data, self.step_arguments, self.optimizer, self.run,
        )  # fmt: skip
        return find_start(self.folder, self.fingerprint, self.run.accept_changes, self.max_steps)

    def require_decoder(self) -> None:
        """ValueError unless the base model is a causal decoder."""
        if not self.is_decoder:
            raise ValueError(
                f"--model_name_or_path {self.model.model_name_or_path}: is a BERT-style encoder; "
                "recipes/train_gpt.py trains decoders"
            )

    def train(self) -> None:
        """Load the model, run the steps from the start to max_steps, write RUN/model/.

        Leaves with SystemExit(EXIT_REQUEUE) when a signal asks for it, after saving a checkpoint.
        """
        if self.start.is_finished:
            return
        with StopRequest(self.world) as stop:
            encoder = self._load_encoder()
            engine = start_engine(encoder, self.deepspeed_config, self.optimizer, self.world)
            if self.start.checkpoint is not None:
                load_checkpoint(engine, self.world, self.start.checkpoint, self.start.state)
            # Opened last, so that a run that could not start leaves no folder behind.
            self.world.on_main("open run", self._open_folder)
            if self.world.is_main:
                self._print_arithmetic(encoder)
            self._run_steps(engine, stop)
            card = replace(self.card, consumed_samples=self._consumed(self.max_steps))
            save_model(encoder, self.tokenizer, card, self.folder, self.world)
        self.folder.close()
        if self.world.is_main:
            logger.info("model written to %s", self.folder.model_dir)

    def _open_folder(self) -> None:
        settings = [self.model, self.lora, self.data, self.step_arguments, self.optimizer, self.run]
        self.folder.open(settings, self.deepspeed_config, self.run, self.start.step)
        clear_way(self.folder, self.start)

    def _consumed(self, number: int) -> int:
        """Samples consumed after step `number`; a resumed run counts on from where its checkpoint stood."""
        return self.start.consumed_samples + (number - self.start.step) * self.step_arguments.global_batch_size

    def _run_steps(self, engine: Any, stop: StopRequest) -> None:
        contrastive = ContrastiveStep(engine, self.store, self.world, self.step_arguments, self.run.seed)
        skipped_steps = self.start.skipped_steps
        saved_step = self.start.step
        engine.train()
        with self._progress_bar() as progress:  # left with its line ended, so that an error starts a new one
            for number in range(self.start.step + 1, self.max_steps + 1):
                self._leave_if_asked(engine, stop, number - 1, saved_step, skipped_steps)
                started = time.perf_counter()
                batch = self._batch(self._consumed(number - 1))
                rate = learning_rate(number, self.max_steps, self.optimizer)
                result = contrastive.run(batch)
                # Nothing was backpropagated from a loss that is not finite, and DeepSpeed refuses a gradient
                # that is not: either way no rank has changed a weight.
                norm = take_step(engine, rate) if result.is_finite else math.nan
                is_skipped = not math.isfinite(norm)
                if is_skipped:
                    skipped_steps += 1
                    self._report_skip(number, result, batch, skipped_steps)
                seconds = time.perf_counter() - started
                self._log(number, rate, norm, result, seconds, skipped_steps if is_skipped else None, progress)
                interval = self.run.save_interval
                if number == self.max_steps or interval and number % interval == 0:
                    self._save(engine, number, skipped_steps)
                    saved_step = number

    def _leave_if_asked(self, engine: Any, stop: StopRequest, number: int, saved_step: int, skipped: int) -> None:
        """End the job between two steps, all ranks at the same one, when any of them was sent a signal."""
        signal_name = stop.agreed()
        if signal_name is None:
            return
        if number > saved_step:
            self._save(engine, number, skipped)
        self.folder.close()
        if self.world.is_main:
            logger.info(
                "%s: stopped after step %d, which is saved; the same command goes on from there (exit code %d)",
                signal_name, number, EXIT_REQUEUE,
            )  # fmt: skip
        raise SystemExit(EXIT_REQUEUE)

    def _save(self, engine: Any, number: int, skipped_steps: int) -> None:
        zero = self.deepspeed_config["zero_optimization"].get("stage", 0)
        state = {
            "consumed_samples": self._consumed(number),
            "max_steps": self.max_steps,
            "skipped_steps": skipped_steps,
            "best": self.start.best,
            "written_by": f"{self.world.size} rank(s), ZeRO-{zero}",
            "fingerprint": self.fingerprint,
        }
        save_checkpoint(engine, self.world, self.folder.checkpoints_dir, number, state, before=self.folder.sync_log)
        if self.world.is_main:
            prune(self.folder.checkpoints_dir, self.run.save_total_limit)

    def _report_skip(self, number: int, result: StepResult, batch: GlobalBatch, skipped_steps: int) -> None:
        """Warn of a step whose loss or gradient is not finite, or raise ValueError when there were too many."""
        message = _non_finite_message(number, result, batch, self.store)
        limit = self.run.max_skipped_steps
        if skipped_steps > limit:
            raise ValueError(f"{message}. Lower --learning_rate, raise --warmup_steps, or try --bf16 false")
        if self.world.is_main:
            logger.warning("warning: %s; skipped, %d of --max_skipped_steps %d", message, skipped_steps, limit)

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
        return encoder

    def _batch(self, first_sample: int) -> GlobalBatch:
        return assemble_batch(
            self.store,
            seed=self.run.seed,
            first_sample=first_sample,
            num_queries=self.step_arguments.global_batch_size,
            hard_negatives=self.data.hard_negatives,
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
        logger.info("\n".join(lines))

    def _progress_bar(self) -> Any:
        if not self.world.is_main:
            return contextlib.nullcontext()
        from tqdm import tqdm

        return tqdm(
            initial=self.start.step, total=self.max_steps, unit="step", desc="training", dynamic_ncols=True
        )

    def _log(
        self,
        number: int,
        rate: float,
        norm: float,
        result: StepResult,
        seconds: float,
        skipped_steps: int | None,
        progress: Any,
    ) -> None:
        """One line of metrics; a skipped step always has one, with the count of them, and null for what is no number."""
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
        if number % self.run.log_interval and number != self.max_steps and skipped_steps is None:
            return
        counted = {} if skipped_steps is None else {"skipped_steps": skipped_steps}
        self.folder.log(
            counted
            | {
                "step": number,
                "loss": result.loss if result.is_finite else None,
                "accuracy": result.accuracy,
                "positive_similarity": result.positive_similarity,
                "negative_similarity": result.negative_similarity,
                "learning_rate": rate,
                "grad_norm": norm if math.isfinite(norm) else None,
                "consumed_samples": self._consumed(number),
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
    what = "the gradient is not finite" if result.is_finite else f"the loss is {result.loss}"
    return (
        f"step {number}: {what}; samples {batch.first_sample} to "
        f"{batch.first_sample + batch.num_queries - 1}, the first from {shown}; no weight was changed by this step"
    )
