"""Settings of the whole suite."""

import os

# One thread: the suite's own process shares two cores with the ranks it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
