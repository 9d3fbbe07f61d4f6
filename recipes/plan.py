"""Predict what a training job will need on any number of GPUs: memory by part and ZeRO stage, time, traffic.

    python recipes/plan.py --model_name_or_path MODEL --deepspeed ds_configs/zero3.json \
        --global_batch_size 1024 --hard_negatives 4 --num_gpus 16 --gpu_memory_gb 80

It needs no GPU, and only config.json of the model. It takes the flags of train_gpt.py or train_bert.py, depending on
the model; train_files are read if they are given.
"""

from typing import Any

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.models.kinds import is_bert_style, kind_of
from ds_embed.models.loading import find_model, load_config
from ds_embed.settings import BERT_DEFAULTS, SIZING_DEFAULTS, TRAINING_ARGUMENTS, SizingArguments, parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.tools.plan.job import job_to_size, table


def recipe_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The defaults of the recipe that trains the given model."""
    trust = given.get("trust_remote_code", False)
    config = load_config(
        find_model(given["model_name_or_path"], given.get("adapter_path"), revision=given.get("model_revision")), trust
    )
    return BERT_DEFAULTS if is_bert_style(config) and not kind_of(config, trust).is_causal else {}


def main() -> None:
    world = initialize()
    if world.size > 1:
        raise UserError(
            "plan.py runs as one process: start it with python; --num_gpus is the number of GPUs to plan for"
        )
    *settings, _, sizing = parse_arguments(  # validation is not included in the plan
        *TRAINING_ARGUMENTS, SizingArguments, defaults=SIZING_DEFAULTS, defaults_for=recipe_defaults
    )
    print(table(job_to_size(world, *settings, sizing)))


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
