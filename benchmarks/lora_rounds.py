"""A decoder trained in rounds with LoRA, as in the README: train, mine negatives, continue with the same matrices.

    python benchmarks/lora_rounds.py --model_name_or_path DECODER --train_file squad/train.jsonl \
        --query_file squad/test_queries.jsonl --doc_file squad/test_docs.jsonl --output_dir lora_rounds

Settings without a flag here have the recipes' defaults. Each round continues from the previous run. Prints a line per
model, the base first, and writes results.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from recovery import MEASURES, launched, read_metrics, run, summarise

from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import setting


@dataclass
class LoraRoundsArguments:
    model_name_or_path: str = setting("decoder, folder or hub name")
    train_file: str = setting("training records")
    query_file: str = setting("test queries with doc_id")
    doc_file: str = setting("test documents")
    output_dir: str = setting("folder for runs, vectors and results.json")
    rounds: int = setting("rounds of training; negatives are mined before each but the first", default=2)
    max_steps: int = setting("optimizer steps of a round", default=40)
    global_batch_size: int = setting("queries per step", default=64)
    max_length: int = setting("longest text in tokens", default=96)
    num_negatives: int = setting("hard negatives mined for a record", default=4)
    hard_negatives: int = setting("of these, so many are drawn for each sample", default=1)
    seed: int = setting("seed of the data order and of the LoRA matrices", default=0)
    num_ranks: int = setting("ranks of each job", default=2)


def main() -> None:
    (settings,) = parse_arguments(LoraRoundsArguments)
    output = Path(settings.output_dir).resolve()
    output.mkdir(parents=True)
    results: dict[str, list[dict[str, float]]] = {}

    def measure(name: str, model: Path | str) -> None:
        vectors = output / f"vectors-{name}"
        flags = ["--model_name_or_path", model, "--output_prefix", vectors, "--max_length", settings.max_length]
        launched(
            settings, "generate.py", *flags, "--query_files", settings.query_file, "--doc_files", settings.doc_file
        )
        (folder,) = vectors.glob("consumed_samples*")
        evaluate = ["recipes/evaluate.py", "--embeddings", folder, "--query_files", settings.query_file]
        run(sys.executable, *evaluate, threads=2)
        results[name] = [read_metrics(folder)]
        print(f"{name:<10} " + " ".join(f"{results[name][0][m]:8.4f}" for m in MEASURES), flush=True)

    print(f"{'model':<10} " + " ".join(f"{name:>8}" for name in MEASURES), flush=True)
    measure("base", settings.model_name_or_path)
    model: Path | str = settings.model_name_or_path
    records, hard_negatives = Path(settings.train_file).resolve(), 0
    for number in range(1, settings.rounds + 1):
        if number > 1:
            records = output / f"mined{number}.jsonl"
            mine = ["--model_name_or_path", model, "--train_files", settings.train_file, "--output_file", records]
            launched(settings, "mine_negatives.py", *mine, "--num_negatives", settings.num_negatives)
            hard_negatives = settings.hard_negatives
        run_folder = output / f"round{number}"
        flags = ["--deepspeed", "ds_configs/zero2.json", "--model_name_or_path", model, "--train_files", records]
        flags += ["--output_dir", run_folder, "--max_steps", settings.max_steps, "--max_length", settings.max_length]
        flags += ["--global_batch_size", settings.global_batch_size, "--hard_negatives", hard_negatives]
        flags += [
            "--seed",
            settings.seed + number,
            "--hard_negatives_sampling",
            "random" if hard_negatives else "first",
        ]
        launched(settings, "train_gpt.py", *flags)
        model = run_folder
        measure(f"round {number}", model)
    summarise(settings, results, output)


if __name__ == "__main__":
    main()
