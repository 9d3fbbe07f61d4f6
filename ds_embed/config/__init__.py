"""Settings: argument dataclasses, one YAML file or flags, and the DeepSpeed JSON."""

from ds_embed.config.arguments import (
    BertLoraArguments,
    BertOptimizerArguments,
    BertStepArguments,
    DataArguments,
    EncodeArguments,
    LoraArguments,
    ModelArguments,
    OptimizerArguments,
    RunArguments,
    StepArguments,
    TextArguments,
)
from ds_embed.config.deepspeed_json import resolve_deepspeed_config
from ds_embed.config.parsing import parse_arguments

__all__ = [
    "BertLoraArguments",
    "BertOptimizerArguments",
    "BertStepArguments",
    "DataArguments",
    "EncodeArguments",
    "LoraArguments",
    "ModelArguments",
    "OptimizerArguments",
    "RunArguments",
    "StepArguments",
    "TextArguments",
    "parse_arguments",
    "resolve_deepspeed_config",
]
