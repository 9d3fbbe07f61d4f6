"""Settings of the whole suite."""

import os

import pytest

# One thread: the suite's own process shares two cores with the ranks it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out tests that start ranks or other long processes")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("fast"):
        os.environ["DS_EMBED_TESTS_FAST"] = "1"
