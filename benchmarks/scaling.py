"""Time, memory and bytes sent by batch size, text length, ranks and corpus size; and formulas compared with counts.

    python benchmarks/scaling.py --model_name_or_path all-MiniLM-L6-v2 --train_file squad/train.jsonl --output_dir scaling

The model has few layers, so that the sizes dominate. Every row is a run of recipes/train_bert.py or train_gpt.py,
started by the deepspeed launcher; tokens per second and memory (of the largest rank) are from its metrics.jsonl. "wire"
counts the collectives of a step (wire.py) and compares their bytes with the formulas in docs/scaling.md. "generate"
runs recipes/generate.py on corpora of short texts, including startup and tokenization; "search" runs search.py.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contest import REPOSITORY, in_process, launched, play, print_table, spread, write_results
from train import recipe_of, steady

from ds_embed.data.files import read_records
from ds_embed.settings import parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting

PARTS = ("batch", "length", "ranks", "wire", "generate", "search")
_WORDS = 6  # in each text to encode
_FLOAT, _BF16 = 4, 2


@dataclass
class ScalingArguments(Settings):
    model_name_or_path: str = setting("model folder or hub name")
    train_file: str = setting("training records (JSONL or JSON)", files=True)
    output_dir: str = setting("folder for runs and scaling.json")
    pooling: str = setting("mean (recipes/train_bert.py) or last (train_gpt.py)", default="mean")
    parts: list[str] = setting(f"what is measured: {', '.join(PARTS)}", default_factory=lambda: list(PARTS))
    rounds: int = setting("times that every run is made", default=3, above=0)
    max_steps: int = setting("optimizer steps of a run", default=4, above=0)
    skip_steps: int = setting("first steps of these that are not timed", default=1, at_least=0)
    num_layers: int = setting("first layers of the model that are kept; 0 keeps all", default=2, at_least=0)
    batch_sizes: list[int] = setting(
        "queries per step, with grad_cache", default_factory=lambda: [64, 256, 1024, 4096, 8192]
    )
    lengths: list[int] = setting("longest texts in tokens", default_factory=lambda: [32, 64, 128, 256, 512])
    ranks: list[int] = setting("numbers of ranks", default_factory=lambda: [1, 2, 4])
    wire_ranks: list[int] = setting("numbers of ranks whose messages are counted", default_factory=lambda: [2, 4])
    stages: list[int] = setting("ZeRO stages whose messages are counted", default_factory=lambda: [0, 1, 2, 3])
    modes: list[str] = setting(
        "of these runs: cached (grad_cache), kept (graphs kept)", default_factory=lambda: ["cached", "kept"]
    )
    max_length: int = setting("longest text in tokens, where that isn't what is varied", default=32, above=0)
    micro_batch_tokens: int = setting("padded tokens per forward pass", default=4096, above=0)
    corpus_sizes: list[int] = setting(
        "numbers of documents that are encoded, and searched",
        default_factory=lambda: [1_000, 10_000, 100_000, 1_000_000],
    )
    search_queries: int = setting("queries that search in them", default=1_000, above=0)

    def __post_init__(self):
        super().__post_init__()
        recipe_of(self.pooling)
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"--parts {part}: choose from {', '.join(PARTS)}")
        for mode in self.modes:
            if mode not in ("cached", "kept"):
                raise UserError(f"--modes {mode}: choose cached or kept")
        if self.skip_steps >= self.max_steps:
            raise UserError(f"--skip_steps {self.skip_steps}: leaves none of --max_steps {self.max_steps} to be timed")


class Scaling:
    """The runs of one benchmark."""

    def __init__(self, settings: ScalingArguments):
        self.settings, self.folder = settings, Path(settings.output_dir).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = settings.model_name_or_path
        if settings.num_layers:
            self.model = str(self.folder / "model")
            in_process(
                "machine:keep_layers",
                model=settings.model_name_or_path,
                num_layers=settings.num_layers,
                folder=self.model,
            )

    def train(
        self,
        *,
        ranks: int = 1,
        batch: int = 64,
        length: int | None = None,
        file: Path | str | None = None,
        stage: int = 1,
        grad_cache: bool = True,
        counts: Path | None = None,
        budget: int | None = None,
    ) -> dict:
        """Run a training; with `counts`, write counts of its collectives to that file."""
        settings, run = self.settings, self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        recipe = recipe_of(settings.pooling)
        script = ["benchmarks/wire.py", counts, REPOSITORY / recipe]
        launched(
            ranks,
            *(script if counts else [recipe]),
            "--deepspeed",
            REPOSITORY / f"ds_configs/zero{stage}.json",
            "--model_name_or_path",
            self.model,
            "--train_files",
            file or settings.train_file,
            "--output_dir",
            run,
            "--cache_dir",
            self.folder / "cache",
            "--query_prefix",
            "",
            "--doc_prefix",
            "",
            "--max_length",
            length or settings.max_length,
            "--global_batch_size",
            batch,
            "--micro_batch_tokens",
            budget or settings.micro_batch_tokens,
            "--lora_rank",
            0,
            "--grad_cache",
            str(grad_cache).lower(),
            "--max_steps",
            settings.max_steps,
            "--report_to",
            "none",
        )
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        measured = steady(run / "metrics.jsonl", settings.skip_steps) | {"peak_gib": last["peak_memory_gib"]}
        return measured | {"step_seconds": measured["seconds"] / (settings.max_steps - settings.skip_steps)}

    def long_file(self) -> Path:
        """The training records with texts long enough for all lengths, made by repeating their own words."""
        path = self.folder / "long.jsonl"
        words_wanted = max(self.settings.lengths)
        with open(path, "w", encoding="utf-8") as file:
            for _, record in read_records(self.settings.train_file):
                words = record["pos_doc"].split()
                text = " ".join((words * -(-words_wanted // len(words)))[:words_wanted])
                file.write(json.dumps({"query": text, "pos_doc": f"{record['query']} {text}"}) + "\n")
        return path

    def table(self, what: str, cases: dict[str, Callable[[int], dict]], seconds: str = "step_seconds") -> dict:
        results = play(cases, self.settings.rounds)
        keys = ("tokens_per_second", seconds, "peak_gib")
        rows = [[name, *(spread(results, name, key) for key in keys)] for name in cases]
        shown = "seconds a step" if seconds == "step_seconds" else seconds
        print_table([what, "tokens/s: median (range)", shown, "peak memory of a rank, GiB"], rows)
        return results

    def wire(self, weights: int, dimensions: int) -> list[dict]:
        """Bytes of a step's messages, as counted and by the formula, for stages, ranks and grad_cache."""
        found = []
        budget = 8 * self.settings.max_length  # small, so that a rank has several micro-batches
        for stage in self.settings.stages:
            for ranks in self.settings.wire_ranks:
                for mode in self.settings.modes:
                    grad_cache = mode == "cached"
                    counts = self.folder / f"counts-{stage}-{ranks}-{mode}.jsonl"
                    counts.unlink(missing_ok=True)
                    self.train(ranks=ranks, stage=stage, grad_cache=grad_cache, counts=counts, budget=budget)
                    last = json.loads(counts.read_text().splitlines()[-1])
                    expected = expected_bytes(
                        stage, ranks, weights, dimensions, last["rows"], last["micro_batches"], grad_cache
                    )
                    counted = by_purpose(last["collectives"])
                    case = {"stage": stage, "ranks": ranks, "mode": mode}
                    found += [
                        case | {"what": what, "counted": counted.get(what, 0), "formula": expected.get(what)}
                        for what in sorted(expected.keys() | counted.keys())
                    ]
        print_table(
            ["ZeRO", "ranks", "graphs", "what", "bytes of a step", "formula", "difference"],
            [
                [
                    r["stage"],
                    r["ranks"],
                    r["mode"],
                    r["what"],
                    f"{r['counted']:,}",
                    *(
                        ["-", "-"]
                        if r["formula"] is None
                        else [f"{r['formula']:,}", f"{r['counted'] / r['formula'] - 1:+.2%}"]
                    ),
                ]
                for r in found
            ],
        )
        return found

    def generate(self, num_texts: int) -> dict:
        """Run recipes/generate.py on `num_texts` texts of a few random words; "peak_gib" is that of its process."""
        texts, cache, vectors = (self.folder / name for name in ("texts.jsonl", "encode_cache", "vectors"))
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(vectors, ignore_errors=True)
        words = " ".join(record["pos_doc"] for _, record in read_records(self.settings.train_file)).split()
        rng = random.Random(0)
        with open(texts, "w", encoding="utf-8") as file:
            for number in range(num_texts):
                text = " ".join(rng.choices(words, k=_WORDS))
                file.write(json.dumps({"pos_doc": text, "doc_id": f"d{number}"}) + "\n")
        finished = launched(
            1,
            "recipes/generate.py",
            "--model_name_or_path",
            self.model,
            "--doc_files",
            texts,
            "--output_prefix",
            vectors,
            "--cache_dir",
            cache,
            "--doc_prefix",
            "",
            "--max_length",
            self.settings.max_length,
            "--pooling",
            self.settings.pooling,
        )
        (manifest,) = cache.glob("*/manifest.json")
        num_tokens = json.loads(manifest.read_text())["num_tokens"]
        return {
            "tokens_per_second": num_tokens / finished.seconds,
            "seconds": finished.seconds,
            "peak_gib": finished.peak_gib,
        }


