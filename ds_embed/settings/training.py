"""What a training recipe takes: the settings of both, and the defaults in which they differ."""

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
# Of train_bert; train_gpt has the fields' own. BERT-family models are small, so all their weights are trained
# (models/lora.py), which wants a smaller rate than LoRA matrices that start at zero, with the loss that is usual for
# bi-encoders.
BERT_DEFAULTS = {"learning_rate": 2e-5, "negatives": "own"}
