"""The job to plan, either ready to start or hypothetical, and the table of what it needs."""

import logging
import os
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ds_embed.data.batch import GlobalBatch
from ds_embed.data.plan import Plan, check_budget, plan_micro_batches
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.loading import check_stage, choose_card, find_source, load_config, load_tokenizer
from ds_embed.models.lora_runs import resolve_lora
from ds_embed.models.varlen import VARLEN_KERNEL, why_not_gpu, why_not_model
from ds_embed.settings import (
    DataArguments,
    DryRunArguments,
    HardwareArguments,
    LoraArguments,
    ModelArguments,
    OptimizerArguments,
    RunArguments,
    SizingArguments,
    StepArguments,
    resolve_deepspeed_config,
)
from ds_embed.settings.errors import UserError
from ds_embed.tools.plan import ranks
from ds_embed.tools.plan.measure import ModelCost, measure_model
from ds_embed.tools.plan.ranks import GIB, Zero
from ds_embed.training.loop import TrainingRun
from ds_embed.training.prepare import file_formats, prepare_store, sample_order, training_batch
from ds_embed.training.schedule import count_steps

logger = logging.getLogger(__name__)

_DEFAULT_GPU_GIB = 80.0


@dataclass(frozen=True)
class Job:
    """Everything that determines what a job needs. lengths: tokens (T,) of one global batch's texts, queries first."""

    model: ModelArguments
    lora: LoraArguments
    step: StepArguments
    run: RunArguments
    deepspeed_config: dict[str, Any]
    config: Any  # of transformers
    card: EmbeddingCard
    longest_text: int  # tokens
    lengths: np.ndarray
    lengths_from: str
    max_steps: int | None
    num_ranks: int
    ranks_per_node: int
    on_gpu: bool
    is_packed: bool  # with the varlen kernel
    hardware: HardwareArguments

    @cached_property
    def cost(self) -> ModelCost:
        options: dict[str, Any] = {"bf16": self.run.bf16, "num_tokens": self.longest_text, "on_gpu": self.on_gpu}
        return measure_model(self.config, self.card, self.model, self.lora, self.step, **options)

    @cached_property
    def zero(self) -> Zero:
        return Zero.of(self.deepspeed_config)

    @cached_property
    def plan(self) -> Plan:
        return plan_micro_batches(self.lengths, self.step.micro_batch_tokens, self.num_ranks, self.is_packed)

    @cached_property
    def shape(self) -> ranks.StepShape:
        width = 2 if self.run.bf16 else 4
        return ranks.StepShape.of(self.plan, self.lengths, self.step.global_batch_size, self.step.grad_cache, width)

    @cached_property
    def flops(self) -> float:
        """FLOPs of a step on its critical path: each round of micro-batches takes as long as its slowest."""
        total, rounds = 0.0, list(zip(*self.plan.micro_batches))
        for number, together in enumerate(rounds, start=1):
            is_twice = self.step.grad_cache and number < len(rounds)  # all but the last are encoded twice
            parts = ("flops", "forward_flops") if is_twice else ("flops",)
            taken = [self.plan.tokens_taken(self.lengths, texts) for texts in together]
            total += max(float(sum(self.cost.flops(part, lengths).sum() for part in parts)) for lengths in taken)
        return total

    @property
    def compute_seconds(self) -> float:
        return self.flops / (self.hardware.gpu_tflops * 1e12 * self.hardware.efficiency)

    @property
    def available(self) -> float:
        """Bytes of memory: as given, or else those of the local GPU or, on CPUs, a rank's share of the machine's."""
        import torch

        if self.hardware.gpu_memory_gb is not None:
            return self.hardware.gpu_memory_gb * GIB
        if not self.on_gpu:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / self.ranks_per_node
        if torch.cuda.is_available():
            return torch.cuda.get_device_properties(0).total_memory
        return _DEFAULT_GPU_GIB * GIB

    def memory(self, zero: Zero, budget: int | None = None) -> ranks.Memory:
        """Memory of the rank with the most tokens. budget: a micro_batch_tokens to use instead of the job's."""
        shape = self.shape
        if budget is not None:
            shape = replace(shape, micro_batches=-(-shape.rank_tokens // budget))
        # Some step will have a full micro-batch of the longest texts, even if this one does not.
        most = -(-len(self.lengths) // self.num_ranks) * self.longest_text
        shape = replace(shape, micro_batch_tokens=min(budget or self.step.micro_batch_tokens, most))
        return ranks.rank_memory(self.cost, zero, shape, on_gpu=self.on_gpu)

    def sending(self, zero: Zero) -> tuple[dict[str, float], float]:
        """Bytes that a rank sends in a step, by purpose, and seconds. A ring across nodes is limited by the network."""
        sent, seconds = {}, 0.0
        moved = ranks.payloads(self.cost, zero, self.shape, self.step.gradient_checkpointing)
        for name, (num_bytes, kind) in moved.items():
            members = zero.group if kind == "group all-gather" else self.num_ranks
            sent[name] = num_bytes * (members - 1) / members * (2 if kind == "all-reduce" else 1)
            bandwidth = self.hardware.node_gb_per_second
            if members > self.ranks_per_node:
                bandwidth = min(bandwidth, self.hardware.network_gb_per_second)
            seconds += sent[name] / (bandwidth * 1e9)
        return sent, seconds

    def largest_budget(self, zero: Zero, available: float) -> int | None:
        """The largest micro_batch_tokens, a multiple of longest_text, that fits into `available` bytes, or None."""
        unit = self.longest_text
        # A rank never has more texts than this, so a larger budget changes nothing.
        low, high = 0, max(1, -(-len(self.lengths) // self.num_ranks))
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.memory(zero, middle * unit).peak <= available
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * unit or None


def print_dry_run(run: TrainingRun, arguments: DryRunArguments) -> None:
    """Print, on rank 0, what a training run needs on the ranks that the launcher started. Every rank must call it."""
    run.prepare()
    if not run.world.is_main:
        return
    batch = run.batch(0)
    job = Job(
        run.model,
        run.lora,
        run.step_arguments,
        run.run,
        run.deepspeed_config,
        config=run.config,
        card=run.card,
        longest_text=int(np.max(run.store.lengths)),
        lengths=batch.lengths,
        lengths_from=f"the first batch, {_named(batch)}",
        max_steps=run.max_steps,
        num_ranks=run.world.size,
        ranks_per_node=run.world.local_size,
        on_gpu=run.world.device.type == "cuda",
        is_packed=run.against_varlen is None,
        hardware=arguments,
    )
    logger.info("%s\n\ndry run: nothing was loaded, nothing written to %s", table(job), run.run.output_dir)


def job_to_size(
    world: World,
    model: ModelArguments,
    lora: LoraArguments,
    data: DataArguments,
    step: StepArguments,
    optimizer: OptimizerArguments,
    run: RunArguments,
    sizing: SizingArguments,
) -> Job:
    """A job on GPUs that need not be present. Only the model's config is read, and train_files if given."""
    deepspeed_config = resolve_deepspeed_config(
        run.deepspeed, bf16=run.bf16, max_grad_norm=optimizer.max_grad_norm, num_ranks=sizing.num_gpus
    )
    check_stage(model, deepspeed_config["zero_optimization"].get("stage", 0))
    source = find_source(model)
    config = load_config(source, model.trust_remote_code)
    lora = resolve_lora(lora, source, config, model.trust_remote_code)
    card = choose_card(source, data, model)
    num_records, queries = sizing.num_records, step.global_batch_size
    if data.train_files:
        tokenizer = load_tokenizer(source, model.trust_remote_code)
        store = prepare_store(world, data.train_files, data, step, tokenizer, file_formats(data, card))
        order = sample_order(store, data, step, run.seed)
        batch = training_batch(store, order, data, step, first_sample=0)
        lengths, lengths_from = batch.lengths, f"the first batch of train_files, {_named(batch)}"
        longest, num_records = int(np.max(store.lengths)), order.samples_per_pass
    else:
        query = min(sizing.mean_query_tokens, card.query_max_length)
        document = min(sizing.mean_doc_tokens, card.doc_max_length)
        lengths = np.repeat([query, document], [queries, queries * (1 + data.hard_negatives)])
        lengths_from = f"assumed: {query} tokens a query, {document} a document"
        longest = max(card.query_max_length, card.doc_max_length)
    check_budget(longest, step.micro_batch_tokens)
    return Job(
        model,
        lora,
        step,
        run,
        deepspeed_config,
        config=config,
        card=card,
        longest_text=longest,
        lengths=lengths,
        lengths_from=lengths_from,
        max_steps=optimizer.max_steps if num_records is None else count_steps(num_records, queries, optimizer),
        num_ranks=sizing.num_gpus,
        ranks_per_node=min(sizing.num_gpus, sizing.gpus_per_node),
        on_gpu=True,
        is_packed=_takes_varlen(config, model, run.bf16),
        hardware=sizing,
    )


def _takes_varlen(config: Any, model: ModelArguments, bf16: bool) -> bool:
    """Whether GPUs that need not be here would train with the varlen kernel, if they can."""
    if model.attn_implementation not in (None, VARLEN_KERNEL):
        return False
    against = why_not_model(config, is_trained=True) or why_not_gpu(config, bf16)
    if against and model.attn_implementation:
        raise UserError(f"--attn_implementation {VARLEN_KERNEL}: {against}; leave it out")
    return against is None


def _named(batch: GlobalBatch) -> str:
    return f"unique ones; {len(batch.rows):,} texts and {batch.num_tokens_named:,} tokens with repeats"


def choices(zero: Zero, highest_stage: int = 3) -> list[Zero]:
    """The job's own choice, then the other stages up to highest_stage, with and without offloading."""
    plain = replace(zero, offload_optimizer=False, offload_param=False, group=1)
    others = [replace(plain, stage=stage) for stage in range(4)]
    others += [replace(plain, stage=stage, offload_optimizer=True) for stage in (1, 2, 3)]
    others.append(replace(plain, stage=3, offload_optimizer=True, offload_param=True))
    return [zero, *(other for other in others if other.name != zero.name and other.stage <= highest_stage)]


def table(job: Job) -> str:
    """What the job needs, as lines of text."""
    cost, zero, plan, hardware = job.cost, job.zero, job.plan, job.hardware
    memory, (sent, seconds) = job.memory(zero), job.sending(zero)
    lines = [
        f"weights        {cost.num_trained:,} trained of {cost.num_all:,}, {'bf16' if job.run.bf16 else 'fp32'}",
        f"ranks          {job.num_ranks} on {-(-job.num_ranks // job.ranks_per_node)} node(s), {zero.name}, grad_cache "
        f"{str(job.step.grad_cache).lower()}",
        f"step           {job.step.global_batch_size:,} queries, {len(job.lengths):,} texts, {plan.num_tokens:,} tokens "
        f"({job.lengths_from})",
        f"micro-batches  {plan.num_micro_batches} per rank, at most {job.step.micro_batch_tokens:,} tokens each, "
        f"{plan.padding_share:.1%} padding" + (" (varlen attention)" if plan.is_packed else ""),
        "",
        f"Memory of a {'GPU' if job.on_gpu else 'rank'} in GiB, by phase of a step ({memory.peak_phase} is the peak)",
        "",
        f"{'':18}" + "".join(f"{name:>11}" for name in memory.phases),
    ]
    totals = {"total": [sum(parts.values()) for parts in memory.phases.values()]}
    names = dict.fromkeys(name for parts in memory.phases.values() for name in parts)
    rows = {name: [parts.get(name, 0) for parts in memory.phases.values()] for name in names} | totals
    lines += [f"{name:18}" + "".join(f"{v / GIB:11.2f}" for v in row) for name, row in rows.items() if any(row)]
    lines += ["", f"{'choice':42}{'GiB':>8}{'CPU GiB':>9}{'fits':>6}{'micro_batch_tokens':>20}{'s/step':>9}", ""]
    for number, other in enumerate(choices(zero, 3 if job.model.load_in_4bit is None else 2)):
        taken, budget = job.memory(other), job.largest_budget(other, job.available)
        lines.append(
            f"{other.name + (' (yours)' if number == 0 else ''):42}{taken.peak / GIB:8.2f}{taken.cpu / GIB:9.2f}"
            f"{'yes' if taken.peak <= job.available else 'no':>6}{f'{budget:,}' if budget else 'none fits':>20}"
            f"{job.compute_seconds + job.sending(other)[1]:9.2f}"
        )
    per_token = cost.flops("forward_flops", job.longest_text) / job.longest_text
    hours = (job.max_steps or 1000) * (job.compute_seconds + seconds) / 3600
    whole = "" if job.max_steps else " (--max_steps or --num_records give the whole run's)"
    lines += [
        "",
        f"fits: in {job.available / GIB:.1f} GiB. micro_batch_tokens: the largest that fits.",
        "",
        f"compute        {job.flops / 1e12:,.1f} TFLOP per rank and step: {job.compute_seconds:.2f} s",
        f"between ranks  {sum(sent.values()) / 1e9:.3g} GB sent by a rank and step: {seconds:.2f} s",
        *[f"               {name}: {num_bytes / 1e9:.3g} GB" for name, num_bytes in sent.items() if num_bytes],
        f"forward        {per_token / 1e9:.2f} GFLOP per token in texts of {job.longest_text} tokens",
        f"{f'{job.max_steps or 1000:,} steps':15}{hours:.2f} hours{whole}",
        "",
        f"Assumed: {hardware.efficiency:.0%} of {hardware.gpu_tflops:g} TFLOP/s; {hardware.node_gb_per_second:g} GB/s "
        f"between GPUs of a node, {hardware.network_gb_per_second:g} GB/s between nodes; no overlap of the two.",
    ]
    if not job.on_gpu:
        lines.append(
            f"The ranks here are CPUs, and all times are those of GPUs of {hardware.gpu_tflops:g} TFLOP/s: give --gpu_tflops "
            "and the bandwidths of these ranks, in the same units, for their own."
        )
    if job.on_gpu:
        lines.append(
            f"Assumed: {ranks.CONTEXT_BYTES / GIB:.1f} GiB of CUDA context and communication buffers, "
            f"{ranks.FRAGMENTATION:.0%} of the activations lost to fragments."
        )
    if zero.offload_optimizer or zero.offload_param:
        lines.append("Not counted: the time of moving offloaded tensors and of AdamW on the CPU.")
    return "\n".join(lines)
