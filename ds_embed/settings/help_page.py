"""The text of --help: the most important flags first, then all others by subject."""

import dataclasses
import re
import shutil
import textwrap
from argparse import ArgumentParser

# The training recipes have about a hundred flags; these are the ones that every user needs.
KNOW_FIRST = (
    *("model_name_or_path", "train_files", "output_dir", "deepspeed", "global_batch_size", "hard_negatives"),
    *("max_length", "num_train_epochs", "learning_rate", "micro_batch_tokens", "grad_cache", "val_files"),
)
# Each dataclass of settings is a section; its title is listed here or derived from the class name.
_TITLES = {
    "LoraArguments": "LoRA",
    "TextArguments": "texts",
    "DataArguments": "data and texts",
    "StepArguments": "batch and loss",
    "OptimizerArguments": "optimizer",
    "RunArguments": "run: folder, checkpoints, logs",
    "DryRunArguments": "dry run",
}


def help_page(types: list[type], parser: ArgumentParser, usage: str) -> str:
    """The help of a recipe that takes these dataclasses; parser.get_default knows the recipe's own defaults."""
    fields = {field.name: field for one in types for field in dataclasses.fields(one)}
    first = [name for name in KNOW_FIRST if name in fields and {"train_files", "learning_rate"} <= fields.keys()]
    lines = [f"usage: {usage} FLAGS", ""]
    lines += ["Settings are flags, or keys of one YAML file (--config FILE.yaml); flags win."]
    shown = set(first)
    groups = [("to know first", first)] if first else []
    for one in types:
        words = re.sub(r"(?<!^)(?=[A-Z])", " ", one.__name__.removesuffix("Arguments"))
        names = [field.name for field in dataclasses.fields(one) if field.name not in shown]
        shown.update(names)
        # What must be given stands first, and what every job has last.
        names.sort(key=lambda name: (name.endswith("timeout_seconds"), not _is_required(fields[name])))
        groups.append((_TITLES.get(one.__name__, words.lower()), names))
    width = min(shutil.get_terminal_size().columns, 120)
    for title, names in groups:
        lines += ["", f"{title}:"]
        for name in names:
            lines += _lines_of(fields[name], parser.get_default(name), width)
    return "\n".join(lines) + "\n"


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _lines_of(field: dataclasses.Field, default: object, width: int) -> list[str]:
    text = field.metadata["help"]
    if _is_required(field) and default is None:
        text += " (required)"
    elif isinstance(default, bool):
        text += f" (default: {str(default).lower()})"
    elif default not in (None, [], "") and "(default" not in text:
        text += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
    flag, indent = f"  --{field.name}", " " * 27
    if len(flag) < len(indent) - 1:
        return textwrap.wrap(f"{flag:<{len(indent)}}{text}", width, subsequent_indent=indent, drop_whitespace=True)
    return [flag, *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)]
