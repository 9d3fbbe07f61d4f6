"""Building blocks of argument dataclasses: a field is a flag and a YAML key; its help gives its unit and bounds."""

import dataclasses
import glob
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ds_embed.settings.errors import UserError

# Per kind of bound: the words of its error message, its sign in the help text, and its check.
_BOUNDS = {
    "at_least": ("must be at least", ">=", lambda value, bound: value >= bound),
    "above": ("must be greater than", ">", lambda value, bound: value > bound),
    "at_most": ("must be at most", "<=", lambda value, bound: value <= bound),
    "below": ("must be below", "<", lambda value, bound: value < bound),
}


def setting(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
    files: bool = False,
    needs: str = "",
    **kwargs: Any,
) -> Any:
    """A field of a `Settings` class, with constraints on its value or on each value of a list.

    files: the value names an existing file or folder, or something that only the reader can resolve: a URL, a data
    set as NAME:SPLIT, or a glob pattern. needs: the setting without which this one has no effect, then the values that
    it must have, if not any that is set: "method bm25"; several such are separated by |. A list as default is copied.
    Other keywords are passed to dataclasses.field.
    """
    given = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    bounds = {name: bound for name, bound in given.items() if bound is not None}
    if bounds:
        help += f" [{', '.join(f'{_BOUNDS[name][1]} {bound}' for name, bound in bounds.items())}]"
    kwargs |= {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(metadata={"help": help, "declared": (bounds, choices, files), "needs": needs}, **kwargs)


def optional(help: str, **declared: Any) -> Any:
    """A setting that is None when it is omitted."""
    return setting(help, None, **declared)


def several(help: str, **declared: Any) -> Any:
    """A setting that takes any number of values; the default is none."""
    return setting(help, [], **declared)


def same_as(owner: Any, name: str, **changes: str) -> Any:
    """The setting of that name of another dataclass, but for its `needs`."""
    known = owner.__dataclass_fields__[name]
    given = {word: getattr(known, word) for word in ("default", "default_factory")}
    return dataclasses.field(metadata={**known.metadata, **changes}, **given)


def check_column(word: str, keys: Sequence[str]) -> None:
    """UserError for a word of --columns that is not KEY=COLUMN with one of these keys."""
    key, equals, column = word.partition("=")
    if key not in keys or not equals or not column:
        hint = f" (did you mean {column}={key}?)" if column in keys and key else ""
        raise UserError(f"--columns {word}{hint}: expected KEY=COLUMN, where KEY is one of {', '.join(keys)}")


def constants_of(owner: Any) -> Callable[[type], type]:
    """A class decorator: settings of `owner` that the class doesn't have are constants of it, with their defaults."""

    def add(cls: type) -> type:
        for field in dataclasses.fields(owner):
            if field.name not in cls.__dataclass_fields__ and not hasattr(cls, field.name):  # type: ignore[attr-defined]
                make = field.default_factory
                setattr(cls, field.name, field.default if make is dataclasses.MISSING else make())
        return cls

    return add


@dataclasses.dataclass
class Settings:
    """Base of the argument dataclasses: checks every value against its field; a UserError names the flag."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for one in value if isinstance(value, list) else () if value is None else (value,):
                _check(f"--{field.name} {listed(value)}", "each " if isinstance(value, list) else "", one, field)
            needs = [need.split() for need in field.metadata["needs"].split("|") if need]
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value != default and needs and not any(self._has(*need) for need in needs):
                shown = " or ".join(f"--{name} {' or '.join(values)}".strip() for name, *values in needs)
                without = f"has no effect without {shown}; add that or remove --{field.name}"
                raise UserError(f"--{field.name} {listed(value)}: {without}")

    def _has(self, name: str, *values: str) -> bool:
        """Whether a setting is set, or has one of these values; True for one of other arguments."""
        value = getattr(self, name, values or True)
        return bool({*values}.intersection(value if isinstance(value, (list, tuple)) else [value]) if values else value)


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
    """A value or a list of values, as it is typed after its flag."""
    text = " ".join(map(listed, value)) if isinstance(value, list) else str(value)
    return text.lower() if isinstance(value, bool) else text
