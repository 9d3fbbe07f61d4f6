"""The two changes that docs/developing.md describes, made in a copy of the project by its steps and tested there."""

import shutil
import subprocess
import sys

import pytest
from tiny import REPOSITORY, launch_environment, leave_out_when_fast


@pytest.mark.parametrize(
    "change, test, number",
    [("loss", "tests/test_loss.py -k triplet", 28), ("form", "tests/test_data_forms.py -k every_form", 1)],
)
def test_a_change_by_the_steps_of_the_page(tmp_path, change, test, number):
    leave_out_when_fast()
    ignored = shutil.ignore_patterns("__pycache__", "slurm")
    for name in ("ds_embed", "tests"):
        shutil.copytree(f"{REPOSITORY}/{name}", tmp_path / name, ignore=ignored)
    shutil.copy(f"{REPOSITORY}/pyproject.toml", tmp_path)
    patch = ["git", "apply", "-C1", f"{REPOSITORY}/tests/developing/{change}.diff"]
    done = subprocess.run(patch, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}the steps of docs/developing.md have changed: mend them and the diff"
    words = [sys.executable, "-m", "pytest", "-n0", "-q", "-p", "no:cacheprovider", "-rA", *test.split()]
    environment = launch_environment() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED")]
    assert done.returncode == 0 and len(passed) == number, done.stdout[-3000:] + done.stderr
