"""Train a decoder (GPT-style) embedding model, by default with LoRA.

    deepspeed recipes/train_gpt.py --deepspeed ds_configs/zero3.json --model_name_or_path MODEL \
        --train_files pairs.jsonl --output_dir RUN
"""

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.settings import TRAINING_ARGUMENTS, DryRunArguments, parse_arguments
from ds_embed.tools.plan.job import print_dry_run
from ds_embed.training.loop import TrainingRun


def main(argv: list[str] | None = None) -> None:
    world = initialize()
    *settings, dry_run = parse_arguments(*TRAINING_ARGUMENTS, DryRunArguments, argv=argv)
    run = TrainingRun(world, *settings)
    run.require_decoder()
    if dry_run.dry_run:
        print_dry_run(run, dry_run)
    else:
        run.train()


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
