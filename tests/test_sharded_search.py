"""Ranks that each search a slice of the documents find what one process finds."""

import subprocess
import sys

import numpy as np
from tiny import REPOSITORY, launch_environment, leave_out_when_fast

from ds_embed.vectors import search as search_module
from ds_embed.vectors.search import search


def test_three_ranks_find_what_one_process_finds(tmp_path):
    leave_out_when_fast()
    rng = np.random.default_rng(11)
    # (documents, queries, k): fewer documents than ranks, k beyond a slice, k of all, many queries.
    for number, (documents, queries, k) in enumerate(
        [(2, 3, 2), (50, 7, 30), (40, 5, 40), (700, 20, 10), (90, 5000, 4)]
    ):
        if number % 2:  # scores that tie, across slices too: ids decide
            rows = [rng.integers(-1, 2, (n, 5)).astype(np.float32) for n in (documents, queries)]
        else:
            rows = [rng.standard_normal((n, 16)).astype(np.float32) for n in (documents, queries)]
        case = {"documents": rows[0], "queries": rows[1], "k": k, "tie_rank": rng.permutation(documents)}
        np.savez(tmp_path / f"case{number}.npz", **case)
    assert search_module._MERGED_QUERIES < 5000
    worker = REPOSITORY / "tests" / "workers" / "sharded_search.py"
    environment = launch_environment() | {"PYTHONPATH": str(REPOSITORY)}
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, str(rank), tmp_path, tmp_path / "meeting"], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(3)
    ]
    outputs = [rank.communicate(timeout=600)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
    for path in sorted(tmp_path.glob("case*.npz")):
        case = np.load(path)
        scores, rows = search(case["queries"], case["documents"], int(case["k"]), tie_rank=case["tie_rank"])
        for rank in range(3):
            found = np.load(tmp_path / f"rank{rank}-{path.name}")
            np.testing.assert_array_equal(found["rows"], rows)
            np.testing.assert_array_equal(found["scores"], scores)
    errors = [(tmp_path / f"rank{rank}.error").read_text() for rank in range(3)]
    assert errors[:2] == ["FailedElsewhere search"] * 2
    assert errors[2].startswith("UserError the score of query row 0")
