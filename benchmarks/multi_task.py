"""Does a task lose when it shares a run with another? Retrieval and labelled texts, each alone and both in one run.

    python benchmarks/multi_task.py --model_name_or_path all-MiniLM-L6-v2 --banking banking77 --train_file squad/train.jsonl \
        --query_file squad/test_queries.jsonl --doc_file squad/test_docs.jsonl --output_dir multi_task

For each seed, recipes/train_bert.py trains the model on the retrieval records, on Banking77's train.csv, and on both with
equal weights in twice as many steps, so that each task has as many samples as alone. The measures are nDCG@10 of the
held-out queries, and the share of Banking77's test questions whose nearest training question has the same intent. All
vectors are float32. Prints a table and writes results.json.
"""

import csv
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from graded_pairs import embedder, nearest_accuracy, train_ours

from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import Settings, setting

RETRIEVAL, LABELS = "nDCG@10", "nearest label"


@dataclass
class MultiTaskArguments(Settings):
    model_name_or_path: str = setting("BERT-family model with a mean of its tokens, folder or hub name")
    banking: str = setting("folder with train.csv and test.csv", files=True)
    train_file: str = setting("retrieval records (JSONL or JSON)", files=True)
    query_file: str = setting("held-out queries with doc_id (JSONL)", files=True)
    doc_file: str = setting("held-out documents", files=True)
    output_dir: str = setting("folder for models and results.json")
    seeds: list[int] = setting("seeds of the order of data", default_factory=lambda: [0, 1, 2])
    max_steps: int = setting("optimizer steps of a task alone", default=60)
    global_batch_size: int = setting("queries per step", default=32)
    learning_rate: float = setting("peak learning rate; linear decay", default=2e-5)
    warmup_steps: int = setting("steps of linear rise", default=10)
    max_length: int = setting("longest text in tokens", default=128)


def retrieval(settings: MultiTaskArguments, model: str | Path) -> float:
    from ds_embed.data.files import read_records
    from ds_embed.vectors.metrics import SearchRun, evaluate, read_qrels_from_queries
    from ds_embed.vectors.search import search

    queries, documents = ([record for _, record in read_records(p)] for p in (settings.query_file, settings.doc_file))
    encoder = embedder(model)
    vectors = (
        encoder.encode_queries([q["query"] for q in queries]),
        encoder.encode_documents([d["pos_doc"] for d in documents]),
    )
    found = SearchRun([q["query_id"] for q in queries], [d["doc_id"] for d in documents], *search(*vectors, 10))
    return evaluate(found, read_qrels_from_queries([settings.query_file]), ["nDCG@10"]).means["nDCG@10"]


def main() -> None:
    (settings,) = parse_arguments(MultiTaskArguments)
    output = Path(settings.output_dir).resolve()
    output.mkdir(parents=True)
    labels = output / "labels.jsonl"
    with open(Path(settings.banking) / "train.csv", encoding="utf-8", newline="") as file:
        rows = [json.dumps({"text": row["text"], "label": row["category"]}) + "\n" for row in csv.DictReader(file)]
    labels.write_text("".join(rows), encoding="utf-8")
    both = replace(settings, max_steps=2 * settings.max_steps)
    arms = {
        "retrieval alone": (settings, [settings.train_file]),
        "labels alone": (settings, [labels]),
        "both": (both, [settings.train_file, labels]),
    }
    results: dict[str, list[dict[str, float]]] = {}

    def measure(name: str, model: str | Path) -> None:
        values = {RETRIEVAL: retrieval(settings, model), LABELS: nearest_accuracy(settings, model)}
        results.setdefault(name, []).append(values)
        print(f"{name:<20} " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()), flush=True)

    measure("before", settings.model_name_or_path)
    for seed in settings.seeds:
        for name, (arguments, files) in arms.items():
            weights = ["--sampling_probabilities", 1, 1] if len(files) > 1 else []
            measure(name, train_ours(arguments, seed, output / f"{name.replace(' ', '_')}-{seed}", files, *weights))
        content = {"settings": settings.__dict__, "results": results}
        (output / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    for name, runs in results.items():
        for key in (RETRIEVAL, LABELS):
            values = [run[key] for run in runs]
            spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            print(f"{name:<20} {key:<14} {statistics.mean(values):.4f}{spread}", flush=True)


if __name__ == "__main__":
    main()
