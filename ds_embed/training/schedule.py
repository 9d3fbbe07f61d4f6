"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

import math

from ds_embed.settings import OptimizerArguments
from ds_embed.settings.errors import UserError


def warmup_steps(max_steps: int, arguments: OptimizerArguments) -> int:
    """Steps of linear warmup in a run of `max_steps`."""
    if arguments.warmup_ratio is None:
        return arguments.warmup_steps
    return math.ceil(arguments.warmup_ratio * max_steps)


def learning_rate(step: int, max_steps: int, arguments: OptimizerArguments) -> float:
    """Learning rate of optimizer step `step` (the first is 1) of `max_steps`.

    Linear warmup, then decay from learning_rate to min_learning_rate, then constant_steps at min_learning_rate. The
    scheduler "constant" stays at learning_rate until these last steps.
    """
    peak, floor = arguments.learning_rate, arguments.min_learning_rate
    warmup = warmup_steps(max_steps, arguments)
    if step <= warmup:
        return peak * step / warmup
    decay_steps = max_steps - warmup - arguments.constant_steps
    done = step - warmup
    if done > decay_steps:
        return floor
    if arguments.lr_scheduler == "constant":
        return peak
    # The first step after the warmup still has the peak rate; the last one is one step short of the floor.
    share = (done - 1) / max(1, decay_steps)
    if arguments.lr_scheduler == "linear":
        return peak + (floor - peak) * share
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * share))


def count_steps(num_records: int, global_batch_size: int, arguments: OptimizerArguments) -> int:
    """Steps of a run: max_steps or num_train_epochs, whichever is reached first; one epoch if neither is given."""
    if num_records < global_batch_size:
        raise UserError(
            f"--global_batch_size {global_batch_size}: the training files have only {num_records} records; "
            f"lower it to at most {num_records}"
        )
    epochs = arguments.num_train_epochs or (None if arguments.max_steps else 1.0)
    limits = [] if arguments.max_steps is None else [arguments.max_steps]
    if epochs is not None:
        limits.append(math.ceil(epochs * num_records / global_batch_size))
    steps = min(limits)
    if (warmup := warmup_steps(steps, arguments)) + arguments.constant_steps > steps:
        raise UserError(
            f"--warmup_steps {warmup} and --constant_steps {arguments.constant_steps} "
            f"exceed the {steps} steps of the run; lower them"
        )
    return steps
