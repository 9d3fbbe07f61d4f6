"""The cluster that the tests of this folder share; without Slurm they are skipped, and say why."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tiny.py

from cluster import Cluster, why_not
from tiny import leave_out_when_fast


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    leave_out_when_fast()
    reason = why_not()
    if reason:
        pytest.skip(reason)
    first = 21000 + os.getpid() % 9000
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), (first, first + 1, first + 2))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
