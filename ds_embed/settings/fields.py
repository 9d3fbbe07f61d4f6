"""Argument dataclasses are made of these: a field is a flag and a YAML key; its help line gives its unit."""

from dataclasses import field


def setting(help: str, **kwargs):
    return field(metadata={"help": help}, **kwargs)


def listed(values: list) -> str:
    """A list as it is typed behind its flag."""
    return " ".join(map(str, values))
