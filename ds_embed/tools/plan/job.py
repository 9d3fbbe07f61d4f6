"""A job to size: its model, its texts, its ranks; and the table that says what it will take."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ds_embed.data.plan import plan_micro_batches
from ds_embed.models.card import EmbeddingCard
from ds_embed.settings import HardwareArguments, LoraArguments, ModelArguments, RunArguments, StepArguments
from ds_embed.tools.plan.estimate import StepTime, payloads, rank_flops, step_shape, step_time
from ds_embed.tools.plan.measure import ModelCost, measure_model
from ds_embed.tools.plan.memory import CONTEXT_BYTES, FRAGMENTATION, GIB, Memory, Zero, rank_memory

DEFAULT_GPU_GIB = 80.0
PARTS = (
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "gathered weights",
    "buckets",
    "embeddings",
    "loss tiles",
    "context",
)


@dataclass(frozen=True)
class Job:
    """Everything that decides what a job takes. lengths: tokens (T,) of one global batch, the queries first."""

    model: ModelArguments
    lora: LoraArguments
    step: StepArguments
    run: RunArguments
    deepspeed_config: dict[str, Any]
    config: Any  # transformers'
    card: EmbeddingCard
    longest_text: int  # tokens
    lengths: np.ndarray
    lengths_from: str
    max_steps: int | None
    num_ranks: int
    ranks_per_node: int
    on_gpu: bool
    hardware: HardwareArguments


class Sizing:
    """The counts of a job, and what follows from them for any ZeRO stage."""

    def __init__(self, job: Job):
        self.job = job
        self.cost: ModelCost = measure_model(
            job.config,
            job.card,
            job.model,
            job.lora,
            bf16=job.run.bf16,
            gradient_checkpointing=job.step.gradient_checkpointing,
            learnable_temperature=job.step.learnable_temperature,
            num_tokens=job.longest_text,
            on_gpu=job.on_gpu,
        )
        self.zero = Zero.of(job.deepspeed_config)
        self.plan = plan_micro_batches(job.lengths, job.step.micro_batch_tokens, job.num_ranks)
        self.shape = step_shape(self.plan, job.lengths, job.step.global_batch_size, job.step.grad_cache)
        self.flops = rank_flops(self.cost, self.plan, job.lengths, job.step.grad_cache)

    def memory(self, zero: Zero, budget: int | None = None) -> Memory:
        """Of the rank with the most tokens. budget: another micro_batch_tokens than the job's."""
        shape = self.shape
        if budget is not None:
            shape = replace(shape, micro_batch_tokens=budget, micro_batches=-(-shape.rank_tokens // budget))
        # Some step has a full micro-batch of the longest texts, whatever this one has.
        most = -(-len(self.job.lengths) // self.job.num_ranks) * self.job.longest_text
        shape = replace(shape, micro_batch_tokens=min(budget or self.job.step.micro_batch_tokens, most))
        return rank_memory(
            self.cost, zero, shape, bf16=self.job.run.bf16, num_ranks=self.job.num_ranks, on_gpu=self.job.on_gpu
        )

    def time(self, zero: Zero) -> StepTime:
        checkpointing = self.job.step.gradient_checkpointing
        payload = payloads(self.cost, zero, self.shape, bf16=self.job.run.bf16, gradient_checkpointing=checkpointing)
        return step_time(
            self.flops, payload, self.job.num_ranks, self.job.ranks_per_node, zero.group, self.job.hardware
        )

    def largest_budget(self, zero: Zero, available: float) -> int | None:
        """The largest micro_batch_tokens that fits into `available` bytes, in longest texts; None if none does."""
        unit = self.job.longest_text
        # A rank has no more texts than this; a larger budget changes nothing.
        low, high = 0, max(1, -(-len(self.job.lengths) // self.job.num_ranks))
        while low < high:
            middle = (low + high + 1) // 2
            if self.memory(zero, middle * unit).peak <= available:
                low = middle
            else:
                high = middle - 1
        return low * unit or None


def choices(zero: Zero) -> list[Zero]:
    """The job's own choice, then every other stage with and without offloading."""
    plain = replace(zero, offload_optimizer=False, offload_param=False, group=1)
    others = [replace(plain, stage=stage) for stage in range(4)]
    others += [replace(plain, stage=stage, offload_optimizer=True) for stage in (1, 2, 3)]
    others.append(replace(plain, stage=3, offload_optimizer=True, offload_param=True))
    return [zero, *(other for other in others if other.name != zero.name)]


def table(job: Job) -> str:
    """What the job takes, as lines of text."""
    sizing = Sizing(job)
    zero, memory = sizing.zero, sizing.memory(sizing.zero)
    available = (job.hardware.gpu_memory_gb or DEFAULT_GPU_GIB) * GIB
    unit = "GPU" if job.on_gpu else "rank"
    lines = _heading(job, sizing)
    lines += ["", f"Memory of a {unit} in GiB, by phase of a step ({memory.peak_phase} is the peak)", ""]
    lines += _by_part(memory.phases)
    stages = [other for other in choices(zero) if other.stage != zero.stage and not other.offload_optimizer]
    peaks = {"yours": memory} | {other.name: sizing.memory(other) for other in stages}
    lines += ["", "At the peak of each stage", ""]
    lines += _by_part({name: found.phases[found.peak_phase] for name, found in peaks.items()})
    lines += ["", f"{'choice':42}{'GiB':>8}{'CPU GiB':>9}{'fits':>6}{'micro_batch_tokens':>20}{'s/step':>9}", ""]
    for number, other in enumerate(choices(zero)):
        found, budget = sizing.memory(other), sizing.largest_budget(other, available)
        lines.append(
            f"{other.name + (' (yours)' if number == 0 else ''):42}{found.peak / GIB:8.2f}{found.cpu / GIB:9.2f}"
            f"{'yes' if found.peak <= available else 'no':>6}{f'{budget:,}' if budget else 'none fits':>20}"
            f"{sizing.time(other).seconds:9.2f}"
        )
    lines += ["", f"fits: in {available / GIB:.1f} GiB. micro_batch_tokens: the largest that fits."]
    return "\n".join(lines + _time_lines(job, sizing) + _assumptions(job, zero))


def _by_part(columns: dict[str, dict[str, float]]) -> list[str]:
    """A table in GiB of bytes by part, in named columns, with their sums."""
    lines = [f"{'':18}" + "".join(f"{name:>11}" for name in columns)]
    for part in PARTS:
        values = [parts.get(part, 0.0) for parts in columns.values()]
        if any(values):
            lines.append(f"{part:18}" + "".join(f"{value / GIB:11.2f}" for value in values))
    totals = [sum(parts.values()) for parts in columns.values()]
    return [*lines, f"{'total':18}" + "".join(f"{value / GIB:11.2f}" for value in totals)]


def _heading(job: Job, sizing: Sizing) -> list[str]:
    plan, sizes, nodes = sizing.plan, sizing.cost.parameters, -(-job.num_ranks // job.ranks_per_node)
    return [
        f"weights        {sizes.num_trained:,} trained of {sizes.num_all:,}, {'bf16' if job.run.bf16 else 'fp32'}",
        f"ranks          {job.num_ranks} on {nodes} node(s), {sizing.zero.name}, grad_cache {str(job.step.grad_cache).lower()}",
        f"step           {job.step.global_batch_size:,} queries, {len(job.lengths):,} texts, {plan.num_tokens:,} tokens "
        f"({job.lengths_from})",
        f"micro-batches  {plan.num_micro_batches} per rank of at most {job.step.micro_batch_tokens:,} tokens, padding "
        f"{plan.padding_share:.1%}",
    ]


def _time_lines(job: Job, sizing: Sizing) -> list[str]:
    time = sizing.time(sizing.zero)
    sent = ", ".join(f"{name} {num_bytes / 1e9:.3g}" for name, num_bytes in time.wire_bytes.items() if num_bytes)
    per_token = sizing.cost.flops("forward_flops", job.longest_text) / job.longest_text
    lines = [
        "",
        f"compute        {time.flops / 1e12:,.1f} TFLOP per rank and step: {time.compute_seconds:.2f} s",
        f"between ranks  {sum(time.wire_bytes.values()) / 1e9:.3g} GB sent by a rank and step: {time.wire_seconds:.2f} s",
    ]
    if sent:
        lines.append(f"               GB: {sent}")
    lines.append(f"forward        {per_token / 1e9:.2f} GFLOP per token in texts of {job.longest_text} tokens")
    if job.max_steps is None:
        hours = 1000 * time.seconds / 3600
        return [*lines, f"1,000 steps    {hours:.2f} hours (--max_steps or --num_records give the whole run's)"]
    return [*lines, f"{f'{job.max_steps:,} steps':15}{job.max_steps * time.seconds / 3600:.2f} hours"]


def _assumptions(job: Job, zero: Zero) -> list[str]:
    hardware = job.hardware
    lines = [
        "",
        f"Assumed: {hardware.efficiency:.0%} of {hardware.gpu_tflops:g} TFLOP/s; {hardware.node_gb_per_second:g} GB/s "
        f"between GPUs of a node, {hardware.network_gb_per_second:g} GB/s between nodes; no overlap of the two.",
    ]
    if job.on_gpu:
        lines.append(
            f"Assumed: {CONTEXT_BYTES / GIB:.1f} GiB of CUDA context and communication buffers, "
            f"{FRAGMENTATION:.0%} of the activations lost to fragments."
        )
    if zero.offload_optimizer or zero.offload_param:
        lines.append("Not counted: the time of moving offloaded tensors and of AdamW on the CPU.")
    return lines
