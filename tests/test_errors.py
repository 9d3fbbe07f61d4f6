"""What a user did ends in one line and exit code 2; every other exception is a bug, with its traceback and exit code 1."""

import pytest
from tiny import launch

from ds_embed.job.process import choose_device
from ds_embed.settings.errors import UserError

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


def test_a_rank_takes_its_own_gpu():
    """All GPUs of the node in sight, or by --gpus-per-task=1 its own alone; several and none for it is a mistake."""
    assert [choose_device(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [choose_device(rank, 1) for rank in range(4)] == [0, 0, 0, 0]
    with pytest.raises(UserError, match="LOCAL_RANK 3: this process sees 2 GPUs"):
        choose_device(3, 2)
