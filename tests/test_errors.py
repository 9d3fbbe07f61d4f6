"""What a user did ends in one line and exit code 2; every other exception is a bug, with its traceback and exit code 1."""

import pytest
from tiny import launch

SCRIPT = """
import sys
from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.settings.errors import UserError

def main():
    initialize()
    {statement}

sys.exit(run_recipe(main))
"""


@pytest.mark.parametrize("num_ranks", [0, 2])
@pytest.mark.parametrize(
    "statement, code, shown",
    [
        ('raise UserError("--max_steps 0: must be at least 1")', 2, "error: --max_steps 0: must be at least 1"),
        ("a, b = 1, 2, 3", 1, "ValueError: too many values to unpack"),
        ('open("/nowhere/at/all")', 1, "FileNotFoundError"),
    ],
)
def test_how_a_recipe_ends(tmp_path, statement, code, shown, num_ranks):
    script = tmp_path / "recipe.py"
    script.write_text(SCRIPT.format(statement=statement))
    result = launch(num_ranks, script)
    assert (result.returncode == code) if not num_ranks else result.returncode
    assert shown in result.stderr
    assert ("Traceback" in result.stderr) == (code == 1)
