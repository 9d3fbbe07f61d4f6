"""Settings of the whole suite."""

import os
import sys

import pytest

# One thread: the suite's own process shares two cores with the ranks it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out tests that start ranks or other long processes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("fast"):
        os.environ["DS_EMBED_TESTS_FAST"] = "1"


@pytest.fixture(autouse=True)
def end_of_a_job_in_this_process():
    """Tests that call a recipe's main() are jobs of one rank: the next such call is a job of its own."""
    yield
    ranks = sys.modules.get("ds_embed.job.ranks")
    if ranks is not None and ranks._world is not None:
        import torch.distributed as dist

        dist.destroy_process_group()
        ranks._world = None
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)
