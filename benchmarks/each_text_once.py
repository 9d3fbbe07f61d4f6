"""Does a step only cost as much as its distinct texts? Records with every document made distinct, as is, and clustered.

    python benchmarks/each_text_once.py --model_name_or_path all-MiniLM-L6-v2 --train_file squad/train.jsonl \
        --output_dir once --global_batch_size 2048 --hard_negatives 4 --max_length 128

The records need neg_doc. In the copy with distinct documents, the first word of each use of a document is replaced by a
unique number. The contestants, recipes/train_bert.py with grad_cache on one rank, take turns. A step of this size takes
minutes, so only one is timed, including the overhead of a first step; smaller steps need --max_steps and --skip_steps.
"""

import json
import shutil
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from contest import Goal, Spread, flags, launched, notebook_of, play, print_goals, print_table, spread, write_results
from train import first_layers, steady

from ds_embed.data.files import read_records
from ds_embed.settings import parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting

DISTINCT, ONCE, CLUSTERED = "every document distinct", "each text once", "each text once, clustered"


@dataclass
class OnceArguments(Settings):
    model_name_or_path: str = setting("model folder or hub name")
    train_file: str = setting("training records with neg_doc (JSONL or JSON)", files=True)
    output_dir: str = setting("folder for runs and each_text_once.json")
    rounds: int = setting("times that every contestant runs", default=3, above=0)
    go_on: bool = setting("keep what an earlier call with these settings measured", default=False)
    max_steps: int = setting("optimizer steps of a contestant", default=1, above=0)
    skip_steps: int = setting("first steps of these that are not timed", default=0, at_least=0)
    global_batch_size: int = setting("queries per step", default=2048, above=0)
    hard_negatives: int = setting("per query", default=4, above=0)
    max_length: int = setting("longest text in tokens", default=256, above=0)
    micro_batch_tokens: int = setting("padded tokens per forward pass", default=4096, above=0)
    num_layers: int = setting("first layers of the model that are kept; 0 keeps all", default=0, at_least=0)
    goal: float = setting("times as fast as with distinct documents", default=5.0, above=0)

    def __post_init__(self):
        super().__post_init__()
        if self.skip_steps >= self.max_steps:
            raise UserError(f"--skip_steps {self.skip_steps}: leaves none of --max_steps {self.max_steps} to be timed")


def make_distinct(source: str, target: Path) -> None:
    """Write the records of `source` with every use of a document made distinct."""
    numbers = count()

    def distinct(text: str) -> str:
        return f"{next(numbers)} {text.partition(' ')[2]}"

    with open(target, "w", encoding="utf-8") as file:
        for _, record in read_records(source):
            negatives = record["neg_doc"] if isinstance(record["neg_doc"], list) else [record["neg_doc"]]
            documents = {"pos_doc": distinct(record["pos_doc"]), "neg_doc": [distinct(text) for text in negatives]}
            file.write(json.dumps({"query": record["query"]} | documents) + "\n")


def step(settings: OnceArguments, model: str, records: Path, batching: str) -> dict:
    """Tokens, seconds and peak memory of a step."""
    folder = Path(settings.output_dir).resolve()
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    words = flags(
        deepspeed="ds_configs/zero1.json",
        model_name_or_path=model,
        train_files=records,
        output_dir=run,
        cache_dir=folder / "cache",
        query_prefix="",
        doc_prefix="",
        max_length=settings.max_length,
        global_batch_size=settings.global_batch_size,
        hard_negatives=settings.hard_negatives,
        micro_batch_tokens=settings.micro_batch_tokens,
        batching=batching,
        grad_cache="true",
        max_steps=settings.max_steps,
        report_to="none",
    )
    finished = launched(1, "recipes/train_bert.py", *words)
    measured = steady(run / "metrics.jsonl", settings.skip_steps)
    steps = settings.max_steps - settings.skip_steps
    return {
        "seconds": measured["seconds"] / steps,
        "named": measured["num_tokens"] / steps,
        "encoded": measured["tokens_encoded_per_second"] * measured["seconds"] / steps,
        "peak_gib": finished.peak_gib,
    }


def main() -> None:
    (settings,) = parse_arguments(OnceArguments)
    folder = Path(settings.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    records, distinct = Path(settings.train_file).resolve(), folder / "distinct.jsonl"
    make_distinct(settings.train_file, distinct)
    model = first_layers(settings.model_name_or_path, settings.num_layers, folder)
    contestants = {
        DISTINCT: lambda _: step(settings, model, distinct, "mixed"),
        ONCE: lambda _: step(settings, model, records, "mixed"),
        CLUSTERED: lambda _: step(settings, model, records, "clustered"),
    }
    results = play(contestants, settings.rounds, notebook_of(settings, folder))
    keys = ("seconds", "named", "encoded", "peak_gib")
    rows = [[name, *(spread(results, name, key) for key in keys)] for name in results]
    print_table(["contestant", "seconds a step", "tokens named", "tokens encoded", "peak memory, GiB"], rows)

    def faster(name: str) -> Spread:
        return Spread.of([slow["seconds"] / fast["seconds"] for slow, fast in zip(results[DISTINCT], results[name])])

    reached = [Goal(f"{name}: times as fast", faster(name), settings.goal) for name in (ONCE, CLUSTERED)]
    print_goals(reached)
    write_results(folder / "each_text_once.json", settings, results, reached)


if __name__ == "__main__":
    main()
