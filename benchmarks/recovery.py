"""Does training work, and as well as the peer's? A model with reinitialized layers is retrained by ours and theirs.

    python benchmarks/recovery.py --model_name_or_path all-MiniLM-L6-v2 --train_file squad/train.jsonl \
        --query_file squad/test_queries.jsonl --doc_file squad/test_docs.jsonl --output_dir recovery

For each seed, the last layers of a BERT model are reinitialized; then recipes/train_bert.py (on two ranks) and
sentence-transformers train it with the same records, batch size, lengths, temperature, rate, schedule and number of
steps, both in bfloat16. Our recipes encode with all models and measure them. Prints a table and writes results.json.
Needs `pip install -e .[benchmark]`.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import REPOSITORY, launcher

from ds_embed.data.files import read_records
from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import Settings, setting

MEASURES = ("nDCG@10", "RR@10", "R@1", "R@10")


@dataclass
class RecoveryArguments(Settings):
    model_name_or_path: str = setting("BERT-family model, folder or hub name")
    train_file: str = setting("training records (JSONL or JSON)", files=True)
    query_file: str = setting("test queries with doc_id", files=True)
    doc_file: str = setting("test documents", files=True)
    output_dir: str = setting("folder for models, vectors and results.json")
    num_layers: int = setting("last layers that are drawn anew", default=4)
    seeds: list[int] = setting("seeds of the new layers and of the order of data", default_factory=lambda: [0, 1, 2])
    max_steps: int = setting("optimizer steps", default=100)
    global_batch_size: int = setting("queries per step", default=64)
    query_max_length: int = setting("longest query in tokens", default=32)
    doc_max_length: int = setting("longest document in tokens", default=96)
    learning_rate: float = setting("peak learning rate; linear decay", default=1e-4)
    warmup_steps: int = setting("steps of linear rise", default=10)
    temperature: float = setting("similarities are divided by this", default=0.05)
    num_ranks: int = setting("ranks of our run", default=2)


def draw_anew(model_name_or_path: str, num_layers: int, seed: int, folder: str | Path) -> Path:
    """Save the model with the weights of its last num_layers layers drawn as in its original initialization."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(model_name_or_path)
    torch.manual_seed(seed)
    for layer in model.encoder.layer[-num_layers:]:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.normal_(std=model.config.initializer_range)
                module.bias.data.zero_()
            elif isinstance(module, torch.nn.LayerNorm):
                module.reset_parameters()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_name_or_path).save_pretrained(folder)
    return Path(folder)


def run(*command: object, threads: int) -> str:
    """Run a command to completion; return its output."""
    words = [str(word) for word in command]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(words, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stdout.decode()}")
    return done.stdout.decode()


def launched(settings: Any, recipe: str, *flags: object) -> str:
    """Run a recipe on settings.num_ranks ranks; return its output."""
    ranks = settings.num_ranks
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    return run(*launcher(ranks), REPOSITORY / "recipes" / recipe, *flags, threads=threads)


def train_ours(settings: RecoveryArguments, base: Path, seed: int, folder: Path) -> Path:
    launched(
        settings,
        "train_bert.py",
        "--deepspeed",
        "ds_configs/zero2.json",
        "--model_name_or_path",
        base,
        "--train_files",
        settings.train_file,
        "--output_dir",
        folder,
        "--seed",
        seed,
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
        "--adam_beta2",
        0.999,
        "--report_to",
        "none",
    )
    return folder / "model"


def train_theirs(settings: RecoveryArguments, base: Path, seed: int, folder: Path) -> Path:
    """Train with sentence-transformers as in its documentation, without duplicate documents in a batch."""
    words = [sys.executable, __file__, "--peer", base, seed, folder, json.dumps(settings.__dict__)]
    run(*words, threads=len(os.sched_getaffinity(0)))
    return folder / "model"


