"""Do mined hard negatives help? Train, mine with the trained model, and continue training with and without them.

    python benchmarks/two_rounds.py --model_name_or_path all-MiniLM-L6-v2 --train_file squad/train.jsonl \
        --query_file squad/test_queries.jsonl --doc_file squad/test_docs.jsonl --output_dir two_rounds

For each seed, the model's last layers are reinitialized (a model that has already seen the data might learn nothing).
Round 1 trains it on queries and positives. Then recipes/mine_negatives.py adds hard negatives to every record, and
round 2 continues from round 1 with them; as a control, another round 2 continues without. BM25 is measured on the same
test set. Prints a table and writes results.json.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from recovery import MEASURES, REPOSITORY, RecoveryArguments, draw_anew, launched, measure, read_metrics, run, summarise

from ds_embed.data.files import read_records
from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import setting


@dataclass
class RoundsArguments(RecoveryArguments):
    max_steps: int = setting("optimizer steps of a round", default=100)
    num_negatives: int = setting("hard negatives mined for a record", default=4)
    hard_negatives: int = setting("of these, so many are drawn for each sample of round 2", default=1)
    relative_margin: float = setting("mined negatives score at most (1 - this) of the positive", default=0.05)


def train(
    settings: RoundsArguments, base: Path, records: Path, seed: int, folder: Path, hard_negatives: int, *more: object
) -> Path:
    launched(
        settings,
        "train_bert.py",
        "--deepspeed",
        "ds_configs/zero2.json",
        "--model_name_or_path",
        base,
        "--train_files",
        records,
        "--output_dir",
        folder,
        "--seed",
        seed,
        "--hard_negatives",
        hard_negatives,
        "--hard_negatives_sampling",
        "random" if hard_negatives else "first",
        "--query_prefix",
        "",
        "--doc_prefix",
        "",
        "--query_max_length",
        settings.query_max_length,
        "--doc_max_length",
        settings.doc_max_length,
        "--global_batch_size",
        settings.global_batch_size,
        "--max_steps",
        settings.max_steps,
        "--learning_rate",
        settings.learning_rate,
        "--lr_scheduler",
        "linear",
        "--warmup_steps",
        settings.warmup_steps,
        "--temperature",
        settings.temperature,
        "--report_to",
        "none",
        *more,
    )
    return folder / "model"


def mine(settings: RoundsArguments, run_folder: Path, output: Path) -> Path:
    launched(
        settings,
        "mine_negatives.py",
        "--model_name_or_path",
        run_folder,
        "--train_files",
        settings.train_file,
        "--output_file",
        output,
        "--num_negatives",
        settings.num_negatives,
        "--relative_margin",
        settings.relative_margin,
        "--drop_without_negatives",
        "true",
    )
    return output


def bm25(settings: RoundsArguments, folder: Path) -> dict[str, float]:
    """BM25 on the test documents, measured like any run file."""
    import bm25s

    documents = [record for _, record in read_records(settings.doc_file)]
    queries = [record for _, record in read_records(settings.query_file)]
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize([d["pos_doc"] for d in documents], show_progress=False), show_progress=False)
    tokens = bm25s.tokenize([q["query"] for q in queries], show_progress=False)
    rows, scores = retriever.retrieve(tokens, k=min(100, len(documents)), show_progress=False)
    folder.mkdir()
    with open(folder / "run.trec", "w", encoding="utf-8") as file:
        for query, found, values in zip(queries, rows, scores):
            for rank, (row, score) in enumerate(zip(found, values), start=1):
                file.write(f"{query['query_id']} Q0 {documents[row]['doc_id']} {rank} {score:.6f} bm25\n")
    run(
        sys.executable,
        REPOSITORY / "recipes/evaluate.py",
        "--run_file",
        folder / "run.trec",
        "--query_files",
        settings.query_file,
        "--output_dir",
        folder,
        threads=2,
    )
    return read_metrics(folder)


def main() -> None:
    (settings,) = parse_arguments(RoundsArguments)
    output = Path(settings.output_dir).resolve()
    output.mkdir(parents=True)
    results: dict[str, list[dict[str, float]]] = {}

    def add(name: str, seed: int | str, metrics: dict[str, float]) -> None:
        results.setdefault(name, []).append(metrics)
        print(f"{name:<22} {seed!s:>4} " + " ".join(f"{metrics[m]:8.4f}" for m in MEASURES), flush=True)

    print(f"{'model':<22} {'seed':>4} " + " ".join(f"{name:>8}" for name in MEASURES), flush=True)
    add("BM25", "-", bm25(settings, output / "bm25"))
    for seed in settings.seeds:
        place = output / f"seed{seed}"
        base = draw_anew(settings.model_name_or_path, settings.num_layers, seed, place / "base")
        add("base", seed, measure(settings, base, place / "vectors-base"))
        first = train(settings, base, Path(settings.train_file), seed, place / "round1", 0)
        add("round 1", seed, measure(settings, first, place / "vectors-round1"))
        mined = mine(settings, first.parent, place / "mined.jsonl")
        second = train(settings, first, mined, seed + 1000, place / "round2", settings.hard_negatives)
        add("round 2, mined", seed, measure(settings, second, place / "vectors-round2"))
        control = train(settings, first, Path(settings.train_file), seed + 1000, place / "control", 0)
        add("round 2, without", seed, measure(settings, control, place / "vectors-control"))
    summarise(settings, results, output)


if __name__ == "__main__":
    main()
