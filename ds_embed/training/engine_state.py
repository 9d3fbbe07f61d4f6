"""Reads trained weights and AdamW's moments by parameter name from any DeepSpeed engine, and writes them back.

The result does not depend on the number of ranks, the ZeRO stage or the working precision: whole float32 tensors, one
parameter at a time. Frozen weights are omitted: they come from the base model.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ds_embed.job.ranks import World
from ds_embed.models.checkpoint import WEIGHT

MOMENTS = "exp_avg", "exp_avg_sq"
KINDS = (WEIGHT, *MOMENTS)


def trained_parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that the optimizer updates, in module order."""
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def trained_shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Full shapes by name; under ZeRO-3 a parameter itself is an empty shard."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained_parameters(engine)}


def gather_state(engine: Any, world: World) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (name, {kind: float32 CPU tensor}) of each trained parameter on rank 0, empty dicts elsewhere.

    Every rank must exhaust it: a collective gathers one parameter at a time.
    """
    _ensure_moments(engine)
    own = _own_tensors(engine)
    for name, parameter in trained_parameters(engine):
        tensors = {}
        for kind in KINDS:
            whole = own[parameter][kind] if own else _gather_one(parameter, kind)
            if world.is_main:
                tensors[kind] = whole.detach().float().cpu().clone()
        yield name, tensors


def restore_state(engine: Any, world: World, adam_step: int, read: Callable[[str, str], Tensor]) -> None:
    """Load weights and moments into the engine; `read(name, kind)` returns whole tensors and runs on rank 0 only.

    Afterwards the working weights (bfloat16 or float32) equal those of an engine that never stopped.
    """
    _ensure_moments(engine)
    own = _own_tensors(engine)
    for name, parameter in trained_parameters(engine):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        for kind in KINDS:
            if world.is_main:
                whole = read(name, kind).to(world.device, torch.float32).contiguous()
            else:
                whole = torch.empty(shape, dtype=torch.float32, device=world.device)
            whole = world.broadcast(whole)
            if own:
                own[parameter][kind].data.copy_(whole)
            else:
                _set_one(parameter, kind, whole, world)
    for state in _adam(engine).state.values():
        state["step"].fill_(float(adam_step))
    _refresh_working_weights(engine)


def adam_step(engine: Any) -> int:
    """AdamW's step count, used to correct the bias of its moments; 0 before the first step."""
    # Under ZeRO-0 the count of a weight without a gradient does not advance, so the largest is the optimizer's.
    return int(max((float(state["step"]) for state in _adam(engine).state.values()), default=0.0))


def _adam(engine: Any) -> torch.optim.AdamW:
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    assert isinstance(adam, torch.optim.AdamW), type(adam)
    return adam


def _ensure_moments(engine: Any) -> None:
    """AdamW creates its state in its first step; create the same state, all zeros, where it does not exist yet."""
    adam, optimizer = _adam(engine), engine.optimizer
    if engine.zero_optimization_stage() == 3:
        masters = optimizer.fp32_partitioned_groups_flat  # its param_groups are empty between steps
    else:
        masters = [p for group in adam.param_groups for p in group["params"]]
    on_device = bool(adam.param_groups[0].get("fused") or adam.param_groups[0].get("capturable"))
    for master in masters:
        if not adam.state[master]:
            adam.state[master]["step"] = torch.zeros((), device=master.device if on_device else "cpu")
            for moment in MOMENTS:
                adam.state[master][moment] = torch.zeros_like(master, requires_grad=False)
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # ZeRO 1 and 2 link the state of all groups after the first group's step, when the others have none yet.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _own_tensors(engine: Any) -> dict[torch.nn.Parameter, dict[str, Tensor]]:
    """The tensors by parameter under ZeRO-0, where every rank holds everything; otherwise an empty dict."""
    if engine.zero_optimization_stage() > 0:
        return {}
    adam, optimizer = _adam(engine), engine.optimizer
    if optimizer is adam:  # float32: the parameters are their own masters
        masters = {p: p for _, p in trained_parameters(engine)}
    else:
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups)  # bfloat16 parameters, despite the name
        masters = {p: master for working, group in pairs for p, master in zip(working, group)}
    return {p: {WEIGHT: master, **adam.state[master]} for p, master in masters.items()}


def _gather_one(parameter: torch.nn.Parameter, kind: str) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if kind == WEIGHT:
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def _set_one(parameter: torch.nn.Parameter, kind: str, whole: Tensor, world: World) -> None:
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        if kind == WEIGHT:
            safe_set_full_fp32_param(parameter, whole)
        else:
            safe_set_full_optimizer_state(parameter, whole, kind)
        return
    # DeepSpeed's call for whole tensors fails if the last rank's shard is padded.
    size = parameter.ds_tensor.numel()
    assert size * world.size >= whole.numel(), "ZeRO-3 that shards within groups of ranks (MiCS) is not supported"
    padded = torch.nn.functional.pad(whole.flatten(), (0, size * world.size - whole.numel()))
    own = padded[world.rank * size : (world.rank + 1) * size]
    if kind == WEIGHT:
        safe_set_local_fp32_param(parameter, own)
    else:
        safe_set_local_optimizer_state(parameter, own, kind)


def _refresh_working_weights(engine: Any) -> None:
    """Copy the float32 masters into the weights that the forward pass uses, on every rank."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # shards everything, so that no stale gathered weight remains
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()  # gathers the small weights that are kept whole
        optimizer.invalidate_secondary_tensor()  # the copies within a group of ranks (hpZ) are outdated
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        for parameter, tensors in _own_tensors(engine).items():
            parameter.data.copy_(tensors[WEIGHT].data)