def peer(base: str, seed: str, folder: str, settings_text: str) -> None:
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from sentence_transformers.training_args import BatchSamplers

    settings = RecoveryArguments(**json.loads(settings_text))
    backbone = Transformer(base, max_seq_length=settings.doc_max_length)
    model = SentenceTransformer(
        modules=[backbone, Pooling(backbone.get_word_embedding_dimension(), "mean"), Normalize()], device="cpu"
    )
    tokenizer = model.tokenizer
    records = []
    for _, record in read_records(settings.train_file):
        # It has a single length limit for all texts; the queries of this data are far below theirs.
        assert len(tokenizer(record["query"])["input_ids"]) <= settings.doc_max_length
        records.append({"anchor": record["query"], "positive": record["pos_doc"]})
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.global_batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_steps,
        weight_decay=0.01,
        seed=int(seed),
        data_seed=int(seed),
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        disable_tqdm=True,
        max_grad_norm=1.0,
    )
    loss = MultipleNegativesRankingLoss(model, scale=1 / settings.temperature)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(records), loss=loss).train()
    target = Path(folder) / "model"
    model[0].auto_model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def measure(settings: RecoveryArguments, model: Path | str, folder: Path) -> dict[str, float]:
    launched(
        settings,
        "generate.py",
        "--model_name_or_path",
        model,
        "--query_files",
        settings.query_file,
        "--doc_files",
        settings.doc_file,
        "--output_prefix",
        folder,
        "--pooling",
        "mean",
        "--query_prefix",
        "",
        "--doc_prefix",
        "",
        "--query_max_length",
        settings.query_max_length,
        "--doc_max_length",
        settings.doc_max_length,
    )
    (vectors,) = folder.glob("consumed_samples*")
    run(sys.executable, "recipes/evaluate.py", "--embeddings", vectors, "--query_files", settings.query_file, threads=2)
    return read_metrics(vectors)


def read_metrics(folder: Path) -> dict[str, float]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {name: metrics[name] for name in MEASURES}


def summarise(settings: RecoveryArguments, results: dict[str, list[dict[str, float]]], output: Path) -> None:
    """Print means over seeds, and write everything to results.json."""
    for name, runs in results.items():
        means = [statistics.mean(r[m] for r in runs) for m in MEASURES]
        spread = statistics.stdev(r["nDCG@10"] for r in runs) if len(runs) > 1 else 0.0
        print(f"{name:<22} mean " + " ".join(f"{m:8.4f}" for m in means) + f"   nDCG@10 +- {spread:.4f}", flush=True)
    (output / "results.json").write_text(
        json.dumps({"settings": settings.__dict__, "results": results}, indent=2) + "\n"
    )


def main() -> None:
    (settings,) = parse_arguments(RecoveryArguments)
    output = Path(settings.output_dir).resolve()
    output.mkdir(parents=True)
    results: dict[str, list[dict[str, float]]] = {
        "intact": [],
        "damaged": [],
        "ds_embed": [],
        "sentence-transformers": [],
    }
    results["intact"].append(measure(settings, settings.model_name_or_path, output / "vectors-intact"))
    print(f"{'model':<22} {'seed':>4} " + " ".join(f"{name:>8}" for name in MEASURES), flush=True)
    for seed in settings.seeds:
        base = draw_anew(settings.model_name_or_path, settings.num_layers, seed, output / f"damaged-{seed}")
        trainings = {"damaged": lambda *_: base, "ds_embed": train_ours, "sentence-transformers": train_theirs}
        for name, train in trainings.items():
            started = time.perf_counter()
            model = train(settings, base, seed, output / f"{name}-{seed}")
            seconds = time.perf_counter() - started
            metrics = measure(settings, model, output / f"vectors-{name}-{seed}")
            results[name].append(metrics | {"train_seconds": seconds})
            print(f"{name:<22} {seed:>4} " + " ".join(f"{metrics[m]:8.4f}" for m in MEASURES), flush=True)
    summarise(settings, results, output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        peer(*sys.argv[2:])
    else:
        main()
