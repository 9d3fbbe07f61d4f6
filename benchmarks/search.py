"""Time and memory of searching random unit vectors, exactly and with FAISS; prints Markdown tables.

    python benchmarks/search.py
    python benchmarks/search.py --num_documents 10000000 --num_queries 1000 --index none

Every row runs in a separate process, with documents memory-mapped from --work_dir. "peak" is the peak of private memory
(without the documents' pages in the file cache) minus what the process had before the search. The documents form
clusters, as texts do: an index finds little in vectors without any structure.
"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_embed.job.ranks import run_recipe
from ds_embed.settings import parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import setting
from ds_embed.settings.tool_arguments import INDEX_KINDS, IndexArguments

_ROWS_AT_ONCE = 50_000


@dataclass
class BenchmarkArguments(IndexArguments):
    num_documents: list[int] = setting("numbers of documents", default_factory=lambda: [10_000, 100_000, 1_000_000])
    num_queries: int = setting("number of queries", default=10_000, above=0)
    dimensions: int = setting("dimensions of the vectors", default=384, above=0)
    top_k: int = setting("documents kept for each query", default=100, above=0)
    index: list[str] = setting("FAISS indexes to compare, or none", default_factory=lambda: ["hnsw", "ivf"])
    index_documents: int = setting("number of documents that the indexes are built of", default=100_000, above=0)
    noise: float = setting("length of the noise around a centre, whose length is 1", default=1.0, above=0)
    num_threads: int | None = setting("threads of a process (default: torch's choice)", default=None, above=0)
    work_dir: str | None = setting("folder for the vectors (default: a temporary one)", default=None)
    case: str | None = setting("one row, as JSON: what the processes that this script starts are given", default=None)

    def __post_init__(self):
        super().__post_init__()
        for name in self.index:
            if name not in (*INDEX_KINDS, "none"):
                raise UserError(f"--index {name}: choose from {', '.join(INDEX_KINDS)}, none")


def main():
    (arguments,) = parse_arguments(BenchmarkArguments)
    if arguments.case is not None:
        return measure(arguments, json.loads(arguments.case))
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        kinds = [kind for kind in arguments.index if kind != "none"]
        sizes = sorted({*arguments.num_documents, *([arguments.index_documents] if kinds else [])})
        write_vectors(Path(folder), sizes, arguments)
        print(f"{arguments.num_queries:,} queries, {arguments.dimensions} dimensions, the best {arguments.top_k}\n")
        print("| documents | exact search | peak |\n|---|---|---|")
        for size in arguments.num_documents:
            row = run_case(folder, size, "exact")
            print(f"| {size:,} | {row['seconds']:.1f} s | {row['peak']} MiB |", flush=True)
        if not kinds:
            return
        print(f"\n{arguments.index_documents:,} documents:\n")
        print("| index | built in | searched in | recall@10 | peak |\n|---|---|---|---|---|")
        for kind in ("exact", *kinds):
            row = run_case(folder, arguments.index_documents, kind)
            built = f"{row['built']:.1f} s" if kind != "exact" else "-"
            cells = [row["name"], built, f"{row['seconds']:.1f} s", f"{row['recall']:.4f}", f"{row['peak']} MiB"]
            print(f"| {' | '.join(cells)} |", flush=True)


def write_vectors(folder: Path, sizes: list[int], arguments: BenchmarkArguments) -> None:
    """Write unit vectors of documents and queries, scattered around the same sqrt(largest size) random centres."""
    rng = np.random.default_rng(0)
    centres = unit(rng.standard_normal((max(1, round(sizes[-1] ** 0.5)), arguments.dimensions), dtype=np.float32))
    for name, count in (("documents", sizes[-1]), ("queries", arguments.num_queries)):
        shape = (count, arguments.dimensions)
        rows = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, shape)
        for start in range(0, count, _ROWS_AT_ONCE):
            block = centres[rng.integers(0, len(centres), min(_ROWS_AT_ONCE, count - start))]
            noise = rng.standard_normal(block.shape, dtype=np.float32)
            rows[start : start + len(block)] = unit(block + arguments.noise * unit(noise))
        rows.flush()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def run_case(folder: str, size: int, kind: str) -> dict:
    case = json.dumps({"folder": folder, "size": size, "kind": kind})
    result = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--case", case], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(result.stdout.splitlines()[-1])


def measure(arguments: BenchmarkArguments, case: dict) -> None:
    import torch

    from ds_embed.vectors.faiss_index import build_index, index_kind, recall_against_exact, search_index
    from ds_embed.vectors.search import search

    if arguments.num_threads is not None:
        torch.set_num_threads(arguments.num_threads)
    folder = Path(case["folder"])
    queries = np.load(folder / "queries.npy", mmap_mode="r")
    documents = np.load(folder / "documents.npy", mmap_mode="r")[: case["size"]]
    k = min(arguments.top_k, len(documents))
    ranks = np.arange(len(documents))[::-1].copy()
    search(queries[:2], documents[:1000], 1)  # so that one-time allocations of libraries don't count
    if case["kind"] != "exact":
        build_index(case["kind"], np.array(documents[:1000]), arguments)
    result = {"name": "exact", "built": 0.0, "recall": 1.0}
    with PeakMemory() as memory:
        start = time.perf_counter()
        if case["kind"] == "exact":
            search(queries, documents, k, tie_rank=ranks)
        else:
            index = build_index(case["kind"], documents, arguments)
            result["built"] = time.perf_counter() - start
            start = time.perf_counter()
            _, rows = search_index(index, queries, documents, k, arguments, tie_rank=ranks, device="cpu")
        result["seconds"] = time.perf_counter() - start
    if case["kind"] != "exact":
        result["name"] = index_kind(index)
        result["recall"] = recall_against_exact(rows, queries, documents, tie_rank=ranks)[0]
    print(json.dumps(result | {"peak": memory.peak >> 20}))


class PeakMemory:
    """The sampled peak of this process's anonymous memory within a block, in bytes above the start."""

    def __enter__(self):
        self._start, self.peak, self._done = self._anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    def _watch(self):
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._anonymous() - self._start)

    @staticmethod
    def _anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) << 10


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
