"""Is tokenizing the data faster than with `datasets.map`, and does it need less memory? Writes a table and JSON.

    python benchmarks/data.py --model_name_or_path all-MiniLM-L6-v2 --output_dir data-speed --records 200000

The records are generated from words of the tokenizer's vocabulary, 5 to 20 per query and 20 to 150 per document. Ours
builds a token store, including hashes of texts and ids. Theirs loads the same JSONL with `datasets` and maps the same
tokenizer over it in batches, in one process (whose tokenizer uses threads) and in one per core. Then it times opening
the store, and assembling and planning a global batch, each the best of several. Needs `pip install -e .[benchmark]`.
"""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import CORES, Goal, in_process, play, print_goals, print_table, ratio, spread, write_results

from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import Settings, setting

OURS, MAP, MAP_CORES = "token store", "datasets.map", "datasets.map, a process per core"


@dataclass
class DataSpeedArguments(Settings):
    model_name_or_path: str = setting("model folder or hub name, for its tokenizer")
    output_dir: str = setting("folder for records, stores and data.json")
    records: int = setting("training records that are generated", default=200_000, above=0)
    rounds: int = setting("times that every contestant runs", default=3, above=0)
    max_length: int = setting("longest text in tokens", default=128, above=0)
    batch_sizes: list[int] = setting("queries of the planned batches", default_factory=lambda: [64, 1024, 8192])
    micro_batch_tokens: int = setting("padded tokens per forward pass, for the plan", default=4096, above=0)


def write_records(*, model: str, path: str, records: int) -> dict:
    """Write a JSONL file of generated training records."""
    from ds_embed.models.loading import find_model, load_tokenizer

    vocabulary = load_tokenizer(find_model(model), False).get_vocab()
    words = sorted(word for token in vocabulary if (word := token.strip("Ġ▁#")).isalnum())
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(records):
            query, document = (" ".join(rng.choices(words, k=rng.randint(*k))) for k in ((5, 20), (20, 150)))
            record = {"query": query, "pos_doc": document, "query_id": f"q{number}", "doc_id": f"d{number}"}
            file.write(json.dumps(record) + "\n")
    return {"bytes": Path(path).stat().st_size}


def build_store(*, model: str, path: str, folder: str, max_length: int, records: int) -> dict:
    """Build our token store."""
    from ds_embed.data.store import build_training_store
    from ds_embed.data.tokenize import TextFormat
    from ds_embed.models.loading import find_model, load_tokenizer

    tokenizer = load_tokenizer(find_model(model), False)
    text_format = TextFormat(prefix="", max_length=max_length, append_eos=False)
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    store = build_training_store([path], tokenizer, text_format, text_format, 0, folder)
    seconds = time.perf_counter() - started
    return {"records_per_second": records / seconds, "seconds": seconds, "store": str(store)}


def map_tokenizer(*, model: str, path: str, folder: str, max_length: int, records: int, processes: int) -> dict:
    """`datasets`: load the JSONL and map the tokenizer over its texts."""
    from datasets import disable_progress_bars, load_dataset

    from ds_embed.models.loading import find_model, load_tokenizer

    disable_progress_bars()
    tokenizer = load_tokenizer(find_model(model), False)

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        query, document = (
            tokenizer(batch[name], truncation=True, max_length=max_length)["input_ids"] for name in ("query", "pos_doc")
        )
        return {"query_ids": query, "document_ids": document}

    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    data = load_dataset("json", data_files=path, split="train", cache_dir=folder)
    mapped = data.map(
        tokenize, batched=True, remove_columns=data.column_names, num_proc=processes if processes > 1 else None
    )
    seconds = time.perf_counter() - started
    assert len(mapped) == records
    return {"records_per_second": records / seconds, "seconds": seconds}


def open_and_plan(*, store: str, batch_sizes: list[int], micro_batch_tokens: int, repeats: int = 10) -> dict:
    """Milliseconds to open a store, and to assemble and plan a batch of each size; the best of several."""
    from ds_embed.data.batch import assemble_batch
    from ds_embed.data.order import SampleOrder
    from ds_embed.data.plan import plan_micro_batches
    from ds_embed.data.store import TrainingStore

    def best(work: Callable[[int], Any]) -> float:
        times = []
        for number in range(repeats):
            started = time.perf_counter()
            work(number)
            times.append(time.perf_counter() - started)
        return 1000 * min(times)

    opened = TrainingStore.open(store)
    order = SampleOrder(0, opened.file_sizes)

    def prepare(number: int, size: int) -> None:
        batch = assemble_batch(opened, order, first_sample=number * size, num_queries=size, hard_negatives=0)
        plan_micro_batches(batch.lengths, micro_batch_tokens, 1)

    times = {"open the store": best(lambda _: TrainingStore.open(store))}
    return times | {f"batch of {size:,}": best(lambda number, size=size: prepare(number, size)) for size in batch_sizes}


def main() -> None:
    (settings,) = parse_arguments(DataSpeedArguments)
    folder = Path(settings.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "records.jsonl"
    written = in_process("data:write_records", model=settings.model_name_or_path, path=path, records=settings.records)
    same = {"model": settings.model_name_or_path, "path": path, "max_length": settings.max_length}
    same["records"] = settings.records

    def mapped(processes: int) -> dict:
        return in_process("data:map_tokenizer", **same, folder=folder / "map", processes=processes)

    playing = {
        OURS: lambda _: in_process("data:build_store", **same, folder=folder / "store"),
        MAP: lambda _: mapped(1),
        MAP_CORES: lambda _: mapped(CORES),
    }
    results: dict[str, Any] = play(playing, settings.rounds)
    print(f"\n{settings.records:,} records, {written['bytes'] / 1e6:,.1f} MB")
    rows = [[name, spread(results, name, "records_per_second"), spread(results, name, "peak_gib")] for name in playing]
    print_table(["contestant", "records/s: median (range)", "peak memory, GiB"], rows)
    reached = [
        Goal(f"{OURS} / {name}", ratio(results, OURS, name, "records_per_second"), 1.0) for name in (MAP, MAP_CORES)
    ]
    print_goals(reached)
    results["times"] = in_process(
        "data:open_and_plan",
        store=results[OURS][-1]["store"],
        batch_sizes=settings.batch_sizes,
        micro_batch_tokens=settings.micro_batch_tokens,
    )
    times = {name: value for name, value in results["times"].items() if name != "peak_gib"}
    print_table(["what", "ms"], [[name, f"{value:.3g}"] for name, value in times.items()])
    write_results(folder / "data.json", settings, results, reached)


if __name__ == "__main__":
    main()
