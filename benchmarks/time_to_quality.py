"""How long does a model take to reach a quality, and how good is it after equal time? nDCG@10 on held-out documents.

    python benchmarks/time_to_quality.py --model_name_or_path all-MiniLM-L6-v2 --train_file squad/train.jsonl \
        --query_file squad/test_queries.jsonl --doc_file squad/test_docs.jsonl --output_dir quality --marks 0.5 0.6
    python benchmarks/time_to_quality.py ... --hard_negatives 1 --contestants ds_embed 'ds_embed, clustered' --more_steps 4

The last layers of a BERT model are reinitialized, with the round's number as seed, and retrained. Ours is
recipes/train_bert.py on one rank; theirs is sentence-transformers in bf16 with its defaults, and with settings that
make it faster (benchmarks/train.py). All have the same data, batch size, length, rate and precision. The same function
measures all models before training and after every --eval_steps; this time and startup are not counted. Quality is
interpolated linearly between measurements, for ours and theirs. Needs `pip install -e .[benchmark]`.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from contest import (
    Goal,
    Spread,
    flags,
    in_process,
    launched,
    notebook_of,
    play,
    print_goals,
    print_table,
    write_results,
)
from train import OURS, PEER_BF16, PEER_BUDGET, PEER_GROUPED

from ds_embed.settings import parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting

CLUSTERED = "ds_embed, clustered"
GOAL = 4.0
MEASURE = "nDCG@10"


@dataclass
class QualityArguments(Settings):
    model_name_or_path: str = setting("BERT-family model, folder or hub name")
    train_file: str = setting("training records (JSONL or JSON)", files=True)
    query_file: str = setting("held-out queries with doc_id (JSONL)", files=True)
    doc_file: str = setting("held-out documents", files=True)
    output_dir: str = setting("folder for models, runs and time_to_quality.json")
    rounds: int = setting("seeds, from 0", default=3, above=0)
    go_on: bool = setting("keep what an earlier call with these settings measured", default=False)
    contestants: list[str] = setting(
        "names of those that take part",
        default_factory=lambda: [OURS, PEER_BF16, PEER_GROUPED, PEER_BUDGET],
        choices=(OURS, CLUSTERED, PEER_BF16, PEER_GROUPED, PEER_BUDGET),
    )
    marks: list[float] = setting("nDCG@10 that are to be reached", default_factory=lambda: [0.5, 0.55, 0.6], above=0)
    num_layers: int = setting("last layers that are drawn anew", default=4, above=0)
    num_records: int = setting("first training records that are used; 0 takes all", default=0, at_least=0)
    num_queries: int = setting("held-out queries that are used, spread over the file", default=1000, above=0)
    max_steps: int = setting("optimizer steps", default=60, above=0)
    more_steps: int = setting("times as many steps of the clustered contestant", default=1, above=0)
    eval_steps: int = setting("steps between measurements", default=10, above=0)
    global_batch_size: int = setting("queries per step", default=64, above=0)
    hard_negatives: int = setting("per query", default=0, at_least=0)
    max_length: int = setting("longest text in tokens", default=96, above=0)
    micro_batch_tokens: int = setting("tokens per forward pass, of theirs by tokens too", default=4096, above=0)
    learning_rate: float = setting("constant after the warm-up", default=1e-4, above=0)
    warmup_steps: int = setting("steps of linear rise", default=10, at_least=0)
    temperature: float = setting("similarities are divided by this", default=0.05, above=0)


@dataclass(frozen=True)
class Curve:
    """Quality after given numbers of steps, seconds and encoded tokens; the first entry is before training."""

    steps: Sequence[int]
    seconds: Sequence[float]
    tokens: Sequence[float]
    quality: Sequence[float]

    def at(self, cost: str, value: float) -> float:
        """Quality after `value` "seconds" or "tokens", up to the last measurement."""
        import numpy as np

        return float(np.interp(value, getattr(self, cost), self.quality))

    def at_step(self, step: int) -> float:
        return self.quality[self.steps.index(step)]

    def until(self, mark: float) -> float:
        """Seconds until the quality first reaches `mark`; infinite if it never does."""
        points = list(zip(self.seconds, self.quality))
        for (start, low), (end, high) in pairwise(points):
            if high >= mark:
                return start + (mark - low) / (high - low) * (end - start)
        return float("inf")


class Quality:
    """The contestants, with a common output folder."""

    def __init__(self, settings: QualityArguments):
        self.settings, self.folder = settings, Path(settings.output_dir).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records = self._part(settings.train_file, "records.jsonl", settings.num_records, spread_out=False)
        self.queries = self._part(settings.query_file, "queries.jsonl", settings.num_queries, spread_out=True)

    def _part(self, source: str, name: str, number: int, spread_out: bool) -> Path:
        lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
        number = min(number or len(lines), len(lines))
        kept = [lines[i * len(lines) // number] for i in range(number)] if spread_out else lines[:number]
        (self.folder / name).write_text("".join(kept), encoding="utf-8")
        return self.folder / name

    def contestants(self) -> dict[str, Callable[[int], dict]]:
        settings = self.settings
        by_tokens = {"cached": True, "mini_batch_num_tokens": settings.micro_batch_tokens}
        every = {
            OURS: lambda seed: self.ours(seed, "mixed", settings.max_steps),
            CLUSTERED: lambda seed: self.ours(seed, "clustered", settings.max_steps * settings.more_steps),
            PEER_BF16: lambda seed: self.peer(seed, grouped=False, cached=False),
            PEER_GROUPED: lambda seed: self.peer(seed, grouped=True, cached=False),
            PEER_BUDGET: lambda seed: self.peer(seed, grouped=True, **by_tokens),
        }
        return {name: every[name] for name in settings.contestants}

    def base(self, seed: int) -> str:
        """The model from which all contestants of a round start."""
        folder = self.folder / f"base-{seed}"
        if not (folder / "config.json").exists():
            settings = {"model": self.settings.model_name_or_path, "num_layers": self.settings.num_layers}
            in_process("time_to_quality:draw_anew", **settings, seed=seed, folder=folder)
        return str(folder)

    def ours(self, seed: int, batching: str, max_steps: int) -> dict:
        settings, run = self.settings, self.folder / "run"
        base = self.base(seed)
        shutil.rmtree(run, ignore_errors=True)
        words = flags(
            deepspeed="ds_configs/zero1.json",
            model_name_or_path=base,
            train_files=self.records,
            output_dir=run,
            cache_dir=self.folder / "cache",
            seed=seed,
            query_prefix="",
            doc_prefix="",
            max_length=settings.max_length,
            global_batch_size=settings.global_batch_size,
            micro_batch_tokens=settings.micro_batch_tokens,
            hard_negatives=settings.hard_negatives,
            batching=batching,
            max_steps=max_steps,
            learning_rate=settings.learning_rate,
            lr_scheduler="constant",
            warmup_steps=settings.warmup_steps,
            adam_beta2=0.999,
            temperature=settings.temperature,
            val_query_files=self.queries,
            val_doc_files=Path(settings.doc_file).resolve(),
            val_metrics=MEASURE,
            val_check_interval=settings.eval_steps,
            val_before_training="true",
            save_top_k=0,
            report_to="none",
        )
        finished = launched(1, "recipes/train_bert.py", *words)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = {line["step"]: (line["seconds"], line["tokens_encoded"]) for line in lines if "loss" in line}
        measured = {line["step"]: line[MEASURE] for line in lines if MEASURE in line}
        return curve(steps, measured) | {"peak_gib": finished.peak_gib}

    def peer(self, seed: int, **others: Any) -> dict:
        settings = self.settings
        return in_process(
            "time_to_quality:train_peer",
            queries=self.queries,
            documents=Path(settings.doc_file).resolve(),
            train_file=self.records,
            model=self.base(seed),
            seed=seed,
            folder=self.folder / "peer",
            batch_size=settings.global_batch_size,
            eval_steps=settings.eval_steps,
            **{name: getattr(settings, name) for name in _SHARED},
            **others,
        )


_SHARED = ("max_length", "max_steps", "learning_rate", "warmup_steps", "temperature", "hard_negatives")


def curve(costs: dict[int, tuple[float, int]], measured: dict[int, float]) -> dict:
    """The lists of a Curve, from {step: its seconds and tokens} and {step: quality after it}."""
    sums = [[sum(cost[k] for step, cost in costs.items() if step <= end) for end in measured] for k in (0, 1)]
    return {"steps": list(measured), "seconds": sums[0], "tokens": sums[1], "quality": list(measured.values())}


def draw_anew(*, model: str, num_layers: int, seed: int, folder: str) -> dict:
    """recovery.draw_anew, to be run in a separate process."""
    import recovery

    recovery.draw_anew(model, num_layers, seed, folder)
    return {}


def train_peer(*, queries: str, documents: str, **training: Any) -> dict:
    """sentence-transformers' trainer, measured by the same code as ours."""
    import numpy as np
    from peers import train_sentence_transformers

    from ds_embed.data.files import read_records
    from ds_embed.vectors.metrics import SearchRun, evaluate, read_qrels_from_queries
    from ds_embed.vectors.search import search

    asked, found = ([record for _, record in read_records(path)] for path in (queries, documents))
    qrels, measured = read_qrels_from_queries([queries]), {}

    def measure(model: Any, step: int) -> None:
        vectors = (
            model.encode(texts, convert_to_numpy=True)
            for texts in ([record["query"] for record in asked], [record["pos_doc"] for record in found])
        )
        scores, indices = search(*(np.ascontiguousarray(v, dtype=np.float32) for v in vectors), 10)
        run = SearchRun([r["query_id"] for r in asked], [r["doc_id"] for r in found], scores, indices)
        measured[step] = evaluate(run, qrels, [MEASURE]).means[MEASURE]

    result = train_sentence_transformers(
        **training, skip_steps=0, pooling="mean", lora_rank=0, bf16=True, mini_batch_size=32, evaluate=measure
    )
    return curve(dict(enumerate(result["each_step"], start=1)), measured)


