"""What a step needs on one rank under each ZeRO stage: memory, bytes sent to other ranks, time.

    t trained, f frozen weights, b bytes of a working weight (2 in bfloat16, 4 in float32), W ranks
    h ranks that hold a whole copy together under hpZ (0 without), B reduce_bucket_size, m micro-batches

                ZeRO-0              ZeRO-1                    ZeRO-2              ZeRO-3
    weights     b (t + f)           b (t + f)                 b (t + f)           b (t + f) / W [+ b (t + f) / h]
    gradients   b t                 4 t, at the step + 4t/W   4 t / W             4 t / W
    optimizer   12 t (8 t in fp32)  12 t / W                  12 t / W            12 t / W
    buckets     -                   4 B, twice with overlap   b B, same           b B
    sent        all-reduce b t,     all-reduce b t,           all-reduce b t, m   all-gather b (t + f) for each pass,
                m with grad_cache   all-gather b t            and all-gather b t  reduce-scatter b t, m with grad_cache

Offloading the optimizer moves its row (and 4 t / W of gradients) to the CPU; offloading parameters moves their shards.
A ring sends (W - 1) / W of the data in an all-gather or reduce-scatter, and twice that in an all-reduce.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ds_embed.data.plan import Plan
from ds_embed.losses.contrastive import TILE_DOCUMENTS, TILE_QUERIES
from ds_embed.tools.plan.measure import ModelCost

GIB = 2**30
NF4_BYTES = 0.5 + 4 / 64  # per weight in 4 bits, including the float32 scale of each block of 64
# Assumptions: the CUDA context with cuBLAS's kernels and NCCL's buffers; fragments that the allocator can't reuse.
CONTEXT_BYTES = int(1.5 * GIB)
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Zero:
    """The parts of a resolved DeepSpeed config that determine memory."""

    stage: int
    bucket: int  # elements
    overlap: bool
    prefetch: int  # elements
    reuse: int  # a weight stays gathered if its next use is at most this many elements away
    persistence: int  # parameters of at most this many elements stay whole
    offload_optimizer: bool
    offload_param: bool
    group: int  # ranks that share a secondary copy (hpZ); 1 without

    @classmethod
    def of(cls, deepspeed_config: dict[str, Any]) -> "Zero":
        zero = deepspeed_config["zero_optimization"]
        stage = zero.get("stage", 0)
        offloaded = {
            part for part, where in zero.items() if isinstance(where, dict) and where.get("device", "none") != "none"
        }
        return cls(
            stage=stage,
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            overlap=bool(zero.get("overlap_comm", stage == 3)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            persistence=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            offload_optimizer=stage > 0 and "offload_optimizer" in offloaded,
            offload_param=stage == 3 and "offload_param" in offloaded,
            group=int(zero.get("zero_hpz_partition_size", 1)) if stage == 3 else 1,
        )

    @property
    def name(self) -> str:
        offload = [what for what, on in (("optimizer", self.offload_optimizer), ("weights", self.offload_param)) if on]
        hpz = f", hpZ {self.group}" if self.group > 1 else ""
        return f"ZeRO-{self.stage}" + hpz + (f", {' and '.join(offload)} on the CPU" if offload else "")


@dataclass(frozen=True)
class StepShape:
    """What the rank with the most tokens encodes in a step of W ranks."""

    num_ranks: int
    num_queries: int  # N, of the global batch
    num_texts: int  # T, of the global batch
    rank_tokens: int  # padded, in the whole step
    micro_batches: int
    micro_batch_tokens: int  # largest
    grad_cache: bool
    width: int  # bytes of a working weight

    @classmethod
    def of(cls, plan: Plan, lengths: np.ndarray, num_queries: int, grad_cache: bool, width: int) -> "StepShape":
        """lengths: (T,) tokens of the batch's texts."""
        padded = [[int(plan.tokens_taken(lengths, texts).sum()) for texts in rank] for rank in plan.micro_batches]
        tokens, largest = max(map(sum, padded)), max(map(max, padded))
        ranks, number = len(padded), plan.num_micro_batches
        return cls(ranks, num_queries, len(lengths), tokens, number, largest, grad_cache, width)


@dataclass(frozen=True)
class Memory:
    """This rank's bytes on the GPU, by part in each phase of a step, and on the CPU."""

    phases: dict[str, dict[str, float]]
    cpu: float

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> float:
        return sum(self.phases[self.peak_phase].values())


