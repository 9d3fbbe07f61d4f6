"""The house: imports run one way, files stay small, importing starts nothing."""

import ast
import re
import subprocess
import sys

import pytest
from tiny import REPOSITORY

PACKAGE = REPOSITORY / "ds_embed"
# A room may import the rooms that stand before it, and only those listed here.
ROOMS = {
    "settings": set(),
    "artifact": {"settings"},
    "job": {"settings"},
    "losses": set(),
    "data": {"settings", "artifact"},
    "models": {"settings", "artifact", "job", "data"},
    "vectors": {"settings", "artifact", "job", "data", "models"},
    "training": {"settings", "artifact", "job", "losses", "data", "models", "vectors"},
    "tools": {"settings", "artifact", "job", "losses", "data", "models", "vectors", "training", "mteb_model"},
    "mteb_model": {"vectors"},
    "cli": {"settings"},
}


def python_files():
    return [
        path for path in REPOSITORY.rglob("*.py") if not {".venv", "build"} & set(path.relative_to(REPOSITORY).parts)
    ]


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "ds_embed" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"], ids=str)
def test_imports_run_one_way(path):
    room = room_of(path)
    assert set(imported_rooms(path)) <= ROOMS[room] | {room}


def test_recipes_do_not_import_each_other():
    for path in (REPOSITORY / "recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and "recipes" in (node.module or "")), path


def test_what_is_made_is_whole_or_absent_in_one_room():
    """Renames, locks, fsync and hidden names are spelled in artifact alone."""
    spelled = re.compile(
        r"\.rename\(|os\.re(name|place)\b|fsync|flock|filelock"
        r"|[\"']\.(unfinished|building|part|partial|removed|replaced|lock)\b"
    )
    found = {
        f"{path.relative_to(REPOSITORY)}: {line.strip()}"
        for folder in (PACKAGE, REPOSITORY / "recipes")
        for path in folder.rglob("*.py")
        if room_of_any(path) != "artifact"
        for line in path.read_text(encoding="utf-8").splitlines()
        if spelled.search(line)
    }
    assert not found


def room_of_any(path):
    return room_of(path) if path.is_relative_to(PACKAGE) else "recipes"


def test_files_are_well_named():
    assert not [p for p in python_files() if p.stem in ("utils", "helpers", "common")]


def test_importing_the_package_starts_nothing():
    code = (
        "import sys, ds_embed; loaded = {'torch', 'transformers', 'deepspeed', 'peft'} & set(sys.modules); "
        "assert not loaded, loaded"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
