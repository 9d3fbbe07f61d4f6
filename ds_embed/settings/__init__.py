"""Settings: argument dataclasses, one YAML file or flags, and the DeepSpeed JSON."""

from ds_embed.settings.data_arguments import DataArguments, TextArguments
from ds_embed.settings.deepspeed_json import resolve_deepspeed_config
from ds_embed.settings.encode_arguments import EncodeArguments
from ds_embed.settings.model_arguments import LoraArguments, ModelArguments
from ds_embed.settings.parsing import parse_arguments
from ds_embed.settings.run_arguments import OptimizerArguments, RunArguments
from ds_embed.settings.step_arguments import StepArguments
from ds_embed.settings.tool_arguments import (
    SIZING_DEFAULTS,
    DryRunArguments,
    HardwareArguments,
    ReportArguments,
    SizingArguments,
)
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