def rank_memory(cost: ModelCost, zero: Zero, shape: StepShape, *, on_gpu: bool) -> Memory:
    """Memory of a rank in the three phases where it may peak: loss, backward, optimizer step."""
    trained, width, ranks = cost.num_trained, shape.width, shape.num_ranks
    own = trained / (ranks if zero.stage else 1)  # the optimizer's share
    optimizer, cpu = (12 if zero.stage or width == 2 else 8) * own, 0.0
    weights, gathered = _weights(cost, zero, shape)
    largest = width * max(cost.trained)  # a gradient just computed
    gradients, for_step = {
        0: (width * trained, 4 * trained if width == 2 else 0),
        1: (4 * trained, 4 * own),
        2: (4 * own + largest, 0),
        3: (4 * own + largest, 0),
    }[zero.stage]
    if zero.offload_optimizer:
        cpu, optimizer = optimizer + 4 * own + (width if zero.stage < 3 else 4) * own, 0.0
        gradients, for_step = (2 if zero.stage < 3 else 1) * largest, 0
    if zero.offload_param:
        cpu, weights = cpu + weights, 0.0
    # On a CPU, a bucket takes only the pages that are written to.
    bucket = (zero.bucket if on_gpu else min(zero.bucket, trained)) if zero.stage else 0
    buckets = (4 if zero.stage == 1 else width) * bucket * (2 if zero.overlap and zero.stage < 3 else 1)
    kept, peak = (cost.of_tokens(part, shape.micro_batch_tokens) for part in ("kept_bytes", "peak_bytes"))
    if not shape.grad_cache:  # all graphs are kept; with grad_cache only the last one
        one = min(shape.micro_batch_tokens, shape.rank_tokens)
        kept = cost.of_tokens("kept_bytes", shape.rank_tokens)
        peak = kept + cost.of_tokens("peak_bytes", one) - cost.of_tokens("kept_bytes", one)
    slack = 1 + (FRAGMENTATION if on_gpu else 0)
    table = 4.0 * shape.num_texts * cost.num_dims
    copies = 4 if ranks > 1 else 3  # embeddings, gradient, and the gradient in rank order (padded, for sending)
    tiles = 12.0 * min(TILE_QUERIES, -(-shape.num_queries // ranks)) * min(TILE_DOCUMENTS, shape.num_texts)
    always = {"weights": weights + cost.buffer_bytes, "optimizer": optimizer, "embeddings": 2 * table}
    always |= {"gradients": gradients, "buckets": buckets, "context": CONTEXT_BYTES if on_gpu else 0}
    loss = {
        "activations": kept * slack,
        "gathered weights": gathered,
        "embeddings": copies * table,
        "loss tiles": tiles,
    }
    if zero.stage < 3:  # only ZeRO-3 allocates them once and for all
        loss |= {"gradients": 0, "buckets": 0}
    backward = {"activations": peak * slack, "gathered weights": gathered}
    step = {"gradients": gradients + for_step} | ({} if zero.stage == 3 else {"buckets": 0})
    return Memory({"loss": always | loss, "backward": always | backward, "optimizer": always | step}, cpu)


def _weights(cost: ModelCost, zero: Zero, shape: StepShape) -> tuple[float, float]:
    """Bytes of the weights that a rank holds, and of those temporarily gathered by ZeRO-3 or unpacked from 4 bits."""
    everything = shape.width * (cost.num_all - sum(cost.in_4bit)) + NF4_BYTES * sum(cost.in_4bit)
    if zero.stage < 3 or shape.num_ranks == 1:
        return everything, float(shape.width * max(cost.in_4bit, default=0))
    small = sum(n for n in cost.trained + cost.frozen if n <= zero.persistence)
    held = everything / shape.num_ranks + shape.width * small + (everything / zero.group if zero.group > 1 else 0)
    if not shape.grad_cache and shape.micro_batches > 1:
        # DeepSpeed frees a weight after the last graph that needs it, so one backward pass over several graphs holds
        # all.
        return held, everything - shape.width * small
    # The last weights stay from the forward to the backward pass, since only the weights after them, counted twice, lie
    # between their uses. Prefetched weights arrive in one buffer and are copied out of it one by one.
    large = cost.num_all - small
    whole = min(large, max(cost.trained + cost.frozen) + zero.prefetch + zero.reuse // 2)
    return held, shape.width * (whole + min(large, zero.prefetch))


def payloads(
    cost: ModelCost, zero: Zero, shape: StepShape, gradient_checkpointing: bool
) -> dict[str, tuple[float, str]]:
    """Bytes of the whole tensors that a step moves between ranks, and the kind of collective, by purpose."""
    width, number = shape.width, shape.micro_batches
    backwards = number if shape.grad_cache and zero.stage != 1 else 1
    table = 4.0 * shape.num_texts * cost.num_dims
    reduce = "all-reduce" if zero.stage < 3 else "reduce-scatter"
    moved = {
        "gradients": (float(width * cost.num_trained * backwards), reduce),
        "embeddings": (table, "all-gather"),
        "gradient of embeddings": (table, "reduce-scatter"),
    }
    if zero.stage in (1, 2):
        moved["updated weights"] = (float(width * cost.num_trained), "all-gather")
    if zero.stage == 3:
        small_trained = sum(n for n in cost.trained if n <= zero.persistence)
        small = small_trained + sum(n for n in cost.frozen if n <= zero.persistence)
        # Forward passes plus backward passes; the latter count at most twice if graphs are kept.
        passes = 3 * number - 1 if shape.grad_cache else number + min(2, number)
        passes += number if gradient_checkpointing else 0
        once, from_all = float(width * (cost.num_all - small)), passes if zero.group == 1 else 1
        moved["gathered weights"] = (once * from_all, "all-gather")
        moved["gathered within groups"] = (once * (passes - from_all), "group all-gather")
        moved["updated weights"] = (float(width * small_trained), "all-gather")
    return moved
