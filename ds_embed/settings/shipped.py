"""Where the recipes, DeepSpeed JSONs and job scripts are: in an installed package, or beside it in a checkout."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def shipped_folder(name: str) -> Path:
    """The folder `recipes`, `ds_configs` or `slurm` that belongs to this version of the package."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
