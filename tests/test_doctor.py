"""`ds-embed doctor` on the machine that runs the tests: what it says is so, and what is wrong here has its cure."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny import load_recipe

from ds_embed.models.cpu import multiplies_bfloat16
from ds_embed.tools import doctor


@pytest.fixture(scope="module")
def doctors_report(tmp_path_factory):
    return doctor.examine(str(tmp_path_factory.mktemp("cache")), "/proc/nowhere")


def line_of(report, subject):
    return re.search(rf"^{re.escape(subject)} +(.*)$", report, re.MULTILINE)[1]


def test_it_says_what_is_here(doctors_report):
    cores = len(os.sched_getaffinity(0))
    assert line_of(doctors_report, "processor").startswith(f"{cores} cores for this process")
    assert ("in bfloat16" in line_of(doctors_report, "its products")) == multiplies_bfloat16()
    assert f"torch {torch.__version__}" in line_of(doctors_report, "packages")
    assert "MISSING" not in line_of(doctors_report, "packages")
    assert "deepspeed" in line_of(doctors_report, "launchers")  # also where the environment is not activated
    assert "operators that fit this machine" in line_of(doctors_report, "DeepSpeed")
    if not torch.cuda.is_available():
        assert "! no GPU: training is for small models" in doctors_report


def test_a_folder_that_can_not_be_written_is_told(doctors_report):
    assert line_of(doctors_report, "output_dir").startswith("/proc/nowhere, ")
    assert ", not writable" in line_of(doctors_report, "output_dir") or os.access("/proc", os.W_OK)
    assert ", not writable" not in line_of(doctors_report, "cache_dir")


def test_too_little_room_is_told(monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=2**26, free=2**26))
    found, notes = {}, []
    doctor._disks(found, notes, {"cache_dir": "/tmp"})
    assert any(note.startswith("cache_dir: 0.1 GiB free in /tmp") for note in notes)
    assert any("--shm-size" in note for note in notes) == Path("/dev/shm").is_dir()


def test_the_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["doctor.py", "--cache_dir", str(tmp_path)])
    load_recipe("doctor").main()
    assert f"{tmp_path}, " in capsys.readouterr().out
