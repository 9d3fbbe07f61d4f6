"""FLOPs, bytes between ranks, and time of a step, from what was counted and what is assumed of the machines.

Bytes are what one rank sends with ring algorithms, of W ranks: an all-gather or reduce-scatter of n bytes sends
n (W - 1) / W, an all-reduce twice that. Per step, with t trained and a all weights of b bytes, m micro-batches:

    ZeRO-0  all-reduce b t (m times with grad_cache)
    ZeRO-1  all-reduce b t, all-gather b t
    ZeRO-2  all-reduce b t (m times with grad_cache), all-gather b t
    ZeRO-3  all-gather b a: m forward passes (2 m - 1 with grad_cache) and m backward passes (at most 2 when graphs
            are kept; m more with gradient_checkpointing), less what stays whole; reduce-scatter b t (m with grad_cache)
    always  all-gather and reduce-scatter of the T x D table in float32
"""

from dataclasses import dataclass

import numpy as np

from ds_embed.data.plan import Plan
from ds_embed.settings import HardwareArguments
from ds_embed.tools.plan.measure import ModelCost
from ds_embed.tools.plan.memory import StepShape, Zero


@dataclass(frozen=True)
class StepTime:
    flops: float  # of the slowest rank
    wire_bytes: dict[str, float]  # sent by a rank, by what for
    compute_seconds: float
    wire_seconds: float

    @property
    def seconds(self) -> float:
        """As if nothing overlapped."""
        return self.compute_seconds + self.wire_seconds


def step_shape(plan: Plan, lengths: np.ndarray, num_queries: int, grad_cache: bool) -> StepShape:
    """What the rank with the most tokens encodes. lengths: tokens (T,) of the batch's texts."""
    padded = [[len(texts) * int(lengths[texts].max(initial=0)) for texts in rank] for rank in plan.micro_batches]
    return StepShape(
        num_queries=num_queries,
        num_texts=len(lengths),
        rank_tokens=max(sum(rank) for rank in padded),
        micro_batches=plan.num_micro_batches,
        micro_batch_tokens=max(max(rank) for rank in padded),
        grad_cache=grad_cache,
    )


def rank_flops(cost: ModelCost, plan: Plan, lengths: np.ndarray, grad_cache: bool) -> float:
    """FLOPs of a step, each round of micro-batches as long as its longest; grad_cache encodes all but the last twice."""

    def flops(texts: np.ndarray, twice: bool) -> float:
        if not len(texts):
            return 0.0
        length = float(lengths[texts].max())
        again = cost.flops("forward_flops", length) if twice else 0.0
        return len(texts) * (cost.flops("flops", length) + again)

    rounds = list(zip(*plan.micro_batches))
    twice = [grad_cache] * (len(rounds) - 1) + [False]
    return sum(max(flops(texts, again) for texts in together) for together, again in zip(rounds, twice))


def payloads(
    cost: ModelCost, zero: Zero, shape: StepShape, *, bf16: bool, gradient_checkpointing: bool
) -> dict[str, tuple[float, str]]:
    """Bytes of the whole tensors that a step moves between ranks and the kind of collective, by what for."""
    sizes, width, number = cost.parameters, 2 if bf16 else 4, shape.micro_batches
    backwards = number if shape.grad_cache and zero.stage != 1 else 1
    reduction = "all-reduce" if zero.stage < 3 else "reduce-scatter"
    table = 4.0 * shape.num_texts * cost.num_dims
    found = {
        "gradients": (float(width * sizes.num_trained * backwards), reduction),
        "embeddings": (table, "all-gather"),
        "gradient of embeddings": (table, "reduce-scatter"),
    }
    if zero.stage in (1, 2):
        found["updated weights"] = (float(width * sizes.num_trained), "all-gather")
    if zero.stage == 3:
        small = [n for n in sizes.trained + sizes.frozen if n <= zero.persistence]
        passes = 3 * number - 1 if shape.grad_cache else number + min(2, number)
        passes += number if gradient_checkpointing else 0
        once = float(width * (sizes.num_all - sum(small)))
        from_all = passes if zero.group == 1 else 1
        found["gathered weights"] = (once * from_all, "all-gather")
        found["gathered within groups"] = (once * (passes - from_all), "group all-gather")
        small_trained = sum(n for n in sizes.trained if n <= zero.persistence)
        found["updated weights"] = (float(width * small_trained), "all-gather")
    return found


def step_time(
    flops: float,
    payload: dict[str, tuple[float, str]],
    num_ranks: int,
    ranks_per_node: int,
    group: int,
    hardware: HardwareArguments,
) -> StepTime:
    """Seconds at the efficiency and bandwidths given. A ring over several nodes is as fast as the network.

    group: ranks that gather among themselves under hpZ, 1 without.
    """
    share = (num_ranks - 1) / num_ranks
    times = {
        "all-reduce": 2 * share,
        "all-gather": share,
        "reduce-scatter": share,
        "group all-gather": (group - 1) / group,
    }
    sent = {name: num_bytes * times[kind] for name, (num_bytes, kind) in payload.items()}
    seconds = 0.0
    for name, (_, kind) in payload.items():
        bandwidth = hardware.node_gb_per_second
        if (group if kind == "group all-gather" else num_ranks) > ranks_per_node:
            bandwidth = min(bandwidth, hardware.network_gb_per_second)
        seconds += sent[name] / (bandwidth * 1e9)
    return StepTime(flops, sent, flops / (hardware.gpu_tflops * 1e12 * hardware.efficiency), seconds)
