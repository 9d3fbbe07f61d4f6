"""Gradients of one step of a reranker, for many settings, on however many ranks the launcher starts.

deepspeed --num_gpus W tests/workers/reranking.py CASES.json OUT_DIR; a case is the flags of recipes/train_reranker.py.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.models.engine import start_engine
from ds_embed.settings import parse_arguments
from ds_embed.settings.reranker_arguments import RERANKER_ARGUMENTS, RERANKER_DEFAULTS
from ds_embed.training.reranker import RerankerRun


def fill_lora(scorer) -> None:
    """lora_B starts at zero, which would hide the gradient of lora_A."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in scorer.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)


def start(world, flags: list[str]) -> RerankerRun:
    run = RerankerRun(world, *parse_arguments(*RERANKER_ARGUMENTS, argv=flags, defaults=RERANKER_DEFAULTS))
    run.prepare()
    return run


def run_case(world, flags: list[str]) -> dict[str, np.ndarray]:
    run = start(world, flags)
    stage = run.deepspeed_config["zero_optimization"]["stage"]
    if stage == 3:  # small weights too, which would stay whole on every rank
        run.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    scorer = run._load_encoder()
    fill_lora(scorer)
    engine = start_engine(scorer, run.deepspeed_config, run.optimizer, world)
    engine.train()
    step = run._step(engine)
    result = step.run(step.prepare(run.batch(4)))
    from deepspeed.utils import safe_get_full_grad

    gradients = {}
    for name, parameter in scorer.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad if stage == 0 else safe_get_full_grad(parameter)
            gradients[name] = gradient.detach().float().numpy().copy()
    engine.destroy()
    return gradients | {"loss": np.array(result.loss)}


def main() -> None:
    world = initialize()
    for name, flags in json.loads(Path(sys.argv[1]).read_text()).items():
        results = run_case(world, flags)
        if world.is_main:
            np.savez(Path(sys.argv[2]) / f"{name}.npz", **results)


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    raise SystemExit(run_recipe(main))
