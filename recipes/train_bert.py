"""Train a bi-encoder of the BERT family (RoBERTa, MPNet, DistilBERT, ModernBERT, XLM-R, ...), by default all weights.

    deepspeed recipes/train_bert.py --deepspeed ds_configs/zero2.json --model_name_or_path MODEL \
        --train_files pairs.jsonl --output_dir RUN
"""

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.settings import BERT_DEFAULTS, TRAINING_ARGUMENTS, DryRunArguments, parse_arguments
from ds_embed.tools.plan.job import print_dry_run
from ds_embed.training.loop import TrainingRun


def main(argv: list[str] | None = None) -> None:
    world = initialize()
    *settings, dry_run = parse_arguments(*TRAINING_ARGUMENTS, DryRunArguments, argv=argv, defaults=BERT_DEFAULTS)
    run = TrainingRun(world, *settings)
    run.require_encoder()
    if dry_run.dry_run:
        print_dry_run(run, dry_run)
    else:
        run.train()


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
