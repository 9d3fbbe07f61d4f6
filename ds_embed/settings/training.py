"""The settings of the training recipes, and the defaults in which they differ."""

from ds_embed.settings.data_arguments import DataArguments
from ds_embed.settings.model_arguments import LoraArguments, ModelArguments
from ds_embed.settings.run_arguments import OptimizerArguments, RunArguments
from ds_embed.settings.step_arguments import StepArguments
from ds_embed.settings.validation_arguments import ValidationArguments

TRAINING_ARGUMENTS = (
    ModelArguments,
    LoraArguments,
    DataArguments,
    StepArguments,
    OptimizerArguments,
    RunArguments,
    ValidationArguments,
)
# Defaults of train_bert; train_gpt uses those of the fields. BERT-family models are small, so all their weights are
# trained (models/lora.py), which needs a lower learning rate than LoRA matrices that start at zero. The loss is the
# usual one for bi-encoders.
BERT_DEFAULTS = {"learning_rate": 2e-5, "negatives": "own"}
