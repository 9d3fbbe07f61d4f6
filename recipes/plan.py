"""What a training job will take on GPUs that need not be here: memory by part and ZeRO stage, time, traffic.

    python recipes/plan.py --model_name_or_path MODEL --deepspeed ds_configs/zero3.json \
        --global_batch_size 1024 --hard_negatives 4 --num_gpus 16 --gpu_memory_gb 80

It takes the flags of train_gpt.py or train_bert.py, as the model is, whose config.json is enough; train_files are read
where they are given.
"""

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.models.loading import find_model, is_decoder, load_config
from ds_embed.settings import (
    BertLoraArguments,
    BertOptimizerArguments,
    BertStepArguments,
    LoraArguments,
    ModelArguments,
    OptimizerArguments,
    SizingArguments,
    SizingDataArguments,
    SizingRunArguments,
    StepArguments,
    ValidationArguments,
    parse_arguments,
)
from ds_embed.settings.errors import UserError
from ds_embed.tools.plan.dry_run import job_to_size
from ds_embed.tools.plan.job import table


def encoder_settings() -> tuple:
    """With the defaults of train_bert.py."""
    return parse_arguments(
        ModelArguments,
        BertLoraArguments,
        SizingDataArguments,
        BertStepArguments,
        BertOptimizerArguments,
        SizingRunArguments,
        ValidationArguments,
        SizingArguments,
    )


def decoder_settings() -> tuple:
    """With the defaults of train_gpt.py."""
    return parse_arguments(
        ModelArguments,
        LoraArguments,
        SizingDataArguments,
        StepArguments,
        OptimizerArguments,
        SizingRunArguments,
        ValidationArguments,
        SizingArguments,
    )


def main() -> None:
    world = initialize()
    if world.size > 1:
        raise UserError("plan.py is one process: start it with python; --num_gpus says how many GPUs to plan for")
    model, *_ = settings = decoder_settings()
    if not is_decoder(load_config(find_model(model.model_name_or_path), model.trust_remote_code)):
        settings = encoder_settings()
    *settings, _, sizing = settings  # what validation takes is not counted
    print(table(job_to_size(world, *settings, sizing)))


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
