"""The cluster that the tests of this folder share; without Slurm they are skipped, and say why."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tiny.py

from cluster import Cluster, why_not
from tiny import free_port, leave_out_when_fast


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    leave_out_when_fast()
    reason = why_not()
    if reason:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), (free_port(), free_port(), free_port()))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
