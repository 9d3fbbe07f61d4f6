"""Train a bi-encoder of the BERT family (RoBERTa, MPNet, DistilBERT, ModernBERT, XLM-R, ...), by default whole.

    deepspeed recipes/train_bert.py --deepspeed ds_configs/zero2.json --model_name_or_path MODEL \
        --train_files pairs.jsonl --output_dir RUN
"""

from ds_embed.config import (
    BertLoraArguments,
    BertOptimizerArguments,
    BertStepArguments,
    DataArguments,
    ModelArguments,
    RunArguments,
    ValidationArguments,
    parse_arguments,
)
from ds_embed.distributed import initialize, run_recipe
from ds_embed.training.loop import TrainingRun


def main() -> None:
    world = initialize()
    settings = parse_arguments(
        ModelArguments,
        BertLoraArguments,
        DataArguments,
        BertStepArguments,
        BertOptimizerArguments,
        RunArguments,
        ValidationArguments,
    )
    run = TrainingRun(world, *settings)
    run.require_encoder()
    run.train()


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
