"""python recipes/quickstart/make_pairs.py --output_dir DIR

Builds a code-search data set out of the Python sources that are installed anyway, without a download. A query
is the first sentence of a docstring; its document is the source of that function without the docstring.
Writes train.jsonl, test_queries.jsonl, test_docs.jsonl and counts.json. Train and test share no file. The
same versions of Python and the packages give the same bytes. Packages are read as text, never imported.
"""

import argparse
import collections
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from function_pairs import LIMITS, read_file

from ds_embed.artifact.artifact import Artifact
from ds_embed.settings.errors import UserError

# Increase the number when the same sources would give other pairs, to distinguish older folders.
KIND = "the quickstart's data, form 3"
STDLIB = "stdlib"
PACKAGES = (STDLIB, "numpy", "torch", "transformers", "peft")
# Tests describe behaviour that no query asks for. The last five are missing from some distributions or newer versions
# of Python, so omitting them makes results more alike across machines.
SKIPPED_DIRS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
SKIPPED_DIRS |= {"distutils", "ensurepip", "idlelib", "lib2to3", "turtledemo"}


class Source(NamedTuple):
    """A tree of Python files. In ids, `name` takes the place of `root`, which differs between machines."""

    name: str
    root: Path
    version: str


def find_sources(packages=PACKAGES):
    """Locate installed packages without importing them; `stdlib` is Python's own library."""
    sources = []
    for name in dict.fromkeys(packages):
        if name == STDLIB:
            sources.append(Source(name, Path(sysconfig.get_path("stdlib")), platform.python_version()))
            continue
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if version is None or spec is None or not spec.submodule_search_locations:
            raise UserError(f"--packages {name}: no package of that name is installed. Install or omit it.")
        # "2.13.0+cpu" and "2.13.0+cu130" hold the same Python sources.
        sources.append(Source(name, Path(spec.submodule_search_locations[0]), version.partition("+")[0]))
    return sources


def list_files(source):
    """Sorted [(relative path starting with the source's name, absolute path)] of the files to read."""
    found = []
    for folder, subfolders, names in os.walk(source.root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_DIRS]
        for name in names:
            if name.endswith(".py") and not name.startswith("test_") and not name.endswith("_test.py"):
                path = Path(folder, name)
                found.append((f"{source.name}/{path.relative_to(source.root).as_posix()}", path))
    return sorted(found)


def keep_distinct(pairs, counts):
    """Drop repeated documents (all but the first) and repeated queries (all of them)."""
    first = {}
    for pair in pairs:
        first.setdefault(pair.document, pair)
    counts["dropped: document seen before"] += len(pairs) - len(first)
    # A query of several functions has no single right answer: whichever was kept, the others would count as errors in
    # the test and as negatives in training.
    frequency = collections.Counter(pair.query.rstrip(".").casefold() for pair in first.values())
    kept = [pair for pair in first.values() if frequency[pair.query.rstrip(".").casefold()] == 1]
    counts["dropped: query of several functions"] += len(first) - len(kept)
    return kept


def split_by_file(pairs, num_test, counts):
    """(train, test), sorted: whole files go to test, in the order of a hash of their relative path.

    Each file gives at most `max_test_per_file` pairs, so that none dominates the result. Its other pairs are dropped:
    in train they would show the model the neighbours of test documents.
    """
    by_file = collections.defaultdict(list)
    for pair in pairs:
        by_file[pair.doc_id.rsplit(":", 1)[0]].append(pair)
    test, num_held_out = [], 0
    for path in sorted(by_file, key=lambda path: hashlib.blake2b(path.encode()).digest()):
        if len(test) == num_test:
            break
        held_out = by_file.pop(path)
        num_held_out += len(held_out)
        test += held_out[: min(LIMITS["max_test_per_file"], num_test - len(test))]
    if len(test) < num_test or not by_file:
        raise UserError(
            f"--num_test {num_test}: all files together hold {len(pairs)} pairs, too few to leave any for "
            "training. Lower it or name more --packages."
        )
    counts["dropped: surplus of held-out files"] += num_held_out - len(test)
    return sorted(pair for kept in by_file.values() for pair in kept), sorted(test)


def make_pairs(output_dir, sources, num_test=500, num_workers=1):
    """Write the data set at `output_dir`, whole or not at all. Returns False if it was there already."""
    start = time.perf_counter()
    if num_test < 1:
        raise UserError(f"--num_test {num_test} must be at least 1.")
    made_from = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "packages": ", ".join(f"{source.name} {source.version}" for source in sources),
        "limits": str(LIMITS),
        "num_test": str(num_test),
    }
    artifact = Artifact(Path(output_dir).absolute(), KIND, "--output_dir", made_from)
    if artifact.is_there():
        print(f"{output_dir} is complete: nothing to do")
        return False
    files = [file for source in sources for file in list_files(source)]
    print(f"reading {len(files)} files of {made_from['packages']}", flush=True)
    # This pool lets its processes finish; multiprocessing.Pool kills them, and may then wait for a lock forever.
    with ProcessPoolExecutor(num_workers) as pool:
        results = list(pool.map(read_file, files, chunksize=16))
    counts = sum((file_counts for _, file_counts in results), collections.Counter())
    pairs = keep_distinct([pair for file_pairs, _ in results for pair in file_pairs], counts)
    train, test = split_by_file(pairs, num_test, counts)
    counts["train pairs"], counts["test pairs"] = len(train), len(test)

    def record(pair, *keys):  # ids of queries and documents differ, to expose code that mixes them up
        values = {"query": pair.query, "pos_doc": pair.document}
        values |= {"query_id": f"{pair.doc_id}:docstring", "doc_id": pair.doc_id}
        return {key: values[key] for key in keys}

    tables = {
        "test_queries.jsonl": [record(pair, "query", "query_id", "doc_id") for pair in test],
        "test_docs.jsonl": [record(pair, "pos_doc", "doc_id") for pair in test],
        "train.jsonl": [record(pair, "query", "pos_doc", "query_id", "doc_id") for pair in train],
        "counts.json": [dict(sorted(counts.items()))],
    }
    artifact.begin(anew=True)
    for name, records in tables.items():
        artifact.write(name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records).encode())
    artifact.publish()
    for name in sorted(counts, key=lambda name: (name.startswith("dropped"), -counts[name])):
        print(f"{counts[name]:>8,}  {name}")
    print(f"wrote {output_dir} in {time.perf_counter() - start:.0f} s")
    return True


def main(arguments=None):
    """Parse the flags and make the data set; exit status 2 and one message for a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", required=True, help="data folder to write (a path)")
    parser.add_argument("--num_test", type=int, default=500, help="pairs held out, from files of their own")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help="what to read; stdlib: Python's own")
    num_workers = min(4, os.cpu_count() or 1)
    parser.add_argument("--num_workers", type=int, default=num_workers, help="processes that parse files")
    args = parser.parse_args(arguments)
    try:
        make_pairs(args.output_dir, find_sources(args.packages), args.num_test, args.num_workers)
    except UserError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
