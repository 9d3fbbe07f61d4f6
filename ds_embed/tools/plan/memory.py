"""Memory of one rank, by part, under each ZeRO stage: what DeepSpeed 0.19.8 allocates as we configure it.

    t trained, f frozen weights, b bytes of a working weight (2 in bfloat16, 4 in float32), W ranks
    h ranks that hold a whole copy together under hpZ (0 without), B reduce_bucket_size

                ZeRO-0              ZeRO-1                    ZeRO-2              ZeRO-3
    weights     b (t + f)           b (t + f)                 b (t + f)           b (t + f) / W [+ b (t + f) / h]
    gradients   b t                 4 t, at the step + 4t/W   4 t / W             4 t / W
    optimizer   12 t (8 t in fp32)  12 t / W                  12 t / W            12 t / W
    buckets     -                   4 B, twice with overlap   b B, same           b B

Offloading the optimizer moves its row (and 4 t / W of gradients for it) to the CPU; offloading parameters moves
the shards. All sums of shards ignore their padding to multiples of W.
"""

from dataclasses import dataclass
from typing import Any

from ds_embed.losses.contrastive import TILE_DOCUMENTS, TILE_QUERIES
from ds_embed.tools.plan.measure import ModelCost, Parameters

GIB = 2**30
# Assumptions: the CUDA context with the kernels of cuBLAS and NCCL's buffers; fragments that the allocator can't reuse.
CONTEXT_BYTES = int(1.5 * GIB)
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Zero:
    """The parts of a resolved DeepSpeed config that decide the memory."""

    stage: int
    bucket: int  # elements
    overlap: bool
    prefetch: int  # elements
    reuse: int  # elements between two uses of a weight, up to which it stays gathered
    persistence: int  # parameters of at most so many elements stay whole
    offload_optimizer: bool
    offload_param: bool
    group: int  # ranks that hold a secondary copy together (hpZ); 1 without

    @classmethod
    def of(cls, deepspeed_config: dict[str, Any]) -> "Zero":
        zero = deepspeed_config["zero_optimization"]
        stage = zero.get("stage", 0)

        def is_offloaded(part: str) -> bool:
            return (zero.get(part) or {}).get("device", "none") != "none"

        return cls(
            stage=stage,
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            overlap=bool(zero.get("overlap_comm", stage == 3)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            offload_optimizer=stage > 0 and is_offloaded("offload_optimizer"),
            offload_param=stage == 3 and is_offloaded("offload_param"),
            group=int(zero.get("zero_hpz_partition_size", 1)) if stage == 3 else 1,
        )

    @property
    def name(self) -> str:
        offload = [what for what, on in (("optimizer", self.offload_optimizer), ("weights", self.offload_param)) if on]
        hpz = f", hpZ {self.group}" if self.group > 1 else ""
        return f"ZeRO-{self.stage}" + hpz + (f", {' and '.join(offload)} on the CPU" if offload else "")


@dataclass(frozen=True)
class StepShape:
    """What a rank encodes in a step."""

    num_queries: int  # N of the global batch
    num_texts: int  # T of the global batch
    rank_tokens: int  # padded tokens of this rank in the whole step
    micro_batches: int  # of this rank
    micro_batch_tokens: int  # largest
    grad_cache: bool


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU by part in each phase of a step, and on the CPU for this rank."""

    phases: dict[str, dict[str, float]]
    cpu: float

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> float:
        return sum(self.phases[self.peak_phase].values())


def rank_memory(cost: ModelCost, zero: Zero, shape: StepShape, *, bf16: bool, num_ranks: int, on_gpu: bool) -> Memory:
    """Memory of a rank in the three phases in which it may peak: loss, backward, optimizer step."""
    sizes, width = cost.parameters, 2 if bf16 else 4
    shards = num_ranks if zero.stage else 1
    own = sizes.num_trained / shards  # the optimizer's share
    masters = 4 * own if zero.stage or bf16 else 0.0
    state, cpu = masters + 8 * own, 0.0
    weights, gathered = _weights(sizes, zero, width, num_ranks, shape)
    if zero.offload_optimizer:
        cpu += state + 4 * own + (width if zero.stage < 3 else 4) * own
        state = 0.0
    if zero.offload_param:
        cpu, weights = cpu + weights, 0.0
    gradients, for_step = _gradients(sizes, zero, width, own, bf16)
    buckets = _buckets(sizes, zero, width, on_gpu)
    table = 4.0 * shape.num_texts * cost.num_dims
    kept, peak = _activations(cost, shape)
    context = CONTEXT_BYTES if on_gpu else 0.0
    slack = FRAGMENTATION if on_gpu else 0.0
    always = {"weights": weights + sizes.buffer_bytes, "optimizer": state, "context": context}
    reserved = gradients if zero.stage == 3 else 0.0  # ZeRO-3 allocates them once
    copies = 4 if num_ranks > 1 else 3  # embeddings, gradient, and the gradient in rank order (padded, to be sent)
    tiles = 12.0 * min(TILE_QUERIES, -(-shape.num_queries // num_ranks)) * min(TILE_DOCUMENTS, shape.num_texts)
    phases = {
        "loss": {
            "gradients": reserved,
            "activations": kept * (1 + slack),
            "gathered weights": gathered,
            "buckets": buckets if zero.stage == 3 else 0.0,
            "embeddings": copies * table,
            "loss tiles": tiles,
        },
        "backward": {
            "gradients": gradients,
            "activations": peak * (1 + slack),
            "gathered weights": gathered,
            "buckets": buckets,
            "embeddings": 2 * table,
        },
        "optimizer": {
            "gradients": gradients + for_step,
            "buckets": buckets if zero.stage == 3 else 0.0,
            "embeddings": 2 * table,
        },
    }
    return Memory({name: always | parts for name, parts in phases.items()}, cpu)


def _activations(cost: ModelCost, shape: StepShape) -> tuple[float, float]:
    """Bytes of all graphs when the loss is computed, and at the peak of the backward pass."""
    if shape.grad_cache:  # the graph of the last micro-batch is there already
        return tuple(cost.of_tokens(part, shape.micro_batch_tokens) for part in ("kept_bytes", "peak_bytes"))
    tokens = min(shape.micro_batch_tokens, shape.rank_tokens)
    one = cost.of_tokens("peak_bytes", tokens)
    kept = cost.of_tokens("kept_bytes", shape.rank_tokens)
    return kept, kept + one - cost.of_tokens("kept_bytes", tokens)


def _weights(sizes: Parameters, zero: Zero, width: int, num_ranks: int, shape: StepShape) -> tuple[float, float]:
    """Bytes of the weights a rank holds, and of those that ZeRO-3 makes whole for a while."""
    everything = float(width * sizes.num_all)
    if zero.stage < 3:
        return everything, 0.0
    small = sum(n for n in sizes.trained + sizes.frozen if n <= zero.persistence)
    held = everything / num_ranks + (width * small if num_ranks > 1 else 0)
    if zero.group > 1:
        held += everything / zero.group
    if num_ranks == 1:
        return held, 0.0
    if not shape.grad_cache and shape.micro_batches > 1:
        # DeepSpeed frees a weight after the last graph that needs it, so that one backward over several holds all.
        return held, everything - width * small
    # From the forward to the backward pass the last weights stay: between their two uses lie those behind them, twice.
    # What is prefetched arrives in one piece, and is copied out of it weight by weight.
    large = sizes.num_all - small
    whole = min(large, sizes.largest + zero.prefetch + zero.reuse // 2)
    return held, width * (whole + min(large, zero.prefetch))


def _gradients(sizes: Parameters, zero: Zero, width: int, own: float, bf16: bool) -> tuple[float, float]:
    """Bytes of gradients during the backward pass, and what the optimizer's step adds."""
    trained = sizes.num_trained
    largest = width * max(sizes.trained)  # one that was just computed
    if zero.stage == 0:
        return float(width * trained), 4.0 * trained if bf16 else 0.0
    if zero.offload_optimizer:
        return float(2 * largest if zero.stage < 3 else largest), 0.0
    if zero.stage == 1:
        return 4.0 * trained, 4 * own
    return 4 * own + largest, 0.0


def _buckets(sizes: Parameters, zero: Zero, width: int, on_gpu: bool) -> float:
    if zero.stage == 0:
        return 0.0
    element = 4 if zero.stage == 1 else width
    # A CPU gives a bucket only the pages that are written to.
    size = zero.bucket if on_gpu else min(zero.bucket, sizes.num_trained)
    return float(element * size * (2 if zero.overlap and zero.stage < 3 else 1))
