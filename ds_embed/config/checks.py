"""Checks that argument dataclasses share; each raises ValueError naming the setting and the cure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def at_least(settings: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"--{name} {value}: must be at least {minimum}")


def above_zero(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} {value}: must be greater than 0")


def one_of(settings: Any, name: str, choices: Sequence[str]) -> None:
    value = getattr(settings, name)
    if value not in choices:
        raise ValueError(f"--{name} {value}: choose one of {', '.join(choices)}")


def existing_files(name: str, paths: Sequence[str]) -> None:
    if not paths:
        raise ValueError(f"--{name}: give at least one file")
    for path in paths:
        if Path(path).is_dir():
            raise ValueError(f"--{name} {path}: is a directory; name the JSON or JSONL files in it")
        if not Path(path).is_file():
            raise ValueError(f"--{name} {path}: no such file")
