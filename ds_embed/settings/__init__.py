"""Settings: argument dataclasses, one YAML file or flags, and the DeepSpeed JSON."""

from ds_embed.settings.data_arguments import DataArguments, TextArguments
from ds_embed.settings.deepspeed_json import resolve_deepspeed_config
from ds_embed.settings.encode_arguments import EncodeArguments
from ds_embed.settings.model_arguments import LoraArguments, ModelArguments
from ds_embed.settings.parsing import parse_arguments
from ds_embed.settings.report_arguments import ReportArguments
from ds_embed.settings.run_arguments import OptimizerArguments, RunArguments
from ds_embed.settings.sizing_arguments import SIZING_DEFAULTS, DryRunArguments, HardwareArguments, SizingArguments
from ds_embed.settings.step_arguments import StepArguments
from ds_embed.settings.training import BERT_DEFAULTS, TRAINING_ARGUMENTS
from ds_embed.settings.validation_arguments import ValidationArguments

__all__ = [
    "BERT_DEFAULTS",
    "SIZING_DEFAULTS",
    "TRAINING_ARGUMENTS",
    "DataArguments",
    "DryRunArguments",
    "EncodeArguments",
    "HardwareArguments",
    "LoraArguments",
    "ModelArguments",
    "OptimizerArguments",
    "ReportArguments",
    "RunArguments",
    "SizingArguments",
    "StepArguments",
    "TextArguments",
    "ValidationArguments",
    "parse_arguments",
    "resolve_deepspeed_config",
]
