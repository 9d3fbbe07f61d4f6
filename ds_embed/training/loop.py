"""A training run from its settings to RUN/model/: prepare, run the steps, save."""

import contextlib
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from ds_embed.artifact.identity import identify_weights
from ds_embed.data.ahead import made_ahead
from ds_embed.data.batch import GlobalBatch
from ds_embed.data.plan import plan_micro_batches
from ds_embed.job.ranks import EXIT_REQUEUE, World
from ds_embed.models.checkpoint import checkpoint_path, way_to
from ds_embed.models.cpu import training_kernel, use_cpu_dropout
from ds_embed.models.engine import partitioned_loading, start_engine, take_step
from ds_embed.models.fit import check_parts
from ds_embed.models.kinds import is_bert_style, kind_of
from ds_embed.models.loading import (
    ModelSource,
    check_stage,
    choose_card,
    find_source,
    load_config,
    load_encoder,
    load_tokenizer,
)
from ds_embed.models.lora import add_lora, start_training
from ds_embed.models.lora_runs import merge_adapter, resolve_lora
from ds_embed.models.varlen import VARLEN_KERNEL, describe_choice, why_not_varlen
from ds_embed.settings import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    OptimizerArguments,
    RunArguments,
    StepArguments,
    ValidationArguments,
    resolve_deepspeed_config,
)
from ds_embed.settings.errors import UserError
from ds_embed.training.checkpoint import load_checkpoint, prune, save_checkpoint
from ds_embed.training.fingerprint import fingerprint
from ds_embed.training.prepare import (
    check_contrast,
    check_prefixes,
    describe_prefixes,
    file_formats,
    modes_of_files,
    prepare_store,
    sample_order,
    training_batch,
)
from ds_embed.training.report import StepLog, non_finite_message, peak_memory_gib, whole_size
from ds_embed.training.resume import Start, clear_way, find_start
from ds_embed.training.run_folder import RunFolder
from ds_embed.training.save import load_best, save_model
from ds_embed.training.schedule import count_steps, learning_rate
from ds_embed.training.signals import StopRequest
from ds_embed.training.step import ContrastiveStep, StepResult
from ds_embed.training.stored_vectors import StoredVectors, guided_share
from ds_embed.training.validation import StoppedMeanwhile, Validation

logger = logging.getLogger(__name__)
_LONG_STEP_SECONDS = 1.0


