"""Train a decoder (GPT-style) embedding model, by default with LoRA.

    deepspeed recipes/train_gpt.py --deepspeed ds_configs/zero3.json --model_name_or_path MODEL \
        --train_files pairs.jsonl --output_dir RUN
"""

from ds_embed.config import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    OptimizerArguments,
    RunArguments,
    StepArguments,
    ValidationArguments,
    parse_arguments,
)
from ds_embed.distributed import initialize, run_recipe
from ds_embed.training.loop import TrainingRun


def main() -> None:
    world = initialize()
    settings = parse_arguments(
        ModelArguments,
        LoraArguments,
        DataArguments,
        StepArguments,
        OptimizerArguments,
        RunArguments,
        ValidationArguments,
    )
    run = TrainingRun(world, *settings)
    run.require_decoder()
    run.train()


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
