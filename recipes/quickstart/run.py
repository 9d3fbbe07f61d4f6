"""The quickstart: a decoder becomes a code-search model on DeepSpeed, measured before and after.

    make quickstart          (or: python recipes/quickstart/run.py --output_dir runs/quickstart)

Runs the recipes as a user would, one command after the other, and prints each. It writes
OUTPUT_DIR/results.json; the base model and the data are made once and kept in OUTPUT_DIR.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

RECIPES = Path(__file__).resolve().parent.parent
MEASURES = ("nDCG@10", "RR@10", "R@1", "R@10", "R@100")
EXAMPLE_QUERY = "format a date for an email header"


def run(*command: object) -> None:
    """Show a command, run it, and end here if it fails."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words).replace(sys.executable, 'python')}", flush=True)
    code = subprocess.run(words).returncode
    if code:
        raise SystemExit(code)


def together(*commands: list[object]) -> None:
    """Run commands at the same time."""
    running = []
    for command in commands:
        words = [str(word) for word in command]
        print(f"\n$ {shlex.join(words).replace(sys.executable, 'python')}", flush=True)
        running.append(subprocess.Popen(words))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(next(code for code in codes if code))


def num_ranks() -> int:
    """A rank a GPU, else one on each of two cores."""
    import torch

    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def evaluate(folder: Path, data: Path) -> dict[str, float]:
    run(sys.executable, RECIPES / "evaluate.py", "--embeddings", folder, "--query_files", data / "test_queries.jsonl")
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: metrics[name] for name in MEASURES}


def print_table(before: dict[str, float], after: dict[str, float]) -> None:
    print("\n| model  | " + " | ".join(f"{name:>7}" for name in MEASURES) + " |")
    print("|--------|" + "|".join("-" * 9 for _ in MEASURES) + "|")
    for name, metrics in (("before", before), ("after", after)):
        print(f"| {name:<6} | " + " | ".join(f"{metrics[m]:7.3f}" for m in MEASURES) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="folder for everything")
    parser.add_argument("--max_steps", type=int, default=100, help="optimizer steps")
    arguments = parser.parse_args()
    started = time.perf_counter()
    out = arguments.output_dir
    out.mkdir(parents=True, exist_ok=True)
    base, data, trained, vectors = out / "base", out / "data", out / "run", out / "embeddings"
    together(
        [sys.executable, RECIPES / "quickstart" / "make_model.py", "--output_dir", base],
        [sys.executable, RECIPES / "quickstart" / "make_pairs.py", "--output_dir", data],
    )
    for folder in (trained, vectors):  # of an earlier quickstart
        shutil.rmtree(folder, ignore_errors=True)

    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning", "--num_gpus", num_ranks()]
    settings = ["--config", RECIPES / "quickstart" / "train.yaml"]
    test_files = ["--query_files", data / "test_queries.jsonl", "--doc_files", data / "test_docs.jsonl"]
    cache = ["--cache_dir", out / "cache"]
    encode_base = ["--config", RECIPES / "quickstart" / "encode_base.yaml", "--model_name_or_path", base]

    run(*deepspeed, RECIPES / "generate.py", *encode_base, *test_files, *cache, "--output_prefix", vectors)
    before = evaluate(vectors / "consumed_samples0", data)

    train_started = time.perf_counter()
    run(
        *deepspeed,
        RECIPES / "train_gpt.py",
        *settings,
        "--deepspeed",
        RECIPES.parent / "ds_configs" / "zero1.json",
        "--model_name_or_path",
        base,
        "--train_files",
        data / "train.jsonl",
        *cache,
        "--max_steps",
        arguments.max_steps,
        "--output_dir",
        trained,
    )
    train_seconds = time.perf_counter() - train_started
    run(
        *deepspeed,
        RECIPES / "generate.py",
        "--model_name_or_path",
        trained,
        *test_files,
        *cache,
        "--output_prefix",
        vectors,
    )
    consumed = json.loads((trained / "model" / "ds_embed.json").read_text())["consumed_samples"]
    after = evaluate(vectors / f"consumed_samples{consumed}", data)

    run(
        sys.executable,
        RECIPES / "search.py",
        EXAMPLE_QUERY,
        "--model_name_or_path",
        trained,
        "--embeddings",
        vectors / f"consumed_samples{consumed}",
        "--doc_files",
        data / "test_docs.jsonl",
        "--top_k",
        3,
    )
    total_seconds = time.perf_counter() - started
    print_table(before, after)
    results = {"before": before, "after": after, "train_seconds": train_seconds, "total_seconds": total_seconds}
    temporary = out / ".results.json"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(out / "results.json")
    print(f"\ntrained in {train_seconds:.0f} s, {total_seconds:.0f} s in all; written to {out / 'results.json'}")


if __name__ == "__main__":
    main()
