"""Argument dataclasses are made of these: a field is a flag and a YAML key; its help gives its unit, and its bounds."""

import dataclasses
import glob
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_embed.settings.errors import UserError

# What a declared bound says, and its sign for the help.
_BOUNDS = {
    "at_least": ("must be at least", ">=", lambda value, bound: value >= bound),
    "above": ("must be greater than", ">", lambda value, bound: value > bound),
    "at_most": ("must be at most", "<=", lambda value, bound: value <= bound),
    "below": ("must be below", "<", lambda value, bound: value < bound),
}


def setting(
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    files: bool = False,
    **kwargs: Any,
) -> Any:
    """A field of a `Settings`, with what its value, or each value of a list, must be.

    files: names of files or folders that are there, or what only their reader can look for: URLs, data sets as
    NAME:SPLIT, patterns. The other words are those of dataclasses.field.
    """
    given = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    bounds = {name: bound for name, bound in given.items() if bound is not None}
    if bounds:
        help += f" [{', '.join(f'{_BOUNDS[name][1]} {bound}' for name, bound in bounds.items())}]"
    return dataclasses.field(metadata={"help": help, "declared": (bounds, choices, files)}, **kwargs)


@dataclasses.dataclass
class Settings:
    """Base of the argument dataclasses: every value is as its field declares, or a UserError names the flag."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for one in value if isinstance(value, list) else () if value is None else (value,):
                _check(f"--{field.name} {listed(value)}", "each " if isinstance(value, list) else "", one, field)


def _check(flag: str, each: str, value: Any, field: dataclasses.Field) -> None:
    bounds, choices, files = field.metadata["declared"]
    for name, bound in bounds.items():
        words, _, holds = _BOUNDS[name]
        if not holds(value, bound):
            raise UserError(f"{flag}: {each}{words} {bound}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag}: {each}must be a number")
    if choices and value not in choices:
        raise UserError(f"--{field.name} {value}: choose one of {', '.join(choices)}")
    if files and not Path(value).exists() and ":" not in value and not glob.has_magic(value):
        raise UserError(f"--{field.name} {value}: no such file")


def listed(value: Any) -> str:
    """A value, or a list of them, as it is typed behind its flag."""
    return " ".join(map(listed, value)) if isinstance(value, list) else str(value)
