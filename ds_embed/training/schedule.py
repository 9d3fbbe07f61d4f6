"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math

from ds_embed.config import OptimizerArguments


def learning_rate(step: int, max_steps: int, arguments: OptimizerArguments) -> float:
    """Rate of optimizer step `step` (the first is 1) of `max_steps`.

    Linear rise over warmup_steps, then decay from learning_rate to min_learning_rate, then
    constant_steps at min_learning_rate. "constant" stays at learning_rate until the constant part.
    """
    peak, floor = arguments.learning_rate, arguments.min_learning_rate
    if step <= arguments.warmup_steps:
        return peak * step / arguments.warmup_steps
    decay_steps = max_steps - arguments.warmup_steps - arguments.constant_steps
    done = step - arguments.warmup_steps
    if done > decay_steps:
        return floor
    if arguments.lr_scheduler == "constant":
        return peak
    # The first step after the warmup still has the peak rate, the last one is a step short of the floor.
    share = (done - 1) / max(1, decay_steps)
    if arguments.lr_scheduler == "linear":
        return peak + (floor - peak) * share
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * share))