class TrainingRun:
    """One run on this rank. Building it checks the settings and the model; nothing is read, made or locked yet."""

    validation_class = Validation
    next_command = "encode with: ds-embed generate --model_name_or_path %s --doc_files ... --output_prefix OUT"

    def _take(self, world, model, data, step, optimizer, run, validation) -> None:
        """What every kind of run begins with, whatever model it trains."""
        self.world, self.model, self.data = world, model, data
        self.step_arguments, self.optimizer, self.run = step, optimizer, run
        world.set_timeouts(run.rank_timeout_seconds, run.stall_timeout_seconds)
        self.validation_arguments = validation
        self.deepspeed_config = resolve_deepspeed_config(
            run.deepspeed, bf16=run.bf16, max_grad_norm=optimizer.max_grad_norm, num_ranks=world.size
        )
        self.folder = RunFolder(run.output_dir)

    def __init__(
        self,
        world: World,
        model: ModelArguments,
        lora: LoraArguments,
        data: DataArguments,
        step: StepArguments,
        optimizer: OptimizerArguments,
        run: RunArguments,
        validation: ValidationArguments,
    ):
        self._take(world, model, data, step, optimizer, run, validation)
        check_stage(model, self._stage)
        self.source = find_source(model)
        self.config = config = load_config(self.source, model.trust_remote_code)
        self.kind = kind_of(config, model.trust_remote_code, self.source.base)
        self.lora = resolve_lora(lora, self.source, config, model.trust_remote_code)
        if self.lora.lora_rank and self.lora.lora_variant == "dora" and self._stage == 3:
            raise UserError(
                "--lora_variant dora: reads weights outside of their layer, where ZeRO-3 has already released them; set "
                "--deepspeed to a config with ZeRO 0 to 2, such as zero2"
            )
        self.card = choose_card(self.source, data, model)
        asked = model.attn_implementation
        self.against_varlen = why_not_varlen(config, asked, world, bf16=run.bf16, is_trained=True)
        self.kernel: str | None = VARLEN_KERNEL
        if self.against_varlen is not None:
            self.kernel = training_kernel(config, asked, world.device.type)
        if step.matryoshka_dims:
            check_prefixes(step, self.card.dimensions(self.kind.num_dims))
        self.tokenizer = load_tokenizer(self.source, model.trust_remote_code)
        parts = self.source, self.card, self.tokenizer, model.trust_remote_code
        world.on_main("check model", lambda: check_parts(*parts))

    def prepare(self) -> None:
        """Claim the folder, read and tokenize the data, and find where the run starts. Every rank must call it."""
        world, data, step, run = self.world, self.data, self.step_arguments, self.run
        world.on_main("check output_dir", lambda: self.folder.claim(run.resume_if_exists))
        self.store = prepare_store(world, data.train_files, data, step, self.tokenizer, file_formats(data, self.card))
        if step.pair_loss and "scored" not in self.store.kinds_of_files:
            raise UserError(
                f"--pair_loss {step.pair_loss}: no file of --train_files has scored pairs (keys query, pos_doc and score); "
                "map other keys to these with --columns, or remove this flag"
            )
        named = {"guide": step.guide_embeddings, "teacher": step.teacher_embeddings}
        self.vectors = {
            name: StoredVectors(world, self.store, f"--{name}_embeddings", folder, data.cache_dir)
            for name, folder in named.items()
            if folder is not None
        }
        self.order = sample_order(self.store, data, step, run.seed)
        first = [step.global_batch_size * number for number in range(max(4, 256 // step.global_batch_size))]
        world.on_main("check negatives", lambda: self._check_batches(map(self.batch, first)))
        self.max_steps = count_steps(self.order.samples_per_pass, step.global_batch_size, self.optimizer)
        self.validation = None
        if self.validation_arguments.is_on:
            self.validation = self.validation_class(
                world, self.validation_arguments, data, step, run.seed, self.tokenizer, self.card, self.folder
            )
        self.fingerprint: dict[str, str] = {}  # on rank 0, which reads and writes checkpoints
        commit = getattr(self.config, "_commit_hash", None)
        self.trained_from = self.source  # or RUN/base, once that is there
        self.start = world.on_main("find checkpoint", lambda: self._find_start(commit))
        self.best = self.start.best
        self.skipped_steps, self.saved_step = self.start.skipped_steps, self.start.step

    def _check_batches(self, batches: Iterable[GlobalBatch]) -> None:
        negatives = [*self._modes()[0], self.step_arguments.negatives]
        check_contrast(batches, self.store, negatives, "--train_files")

    @property
    def _stage(self) -> int:
        return self.deepspeed_config["zero_optimization"].get("stage", 0)

    def _find_start(self, commit: str | None) -> Start:
        self.fingerprint = fingerprint(
            self.store.manifest,
            self.source,
            commit,
            self.card,
            self.lora,
            self.data,
            self.step_arguments,
            self.optimizer,
            self.run,
            {
                f"{n}_embeddings": self.vectors[n].identity if n in self.vectors else "none"
                for n in ("guide", "teacher")
            },
        )
        best = self.validation.best() if self.validation else None
        return find_start(self.folder, self.fingerprint, self.run.accept_changes, self.max_steps, best)

    def require_decoder(self) -> None:
        """Raise UserError for a BERT-style encoder. Either recipe trains a decoder that is bidirectional by design."""
        if not self.kind.is_causal and is_bert_style(self.config):
            raise UserError(
                f"--model_name_or_path {self.model.model_name_or_path}: is a BERT-style encoder; "
                "ds-embed train-gpt trains decoders; use ds-embed train-bert"
            )

    def require_encoder(self) -> None:
        """UserError for a causal decoder."""
        if self.kind.is_causal:
            raise UserError(
                f"--model_name_or_path {self.model.model_name_or_path}: is a causal decoder; "
                "ds-embed train-bert trains encoders; use ds-embed train-gpt"
            )

    def train(self) -> None:
        """Prepare, load the model, run the steps from the start to the end, write RUN/model/.

        Leaves with SystemExit(EXIT_REQUEUE) when a signal asks for it, after saving a checkpoint.
        """
        self.prepare()
        if self.start.is_finished:
            return
        self.world.mark("load model")
        encoder = self._load_encoder()
        engine = start_engine(encoder, self.deepspeed_config, self.optimizer, self.world)
        if self.start.checkpoint is not None:
            load_checkpoint(engine, self.world, self.start.checkpoint, self.start.state)
        # Opened last, so that a run that could not start leaves no folder behind.
        self.world.on_main("open run", self._open_folder)
        if self.world.is_main:
            self._print_arithmetic(encoder)
        # Until here a signal ends the job at once: there is nothing to save.
        with StopRequest(self.world) as stop:
            last_step = self._run_steps(engine, stop)
            consumed = load_best(engine, self.best, last_step, self.folder, self.world) or self._consumed(last_step)
            self._save_model(encoder, consumed)
        self.folder.close()
        if self.world.is_main:
            logger.info("model written to %s", self.folder.model_dir)
            run = self.run.output_dir
            logger.info("report on the run with: ds-embed report %s", run)
            logger.info(self.next_command, run)

    def _save_model(self, encoder: Any, consumed: int) -> None:
        save_model(encoder, self.tokenizer, self._card_after(consumed), self.folder, self.world)

    def _card_after(self, consumed: int) -> Any:
        """The card of the model after training on `consumed` samples."""
        return replace(self.card, consumed_samples=consumed, temperature=self.step_arguments.temperature)

    def _open_folder(self) -> None:
        settings = [self.model, self.lora, self.data, self.step_arguments, self.optimizer, self.run]
        settings.append(self.validation_arguments)
        self.folder.open(settings, self.deepspeed_config, self.run, self.start.step, self.best.last_validation)
        clear_way(self.folder, self.start)

    def _consumed(self, number: int) -> int:
        """Samples consumed after step `number`; a resumed run continues the count of its checkpoint."""
        return self.start.consumed_samples + (number - self.start.step) * self.step_arguments.global_batch_size

    def _ends_epoch(self, number: int) -> bool:
        """Whether a pass over the data ends with or within step `number`."""
        size, consumed = self.order.samples_per_pass, self._consumed(number)
        return number > 0 and consumed // size > (consumed - self.step_arguments.global_batch_size) // size

    def _run_steps(self, engine: Any, stop: StopRequest) -> int:
        """Train until max_steps or early stopping; returns the last step."""
        contrastive = self._step(engine)
        number, seconds, told = self.start.step, 0.0, None
        engine.train()
        # The next step's inputs are made while this one is computed.
        steps = range(number, self.max_steps)
        inputs = made_ahead(lambda done: contrastive.prepare(self.batch(self._consumed(done))), steps)
        with (
            contextlib.closing(inputs),
            StepLog(self.world, self.folder, number, self.max_steps, self.run.log_interval, self.store.facts()) as log,
        ):
            # The model before training, or one whose validation a signal has cut short.
            self._validate(engine, stop, number, log)
            while number < self.max_steps and not self.best.is_exhausted:
                self._leave_if_asked(engine, stop.agreed(told), number)
                number += 1
                started = time.perf_counter()
                self.world.mark("data", number)
                step_inputs = next(inputs)
                rate = learning_rate(number, self.max_steps, self.optimizer)
                result = contrastive.run(step_inputs, (stop.received, seconds, peak_memory_gib(self.world.device)))
                told, slowest, peak_gib = result.told
                if slowest > _LONG_STEP_SECONDS:  # the ranks ask again, so that no signal waits for a further step
                    told = None
                # Nothing was backpropagated from a loss that is not finite, and DeepSpeed refuses a gradient that
                # is not: either way no rank has changed a weight.
                self.world.mark("optimizer")
                norm = take_step(engine, rate) if result.is_finite else math.nan
                is_skipped = not math.isfinite(norm)
                if is_skipped:
                    self.skipped_steps += 1
                    self._report_skip(number, result, step_inputs.batch)
                seconds = time.perf_counter() - started
                skipped_steps = self.skipped_steps if is_skipped else None
                log.add(number, self._consumed(number), rate, norm, result, seconds, peak_gib, skipped_steps)
                # Before the checkpoint, so that the checkpoint knows the outcome.
                is_among_best = self._validate(engine, stop, number, log)
                is_last = number == self.max_steps or self.best.is_exhausted
                interval = self.run.save_interval
                is_asked = (interval and number % interval == 0) or (
                    self.run.save_each_epoch and self._ends_epoch(number)
                )
                if is_last or is_among_best or is_asked:
                    self._save(engine, number)
        if number < self.max_steps and self.world.is_main:
            logger.info(
                "stopped early after step %d of %d: %d validation(s) without a better %s (--early_stopping_patience)",
                number,
                self.max_steps,
                self.best.num_without_better,
                self.best.metric,
            )
        return number

    def _step(self, engine: Any) -> ContrastiveStep:
        return ContrastiveStep(engine, self.store, self.world, self.step_arguments, self.run.seed, self.vectors)

    def _validate(self, engine: Any, stop: StopRequest, number: int, log: StepLog) -> bool:
        """Measure the model if that is due after step `number`; True when it is one of the best, to be saved."""
        if self.validation is None or number == self.best.last_validation:
            return False
        if not self.validation.is_due(number, self.max_steps, self._ends_epoch(number)):
            return False
        self.world.mark("validate")
        started, consumed = time.perf_counter(), self._consumed(number)
        try:
            metrics = self.validation.run(engine, consumed, stop)
        except StoppedMeanwhile:  # the resumed run will do it
            self._leave_if_asked(engine, stop.agreed(), number)
            raise AssertionError("a signal that all ranks had agreed on is gone") from None
        is_among_best = self.best.add(number, consumed, metrics[self.best.metric])
        log.add_validation(number, consumed, metrics, time.perf_counter() - started, self.best.describe())
        return is_among_best

    def _leave_if_asked(self, engine: Any, signal_name: str | None, number: int) -> None:
        """End the job after a step, the same one on all ranks, if any rank has received a signal."""
        if signal_name is None:
            return
        if number > self.saved_step:
            self._save(engine, number)
        self.folder.close()
        if self.world.is_main:
            place = f"after step {number}, which was saved" if number else "before the first step"
            logger.info(
                "%s: stopped %s; the same command resumes from there (exit code %d)", signal_name, place, EXIT_REQUEUE
            )
        raise SystemExit(EXIT_REQUEUE)

    def _save(self, engine: Any, number: int) -> None:
        self.world.mark("save")
        state = {
            "consumed_samples": self._consumed(number),
            "max_steps": self.max_steps,
            "skipped_steps": self.skipped_steps,
            "best": self.best.state(),
            "written_by": f"{self.world.size} rank(s), ZeRO-{self._stage}",
            "model": self.world.on_main("describe the model", lambda: self._describe_model(number)),
        }
        save_checkpoint(
            engine,
            self.world,
            self.folder.checkpoints_dir,
            number,
            state,
            before=self.folder.sync_log,
            made_from=self.fingerprint,
        )
        if self.world.is_main:
            prune(self.folder.checkpoints_dir, self.run.save_total_limit, self.best.steps)
        self.saved_step = number

    def _describe_model(self, number: int) -> dict[str, Any]:
        """What a step's weights are encoded with, without the run being finished or its command known."""
        source, folder = self.trained_from, checkpoint_path(self.folder.checkpoints_dir, number)
        commit = getattr(self.config, "_commit_hash", None)
        return {
            "base": way_to(source.base, folder),
            "base_content": identify_weights(source.base, commit),
            "revision": commit or source.revision,
            "adapter": way_to(str(source.adapter), folder) if source.adapter else None,
            "tokenizer": way_to(source.tokenizer, folder),
            "card": self._card_after(self._consumed(number)).content,
            "lora": asdict(self.lora),
        }

    def _report_skip(self, number: int, result: StepResult, batch: GlobalBatch) -> None:
        """Warn about a step whose loss or gradient is not finite, or raise UserError after too many of them."""
        message = non_finite_message(number, result, batch, self.store)
        limit, skipped_steps = self.run.max_skipped_steps, self.skipped_steps
        if skipped_steps > limit:
            raise UserError(f"{message}. Lower --learning_rate, raise --warmup_steps, or try --bf16 false")
        if self.world.is_main:
            logger.warning("warning: %s; skipped, %d of --max_skipped_steps %d", message, skipped_steps, limit)

    def _load_encoder(self):
        import torch

        dtype = torch.bfloat16 if self.run.bf16 else torch.float32
        source = self.trained_from = self._source_to_train()
        with partitioned_loading(self.deepspeed_config):
            encoder = load_encoder(
                source,
                **self.card.encoding,
                bf16=self.run.bf16,
                attn_implementation=self.kernel,
                trust_remote_code=self.model.trust_remote_code,
                trained=self.lora,
            )
            encoder.make_unit_vectors()
            if self.lora.lora_rank and source.adapter is None:
                add_lora(encoder, self.lora, seed=self.run.seed, dtype=dtype)
            elif self.lora.lora_rank:
                start_training(encoder, dtype)
        if self.step_arguments.gradient_checkpointing:
            # The reentrant kind fails under ZeRO-2 and 3 when one graph holds several forwards.
            encoder.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.step_arguments.learnable_temperature:
            encoder.learn_temperature()
        teacher, num_dims = self.vectors.get("teacher"), self.card.dimensions(self.kind.num_dims)
        if teacher is not None and self.step_arguments.teacher_loss != "scores" and teacher.num_dims != num_dims:
            encoder.learn_projection(num_dims, teacher.num_dims, self.run.seed)
        if self.world.device.type == "cpu":
            use_cpu_dropout(encoder)
        return encoder

    def _source_to_train(self) -> ModelSource:
        """Where training starts: with a LoRA run's own matrices, or with RUN/base, its base with them merged in."""
        if self.source.adapter is None or (self.lora.lora_rank and not self.lora.new_lora):
            return self.source
        trust = self.model.trust_remote_code
        self.world.on_main(
            "merge the adapter", lambda: merge_adapter(self.source, self.card, self.folder.own("base"), trust)
        )
        if not self.folder.path.joinpath("base", "config.json").exists():
            raise UserError(
                f"--output_dir {self.folder.path}: must be on a file system shared by all nodes, because of base/"
            )
        return replace(self.source, base=str(self.folder.path / "base"), adapter=None)

    def batch(self, first_sample: int) -> GlobalBatch:
        """The global batch of the samples from `first_sample` on."""
        return training_batch(self.store, self.order, self.data, self.step_arguments, first_sample)

    def _modes(self) -> tuple[list[str], list[int]]:
        return modes_of_files(self.data, self.step_arguments, len(self.data.train_files))

    def _print_arithmetic(self, encoder: Any) -> None:
        """Print what a step consists of, as computed from the first batch."""
        batch = self.batch(0)
        budget, is_packed = self.step_arguments.micro_batch_tokens, encoder.is_packed
        plan = plan_micro_batches(batch.lengths, budget, self.world.size, is_packed)
        trained = sum(whole_size(p) for p in encoder.parameters() if p.requires_grad)
        total = sum(whole_size(p) for p in encoder.parameters())
        modes, hards = self._modes()
        negatives = [*modes, self.step_arguments.negatives]
        directions = self.step_arguments.directions
        seen = [
            batch.num_shared(mode)
            + (0 if mode == "all" else group.num_own)
            - (mode in ("all", "own"))
            + (batch.num_queries - 1) * len({"document_query", "query_query"}.intersection(directions))
            + ("document_document" in directions)
            * (batch.num_shared("all") - 1 - group.num_own if mode == "all" else batch.num_queries - 1)
            for group in batch.groups
            for mode in [negatives[group.file]]
        ]
        lines = [
            f"records        {self.store.num_records:,} in {len(self.data.train_files)} file(s)",
            f"steps          {self.max_steps:,} of {len(batch.records):,} samples",
            f"weights        {trained:,} trained of {total:,}, "
            f"{'bf16' if self.run.bf16 else 'fp32'}, ZeRO-{self._stage}, {self.world.size} rank(s)",
            f"first step     {len(batch.rows):,} texts with {batch.num_tokens_named:,} tokens, at most "
            f"{max([0, *seen]):,} negatives per query",
            f"unique texts   {len(batch.texts):,} with {plan.num_tokens:,} tokens; each is encoded once",
            f"micro-batches  {plan.num_micro_batches} per rank, at most {budget:,} tokens each, "
            f"{plan.padding_share:.1%} padding",
            f"attention      {describe_choice(self.kernel, self.against_varlen)}",
        ]
        if self.lora.lora_rank:
            matrices = f"continued from {self.source.adapter}" if self.source.adapter else "new matrices"
            if self.lora.new_lora:
                matrices = f"new matrices on {self.folder.path / 'base'}, into which {self.source.adapter} is merged"
            lines.insert(
                3,
                f"{self.lora.lora_variant:<15}rank {self.lora.lora_rank}, alpha {self.lora.lora_alpha:g}, on "
                f"{' '.join(self.lora.lora_target_modules)}, {matrices}",
            )
        elif self.source.adapter:
            lines.insert(
                3, f"merged         {self.source.adapter} into {self.folder.path / 'base'}, all weights trained"
            )
        if self.order.probabilities is not None:
            unit = "batches" if self.order.batch_size else "samples"
            shares = zip(self.data.train_files, self.order.source_sizes, self.order.probabilities)
            lines += [f"file           {share:.2%} of {unit}, {size:,} records: {path}" for path, size, share in shares]
        if self.data.hard_negatives_per_file or self.step_arguments.negatives_per_file:
            for path, kind, mode, hard in zip(self.data.train_files, self.store.kinds_of_files, modes, hards):
                what = f"negatives {mode}, {hard} of its own a query"
                what = f"scored pairs, {self.step_arguments.pair_loss}" if kind == "scored" else what
                lines.append(f"file           {what}: {path}")
        for path, value in zip(self.data.train_files, self.step_arguments.temperature_per_file):
            lines.append(f"file           temperature {value:g}: {path}")
        if (guide := self.vectors.get("guide")) is not None:
            share = guided_share(batch, guide.of(batch), self.step_arguments)
            lines.append(
                f"guide          {guide.num_dims} dimensions of {self.step_arguments.guide_embeddings}; of the first batch it leaves out "
                f"{share:.2%} of the pairs of a query and another's document"
            )
        if (teacher := self.vectors.get("teacher")) is not None:
            through = ", through a linear map" if encoder.projection is not None else ""
            lines.append(
                f"teacher        {teacher.num_dims} dimensions of {self.step_arguments.teacher_embeddings}{through}: "
                f"{self.step_arguments.teacher_loss} times {self.step_arguments.teacher_weight:g}"
            )
        if self.validation is not None:
            lines.append(f"validation     {self.validation.describe()}")
        lines += self.card.describe(self.tokenizer) + describe_prefixes(self.data, self.card)
        logger.info("\n".join(lines))
