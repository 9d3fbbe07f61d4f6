"""Several training runs one after the other, on however many ranks the launcher starts: a start costs seconds.

    deepspeed --num_gpus W tests/workers/validation.py CASES.json

A case has the flags of recipes/train_gpt.py and may name an accident: "signal_at", the samples at whose validation
the last rank gets a SIGTERM, or "kill_at", the step whose checkpoint the job does not live to write.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from torch.distributed import PrefixStore

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.settings import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    OptimizerArguments,
    RunArguments,
    StepArguments,
    ValidationArguments,
    parse_arguments,
)
from ds_embed.training import loop, validation

ARGUMENTS = (
    ModelArguments,
    LoraArguments,
    DataArguments,
    StepArguments,
    OptimizerArguments,
    RunArguments,
    ValidationArguments,
)


def signal_amid_validation(world, consumed_samples: int):
    """SIGTERM to the last rank before the second forward pass of the validation at `consumed_samples`."""
    run, encode = validation.Validation.run, validation._Encode.__call__
    passes = []

    def noted_run(self, engine, consumed, stop):
        if consumed == consumed_samples and world.rank == world.size - 1:
            passes.append(0)
        return run(self, engine, consumed, stop)

    def noted_encode(self, *inputs):
        if passes:
            passes[0] += 1
            if passes[0] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, *inputs)

    places = (validation.Validation, "run", noted_run), (validation._Encode, "__call__", noted_encode)
    return [patch.object(*place) for place in places]


def kill_before_save(step: int):
    save = loop.save_checkpoint

    def save_or_die(engine, world, folder, number, *rest, **named):
        if number == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(engine, world, folder, number, *rest, **named)

    return [patch.object(loop, "save_checkpoint", save_or_die)]


def main() -> None:
    world = initialize()
    for number, case in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        # World.on_main wants names that are unique in the job, and these are several jobs.
        apart = replace(world, store=PrefixStore(f"run{number}", world.store))
        run = loop.TrainingRun(apart, *parse_arguments(*ARGUMENTS, argv=case["flags"]))
        accidents = []
        if "signal_at" in case:
            accidents = signal_amid_validation(world, case["signal_at"])
        elif "kill_at" in case:
            accidents = kill_before_save(case["kill_at"])
        for accident in accidents:
            accident.start()
        code = 0
        try:
            run.train()
        except SystemExit as stop:
            code = stop.code
        for accident in accidents:
            accident.stop()
        if run.folder._lock is not None:
            run.folder._lock.close()  # as the end of a process would
        if world.is_main:
            print(f"run {number} of {run.folder.path.name} ended with {code}", flush=True)
        world.barrier()


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    raise SystemExit(run_recipe(main))
