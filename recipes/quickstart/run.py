"""The quickstart: a decoder becomes a code-search model on DeepSpeed, measured before and after.

    make quickstart          (or: python recipes/quickstart/run.py --output_dir runs/quickstart)

Runs the recipes as a user would, one command after the other. OUTPUT_DIR receives all their output, commands.sh with
the commands, logs/ with what they print, and results.json. When started again, it skips finished steps.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from ds_embed.artifact.durable import replaced_when_whole

RECIPES = Path(__file__).resolve().parent.parent
MEASURES = ("nDCG@10", "RR@10", "R@1", "R@10", "R@100")
EXAMPLE_QUERY = "format a date for an email header"
STAGES = 7


class Stages:
    """Runs commands and prints a line for each stage; `number` counts the stages begun."""

    def __init__(self, output_dir: Path):
        self.number, self.logs, self.script = 0, output_dir / "logs", output_dir / "commands.sh"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.script.write_text("# What the quickstart ran.\n")

    def run(self, title: str, *commands: list[object], shown_from: str | None = None) -> float:
        """Run commands at the same time and return the seconds. If one fails, print the end of its log and exit.

        Prints the output of the last command, from the words `shown_from` on.
        """
        self.number += 1
        head, start, running = f"[{self.number}/{STAGES}] {title:<52}", time.perf_counter(), []
        print(head, end="", flush=True)
        for command in commands:
            words = [str(word) for word in command]
            name = next(Path(word).stem for word in words if word.endswith(".py"))
            path = self.logs / f"{self.number}_{name}.log"
            with open(self.script, "a") as script:
                script.write(shlex.join(words) + "\n")
            with open(path, "w") as log:
                running.append((path, subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)))
        while any(process.poll() is None for _, process in running):
            time.sleep(0.2)
            if sys.stdout.isatty():  # the progress bar of the running command
                last = re.split(r"[\r\n]", tail(running[-1][0]).strip())[-1]
                print(f"\r{head}{last[:60]:<60}", end="", flush=True)
        seconds = time.perf_counter() - start
        print(f"\r{head}{f'{seconds:.0f} s':<60}".rstrip() if sys.stdout.isatty() else f"{seconds:.0f} s", flush=True)
        for path, process in running:
            if process.returncode:
                print(f"\n{tail(path)}\nfailed with exit code {process.returncode}; all of it: {path}", file=sys.stderr)
                raise SystemExit(process.returncode)
        if shown_from is not None:
            text = path.read_text()
            print("\n" + text[text.index(shown_from) :].strip())
        return seconds


def tail(path: Path, num_bytes: int = 2000) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - num_bytes))
        return file.read().decode(errors="replace")


def num_ranks() -> int:
    """One rank per GPU, or without GPUs one on each of two cores."""
    import torch

    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="folder for everything")
    parser.add_argument("--max_steps", type=int, default=45, help="optimizer steps")
    arguments = parser.parse_args()
    started, out = time.perf_counter(), arguments.output_dir
    base, data, trained, vectors, results = (out / n for n in ("base", "data", "run", "embeddings", "results.json"))
    stages = Stages(out)
    print(f"{num_ranks()} rank(s); the commands: {stages.script}, what they print: {stages.logs}\n")
    python, own = [sys.executable], RECIPES / "quickstart"
    deepspeed = [*python, "-m", "deepspeed.launcher.runner", "--log_level", "warning", "--num_gpus", num_ranks()]
    texts = ["--query_files", data / "test_queries.jsonl", "--doc_files", data / "test_docs.jsonl"]
    cache = ["--cache_dir", out / "cache"]
    generate = [*deepspeed, RECIPES / "generate.py", *texts, *cache, "--output_prefix", vectors, "--model_name_or_path"]

    def measure(model: str, folder: Path) -> dict[str, float]:
        stages.run(
            f"search and measure, {model}",
            [*python, RECIPES / "evaluate.py", "--embeddings", folder, "--query_files", data / "test_queries.jsonl"],
        )
        metrics = json.loads((folder / "metrics.json").read_text())
        return {name: metrics[name] for name in MEASURES}

    stages.run(
        "fetch the base model, read the data",
        [*python, own / "make_model.py", "--output_dir", base],
        [*python, own / "make_pairs.py", "--output_dir", data],
    )
    stages.run("encode the test texts, base model", [*generate, base, "--config", own / "encode_base.yaml"])
    before = measure("base model", vectors / "consumed_samples0")
    settings = ["--config", own / "train.yaml", "--deepspeed", RECIPES.parent / "ds_configs" / "zero1.json"]
    train = [*deepspeed, RECIPES / "train_gpt.py", *settings, "--model_name_or_path", base]
    was_trained = (trained / "model").exists() and results.exists()
    of_run = [
        "--train_files",
        data / "train.jsonl",
        *cache,
        "--max_steps",
        arguments.max_steps,
        "--output_dir",
        trained,
    ]
    train_seconds = stages.run(f"train, {arguments.max_steps} steps", [*train, *of_run])
    if was_trained:
        train_seconds = json.loads(results.read_text())["train_seconds"]
    stages.run("encode the test texts, trained model", [*generate, trained])
    consumed = json.loads((trained / "model" / "ds_embed.json").read_text())["consumed_samples"]
    encoded = vectors / f"consumed_samples{consumed}"
    after = measure("trained model", encoded)
    on_encoded = ["--embeddings", encoded, "--doc_files", data / "test_docs.jsonl"]
    stages.run(
        "write the report, search for an example",
        [*python, RECIPES / "report.py", trained, *on_encoded, "--query_files", data / "test_queries.jsonl"],
        [*python, RECIPES / "search.py", EXAMPLE_QUERY, "--model_name_or_path", trained, *on_encoded, "--top_k", 2],
        shown_from="query: ",
    )
    total_seconds = time.perf_counter() - started
    print("\n| model  | " + " | ".join(f"{name:>7}" for name in MEASURES) + " |")
    print("|--------|" + "|".join("-" * 9 for _ in MEASURES) + "|")
    for name, metrics in (("before", before), ("after", after)):
        print(f"| {name:<6} | " + " | ".join(f"{metrics[m]:7.3f}" for m in MEASURES) + " |")
    figures = {"before": before, "after": after, "train_seconds": train_seconds, "total_seconds": total_seconds}
    with replaced_when_whole(results) as file:
        file.write(json.dumps(figures, indent=2) + "\n")
    report = trained / "report"
    print(f"\ntrained in {train_seconds:.0f} s, {total_seconds:.0f} s in all; written to {results}")
    print(f"the report of the run: {report / 'report.html'}, its pictures: {report / 'loss.png'} and others beside it")
    print('\nnow your data: a file with a line {"query": "...", "pos_doc": "..."} for each pair, and\n')
    command = [
        Path(sys.executable).with_name("ds-embed"),
        "train-gpt",
        "--num_gpus",
        num_ranks(),
        "--deepspeed",
        "zero1",
    ]
    command += ["--config", own / "train.yaml", "--model_name_or_path", base, "--train_files", "YOUR.jsonl"]
    command += ["--output_dir", out.parent / "mine"]
    words = (os.path.relpath(word) if isinstance(word, Path) else str(word) for word in command)
    print("    " + shlex.join(words))


if __name__ == "__main__":
    main()