def by_purpose(collectives: dict[str, dict[str, int]]) -> dict[str, int]:
    """Bytes of the embeddings, which are float32, and of weights and gradients, by kind of collective."""
    names = {"all_gather float32": "gather of vectors", "reduce_scatter float32": "reduce-scatter of their gradient"}
    summed: dict[str, int] = {}
    for key, value in collectives.items():
        name = "control" if key == "control" else names.get(key, f"weights: {key.split()[0]}")
        summed[name] = summed.get(name, 0) + value["bytes"]
    summed.pop("control", None)  # a few numbers of 8 bytes
    return summed


def expected_bytes(
    stage: int, ranks: int, weights: int, dimensions: int, rows: list[int], micro_batches: int, grad_cache: bool
) -> dict[str, int]:
    """The formulas of docs/scaling.md, for the whole messages of one step in bfloat16."""
    table = ranks * max(rows) * dimensions * _FLOAT
    expected = {"gather of vectors": table, "reduce-scatter of their gradient": table}
    model = weights * _BF16
    passes = micro_batches if grad_cache else 1  # backward passes
    if stage == 0:
        expected["weights: all_reduce"] = passes * model
    elif stage in (1, 2):
        expected["weights: all_gather"] = model
        expected["weights: all_reduce"] = (1 if stage == 1 else passes) * model
    else:  # the number of gathers depends on which weights DeepSpeed keeps
        expected["weights: reduce_scatter"] = passes * model
    return expected


