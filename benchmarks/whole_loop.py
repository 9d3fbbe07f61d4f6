"""Train, mine, train a reranker, rerank, distil it, continue training: what each stage of the loop gains.

    python benchmarks/whole_loop.py --model_name_or_path all-MiniLM-L6-v2 --train_file squad/train.jsonl \
        --query_file squad/test_queries.jsonl --doc_file squad/test_docs.jsonl --output_dir whole_loop

The embedder's last layers are reinitialized, as in benchmarks/two_rounds.py; the reranker starts from the unchanged
model. It reranks the best documents of two first stages, BM25 and the embedder. Then the embedder is trained further in
three ways with equal steps: with mined negatives, with mined negatives and the reranker as a teacher, and without
negatives. Prints a table and writes results.json. When started again with the same flags, it skips finished parts.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from recovery import MEASURES, draw_anew, launched, measure, read_metrics, run, summarise
from two_rounds import RoundsArguments, bm25, train

from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import setting


@dataclass
class LoopArguments(RoundsArguments):
    seeds: list[int] = setting("seeds of the new layers and of the order of data", default_factory=lambda: [0])
    max_steps: int = setting("optimizer steps of the embedder's first round", default=60)
    more_steps: int = setting("optimizer steps of its second round", default=30)
    num_records: int = setting("training records used, spread over the file", default=2000)
    num_queries: int = setting("test queries used, spread over the file", default=300)
    num_negatives: int = setting("hard negatives mined for a record", default=7)
    hard_negatives: int = setting("of these, so many are drawn for each sample", default=3)
    top_k: int = setting("documents of a query that are reranked", default=50)
    reranker_steps: int = setting("optimizer steps of the reranker", default=125)
    reranker_batch: int = setting("queries of a step of the reranker", default=16)
    candidates: int = setting("candidates of a record that the reranker scores as a teacher", default=15)


def spread(source: str, number: int, target: Path) -> Path:
    """Write `number` evenly spaced lines of a file (neighbours may share a document) to another file."""
    lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
    number = min(number, len(lines))
    target.write_text("".join(lines[i * len(lines) // number] for i in range(number)), encoding="utf-8")
    return target


def mine(settings: LoopArguments, model: Path, output: Path, *flags: object) -> Path:
    if not output.exists():
        rules = ["--num_negatives", settings.num_negatives, "--range_max", settings.candidates]
        files = ["--model_name_or_path", model, "--train_files", settings.train_file, "--output_file", output]
        margin = ["--relative_margin", settings.relative_margin, "--drop_without_negatives", "true"]
        launched(settings, "mine_negatives.py", *files, *rules, *margin, *flags)
    return output


def train_reranker(settings: LoopArguments, records: Path, seed: int, folder: Path) -> Path:
    flags = ["--deepspeed", "ds_configs/zero2.json", "--model_name_or_path", settings.model_name_or_path]
    flags += ["--train_files", records, "--output_dir", folder, "--hard_negatives", settings.hard_negatives]
    flags += ["--hard_negatives_sampling", "random", "--seed", seed, "--max_length", 160, "--max_steps"]
    flags += [settings.reranker_steps, "--global_batch_size", settings.reranker_batch, "--learning_rate", "1e-4"]
    if not (folder / "model").exists():
        launched(settings, "train_reranker.py", *flags, "--warmup_steps", settings.warmup_steps, "--report_to", "none")
    return folder


def rerank(settings: LoopArguments, reranker: Path, folder: Path, *first_stage: object) -> dict[str, float]:
    """Measures of a first stage's best documents after reranking."""
    folder.mkdir(exist_ok=True)
    texts = ["--query_files", settings.query_file, "--doc_files", settings.doc_file, "--top_k", settings.top_k]
    target = folder / "run.trec"
    if not target.exists():
        place = ["--model_name_or_path", reranker, "--output_file", target, "--bf16", "true"]
        launched(settings, "rerank.py", *first_stage, *texts, *place)
    words = ["--run_file", target, "--query_files", settings.query_file, "--output_dir", folder]
    run(sys.executable, "recipes/evaluate.py", *words, threads=2)
    return read_metrics(folder)


def main() -> None:
    (settings,) = parse_arguments(LoopArguments)
    output = Path(settings.output_dir).resolve()
    output.mkdir(parents=True, exist_ok=True)
    settings.train_file = str(spread(settings.train_file, settings.num_records, output / "train.jsonl"))
    settings.query_file = str(spread(settings.query_file, settings.num_queries, output / "queries.jsonl"))
    results: dict[str, list[dict[str, float]]] = {}

    def add(name: str, metrics: dict[str, float]) -> None:
        results.setdefault(name, []).append(metrics)
        print(f"{name:<28} " + " ".join(f"{metrics[m]:8.4f}" for m in MEASURES), flush=True)

    def trained(base: Path, records: Path | str, seed: int, folder: Path, hard: int, *flags: object) -> Path:
        if not (folder / "model").exists():
            train(settings, base, Path(records), seed, folder, hard, *flags)
        return folder / "model"

    print(f"{'model':<28} " + " ".join(f"{name:>8}" for name in MEASURES), flush=True)
    words = output / "bm25"
    add("BM25", read_metrics(words) if (words / "metrics.json").exists() else bm25(settings, words))
    for seed in settings.seeds:
        place = output / f"seed{seed}"
        base = place / "base"
        if not base.exists():
            draw_anew(settings.model_name_or_path, settings.num_layers, seed, base)
        first = trained(base, settings.train_file, seed, place / "round1", 0)
        add("embedder, round 1", measure(settings, first, place / "vectors-round1"))
        mined = mine(settings, first.parent, place / "mined.jsonl")
        reranker = train_reranker(settings, mined, seed, place / "reranker")
        add("BM25, reranked", rerank(settings, reranker, place / "on-bm25", "--run_file", words / "run.trec"))
        (vectors,) = (place / "vectors-round1").glob("consumed_samples*")
        add("embedder, reranked", rerank(settings, reranker, place / "on-round1", "--embeddings", vectors))
        taught = mine(
            settings,
            first.parent,
            place / "taught.jsonl",
            *("--cross_encoder", reranker, "--cross_encoder_max_length", 160, "--cross_encoder_bf16", "true"),
        )
        settings.max_steps, steps = settings.more_steps, settings.max_steps
        more = (
            ("mined", mined, settings.hard_negatives, ()),
            ("distilled", taught, settings.hard_negatives, ("--distillation_weight", 1)),
            ("without", settings.train_file, 0, ()),
        )
        for name, records, hard, flags in more:
            model = trained(first, records, seed + 1000, place / f"round2-{name}", hard, *flags)
            add(f"embedder, round 2, {name}", measure(settings, model, place / f"vectors-{name}"))
        settings.max_steps = steps
    summarise(settings, results, output)


if __name__ == "__main__":
    main()