def main() -> None:
    (settings,) = parse_arguments(QualityArguments)
    quality = Quality(settings)
    results = play(quality.contestants(), settings.rounds, notebook_of(settings, quality.folder))
    curves = {
        name: [Curve(*(m[key] for key in ("steps", "seconds", "tokens", "quality"))) for m in measured]
        for name, measured in results.items()
    }
    before = max(curve.quality[0] for drawn in curves.values() for curve in drawn)
    if before >= min(settings.marks):
        raise UserError(
            f"--marks {min(settings.marks):g}: a model has {MEASURE} {before:.4f} before training; give higher ones"
        )
    ends = {
        cost: [min(getattr(curve, cost)[-1] for curve in of_round) for of_round in zip(*curves.values())]
        for cost in ("seconds", "tokens")
    }
    rows = []
    for name, drawn in curves.items():
        figures = (
            [curve.seconds[-1] / curve.steps[-1] for curve in drawn],
            [curve.quality[0] for curve in drawn],
            [curve.at_step(settings.max_steps) for curve in drawn],
            *([curve.at(cost, end) for curve, end in zip(drawn, ends[cost])] for cost in ends),
            *([curve.until(mark) for curve in drawn] for mark in settings.marks),
        )
        rows.append([name, *(Spread.of(values) for values in figures)])
    header = ["contestant", "seconds a step", f"{MEASURE} before", f"after {settings.max_steps} steps"]
    print_table(
        [
            *header,
            *(f"after {Spread.of(values)} {cost}" for cost, values in ends.items()),
            *(f"seconds to {mark:g}" for mark in settings.marks),
        ],
        rows,
    )
    for name, drawn in curves.items():
        for seed, line in enumerate(drawn):
            points = (
                f"{step}: {value:.4f} ({s:.0f} s)" for step, s, value in zip(line.steps, line.seconds, line.quality)
            )
            print(f"{name}, seed {seed}: {', '.join(points)}")
    reached = []
    for name in [] if OURS not in curves else [name for name in curves if name not in (OURS, CLUSTERED)]:
        for mark in settings.marks:
            times = [(theirs.until(mark), ours.until(mark)) for theirs, ours in zip(curves[name], curves[OURS])]
            if all(max(pair) < float("inf") for pair in times):
                ratios = Spread.of([theirs / ours for theirs, ours in times])
                reached.append(Goal(f"seconds to {mark:g}: {name} / {OURS}", ratios, GOAL))
    print_goals(reached)
    write_results(quality.folder / "time_to_quality.json", settings, results, reached)


if __name__ == "__main__":
    main()
