"""The DeepSpeed engine around the encoder: the only caller of deepspeed.initialize."""

import contextlib
import io
import math
from collections.abc import Iterator
from typing import Any

import torch

from ds_embed.job.ranks import World
from ds_embed.models.encoder import TextEncoder
from ds_embed.settings import OptimizerArguments


@contextlib.contextmanager
def partitioned_loading(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, models loaded inside are partitioned while loading: no rank holds one whole."""
    if deepspeed_config["zero_optimization"].get("stage", 0) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(deepspeed_config)  # transformers looks it up as long as it lives
    yield
    del keep


def start_engine(encoder: TextEncoder, config: dict[str, Any], arguments: OptimizerArguments, world: World) -> Any:
    """Wrap the encoder and an AdamW over its trained weights in a DeepSpeed engine."""
    import deepspeed

    optimizer = torch.optim.AdamW(
        _parameter_groups(encoder, arguments.weight_decay),
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        # On a CPU a tenth of the time; an optimizer that is offloaded from another device runs on the CPU too.
        fused=world.device.type in ("cuda", "cpu") or "offload_optimizer" in config["zero_optimization"] or None,
    )
    # Its bfloat16 optimizer prints memory readings of its own start.
    with _exact_buffers(encoder), contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(model=encoder, optimizer=optimizer, config=config)
    if hasattr(engine.optimizer, "fp32_groups"):
        _undo_first_step(engine.optimizer)
    return engine


def _undo_first_step(optimizer: Any) -> None:
    """Under ZeRO-0 in bfloat16 DeepSpeed makes AdamW's state by a step on zero gradients: take it back.

    It would decay the masters once and start the bias correction at the second step.
    """
    optimizer.optimizer.state.clear()
    for working, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups):
        for parameter, master in zip(working, masters):
            master.data.copy_(parameter.data)


def start_inference_engine(encoder: TextEncoder, deepspeed_config: dict[str, Any]) -> Any:
    """Wrap the encoder for forward passes only; under ZeRO-3 its weights stay partitioned."""
    import deepspeed

    with _exact_buffers(encoder):
        engine, *_ = deepspeed.initialize(model=encoder, config=deepspeed_config)
    return engine


@contextlib.contextmanager
def _exact_buffers(encoder: TextEncoder) -> Iterator[None]:
    """Keep float buffers as they are while DeepSpeed casts the module.

    Rotary frequencies in bfloat16 would put far tokens at the wrong angle, and whoever loads the
    trained model later would run it with other ones.
    """
    buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers() if buffer.is_floating_point()}
    yield
    for name, buffer in encoder.named_buffers():
        if name in buffers:
            buffer.data = buffers[name].to(buffer.device)


def _parameter_groups(encoder: TextEncoder, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: biases and norms, which are vectors, are not decayed."""
    groups: dict[float, list[torch.nn.Parameter]] = {weight_decay: [], 0.0: []}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            # Under ZeRO-3 `parameter` is an empty shard; ds_shape has its true shape.
            is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            groups[0.0 if is_vector else weight_decay].append(parameter)
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items() if params]


def take_step(engine: Any, rate: float) -> float:
    """Clip, let AdamW change the weights with learning rate `rate`, and return the gradient's norm before clipping.

    A norm that is not finite (inf or nan) says that no weight was changed. Under ZeRO-0 DeepSpeed keeps no
    norm, and every rank has the whole averaged gradient: take it from there.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    if engine.zero_optimization_stage() > 0:
        engine.step()
        norm = float(engine.get_global_grad_norm())
        return norm if norm >= 0 else math.inf  # DeepSpeed's norm of a gradient that is not finite may be -1
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm([g.float() for g in gradients]))
    if math.isfinite(norm):
        engine.step()
    else:  # in float32 nothing would stop it from reaching the weights
        engine.module.zero_grad()
    return norm


def gather_weights(encoder: torch.nn.Module, names: set[str] | None, world: World) -> dict[str, torch.Tensor]:
    """CPU copies of the named parameters (all if None) and buffers on rank 0; an empty dict elsewhere.

    Every rank must call it. Under ZeRO-3 one parameter at a time is made whole.
    """
    from deepspeed import zero

    weights = {}
    for name, parameter in encoder.named_parameters():
        if names is None or name in names:
            partitioned = hasattr(parameter, "ds_id")
            with zero.GatheredParameters([parameter]) if partitioned else contextlib.nullcontext():
                if world.is_main:
                    weights[name] = parameter.detach().cpu().clone()
    if names is None and world.is_main:
        persistent = encoder.state_dict(keep_vars=True).keys()
        weights |= {n: b.detach().cpu().clone() for n, b in encoder.named_buffers() if n in persistent}
    return weights