def search_table(settings: ScalingArguments) -> str:
    """Run search.py and return the table that it prints."""
    command = [
        sys.executable,
        REPOSITORY / "benchmarks/search.py",
        "--index",
        "none",
        "--num_documents",
        *settings.corpus_sizes,
        "--num_queries",
        settings.search_queries,
    ]
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, text=True, check=True)
    print(f"\n{done.stdout}")
    return done.stdout


def main() -> None:
    (settings,) = parse_arguments(ScalingArguments)
    scaling, results = Scaling(settings), {}
    if "batch" in settings.parts:
        cases = {f"{n:,}": lambda _, n=n: scaling.train(batch=n) for n in settings.batch_sizes}
        results["batch"] = scaling.table("queries a step, grad_cache", cases)
    if "length" in settings.parts:
        long = scaling.long_file()
        cases = {f"{n}": lambda _, n=n: scaling.train(length=n, file=long) for n in settings.lengths}
        results["length"] = scaling.table("tokens a text", cases)
    if "ranks" in settings.parts:
        cases = {f"{n}": lambda _, n=n: scaling.train(ranks=n, batch=256) for n in settings.ranks}
        results["ranks"] = scaling.table("ranks, 256 queries a step", cases)
    if "wire" in settings.parts:
        weights = in_process("machine:count_weights", model=scaling.model)
        results["wire"] = scaling.wire(weights["total"], weights["dimensions"])
    if "generate" in settings.parts:
        cases = {f"{n:,}": lambda _, n=n: scaling.generate(n) for n in settings.corpus_sizes}
        results["generate"] = scaling.table("texts encoded", cases, seconds="seconds")
    if "search" in settings.parts:
        results["search"] = search_table(settings)
    write_results(scaling.folder / "scaling.json", settings, results)


if __name__ == "__main__":
    main()
