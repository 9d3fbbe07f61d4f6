"""Checks that argument dataclasses share; each raises UserError naming the setting and the cure."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_embed.settings.errors import UserError


def at_least(settings: Any, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= minimum:
            raise UserError(f"--{name} {value}: must be at least {minimum}")


def above_zero(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: must be greater than 0")


def one_of(settings: Any, name: str, choices: Sequence[str]) -> None:
    value = getattr(settings, name)
    if value not in choices:
        raise UserError(f"--{name} {value}: choose one of {', '.join(choices)}")


def existing_files(name: str, paths: Sequence[str]) -> None:
    """UserError unless each names a file or folder that is there, or what only its reader can look for."""
    if not paths:
        raise UserError(f"--{name}: give at least one file")
    for path in paths:
        # URLs, data sets by name (NAME:SPLIT) and patterns.
        if not Path(path).exists() and ":" not in path and not glob.has_magic(path):
            raise UserError(f"--{name} {path}: no such file")
