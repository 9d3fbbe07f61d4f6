"""python recipes/quickstart/make_pairs.py --output_dir DIR

Builds a code-search data set out of the Python sources that are installed anyway, without a download. A query
is the first sentence of a docstring; its document is the source of that function without the docstring.
Writes train.jsonl, test_queries.jsonl, test_docs.jsonl and manifest.json. Train and test share no file. The
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

from ds_embed.artifact.durable import folder_when_whole
from ds_embed.settings.errors import UserError

# Raise it when the same sources would give other pairs, so that older folders are told apart.
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
STDLIB = "stdlib"
PACKAGES = (STDLIB, "numpy", "torch", "transformers", "peft")
# Tests describe behaviour that no query asks for. The last five are left out by some distributions of Python
# or dropped by newer versions: without them, machines agree on more.
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
    """Sorted [(relative path with the source's name in front, absolute path)] of the files to read."""
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
    # A query that fits several functions has no one right answer: whichever was kept, finding one of the
    # others would count as an error in the test and as a negative in training.
    frequency = collections.Counter(pair.query.rstrip(".").casefold() for pair in first.values())
    kept = [pair for pair in first.values() if frequency[pair.query.rstrip(".").casefold()] == 1]
    counts["dropped: query of several functions"] += len(first) - len(kept)
    return kept


def split_by_file(pairs, num_test, counts):
    """(train, test), sorted: whole files go to test, in the order of a hash of their relative path.

    Each gives at most `max_test_per_file` pairs, so that no file decides the result. Its other pairs are
    dropped: in train they would show the model the test documents' neighbours.
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


def ids_of(pair):
    """The ids of a record. They differ, so that code which mixes up queries and documents shows it."""
    return {"query_id": f"{pair.doc_id}:docstring", "doc_id": pair.doc_id}


def is_complete(output_dir, made_from):
    """True if `output_dir` holds this very data set, False if nothing; UserError if anything else."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return False
    if not (output_dir / MANIFEST_NAME).is_file():
        raise UserError(f"--output_dir {output_dir} is in use and not a data set. Name a new folder.")
    cure = f"Remove {output_dir} to make it again, or name a new folder."
    manifest = json.loads((output_dir / MANIFEST_NAME).read_text(encoding="utf-8"))
    for key, value in made_from.items():
        got = manifest.get("made_from", {}).get(key)
        if got != value:
            raise UserError(f"--output_dir {output_dir} was made with {key} {got}, not {value}. {cure}")
    for name, expected in manifest["sha256"].items():
        path = output_dir / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise UserError(f"{path} is missing or not as it was written. {cure}")
    return True


def make_pairs(output_dir, sources, num_test=500, num_workers=1):
    """Write the data set at `output_dir`, whole or not at all. Returns False if it was there already."""
    start = time.perf_counter()
    output_dir = Path(output_dir)
    if num_test < 1:
        raise UserError(f"--num_test {num_test} must be at least 1.")
    made_from = {
        "format_version": FORMAT_VERSION,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "versions": {source.name: source.version for source in sources},
        "limits": LIMITS,
        "num_test": num_test,
    }
    if is_complete(output_dir, made_from):
        print(f"{output_dir} is complete: nothing to do")
        return False
    files = [file for source in sources for file in list_files(source)]
    print(f"reading {len(files)} files of " + ", ".join(f"{s.name} {s.version}" for s in sources), flush=True)
    if num_workers > 1:
        # It ends by letting its processes finish; multiprocessing.Pool kills them, and may wait for one's lock forever.
        with ProcessPoolExecutor(num_workers) as pool:
            results = list(pool.map(read_file, files, chunksize=16))
    else:
        results = [read_file(file) for file in files]
    counts = sum((file_counts for _, file_counts in results), collections.Counter())
    pairs = keep_distinct([pair for file_pairs, _ in results for pair in file_pairs], counts)
    train, test = split_by_file(pairs, num_test, counts)
    counts["train pairs"], counts["test pairs"] = len(train), len(test)
    tables = {
        "test_queries.jsonl": [{"query": pair.query, **ids_of(pair)} for pair in test],
        "test_docs.jsonl": [{"pos_doc": pair.document, "doc_id": pair.doc_id} for pair in test],
        "train.jsonl": [{"query": p.query, "pos_doc": p.document, **ids_of(p)} for p in train],
    }
    manifest = {"made_from": made_from, "counts": dict(sorted(counts.items())), "sha256": {}}
    with folder_when_whole(output_dir.absolute()) as new_dir:
        for name, records in tables.items():
            data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
            (new_dir / name).write_bytes(data)
            manifest["sha256"][name] = hashlib.sha256(data).hexdigest()
        (new_dir / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
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
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
