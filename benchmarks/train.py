"""Is training faster than with the alternatives? Ours and theirs take turns; writes a table and JSON.

    python benchmarks/train.py --model_name_or_path all-MiniLM-L6-v2 --train_file squad/train.jsonl --output_dir speed
    python benchmarks/train.py --model_name_or_path SmolLM2-135M-Instruct --train_file squad/train.jsonl \
        --output_dir speed-lora --lora_rank 16 --pooling last --global_batch_size 32 --max_length 64

Ours is recipes/train_bert.py or, with --pooling last, train_gpt.py, started by the deepspeed launcher. Theirs is
sentence-transformers' trainer with its defaults and with settings that make it faster (batches of documents of similar
length, which its `train_sampling_strategy` does not provide, and its cached loss by tokens), FlagEmbedding's if it is
installed, and a bare loop with our micro-batches and kernels and nothing else. All have the same model, data, batch
size, length and number of steps; the first steps are not timed. Padding never counts as tokens. "of the chip" is 6 N
(training all weights) or 4 N (LoRA) operations per token, where N is the number of weights without embedding tables,
not counting attention scores and the second forward pass of grad_cache, as a share of the rate of matrix products in
the contestant's precision (autocast: bf16), measured in the same rounds. Peak memory is that of the largest process.
Needs `pip install -e .[benchmark]`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contest import (
    Goal,
    Spread,
    flags,
    goals,
    in_process,
    launched,
    notebook_of,
    play,
    print_goals,
    print_table,
    spread,
    write_results,
)

from ds_embed.settings import parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting

OURS, OURS_CACHED, TWO, TWO_CACHED = (
    "ds_embed",
    "ds_embed, grad_cache",
    "ds_embed, 2 ranks",
    "ds_embed, 2 ranks, grad_cache",
)
OURS_FP32 = "ds_embed, fp32"
BARE, BARE_CACHED, PLAIN = "bare loop", "bare loop, grad_cache", "bare loop, Hugging Face's kernels"
PEER_FP32, PEER_BF16 = "sentence-transformers, fp32", "sentence-transformers, bf16"
PEER_CACHED = "sentence-transformers, bf16, cached"
# With non-default settings that make it faster: batches of documents of similar length, and its cached loss by tokens.
PEER_GROUPED = "sentence-transformers, bf16, grouped"
PEER_BUDGET = "sentence-transformers, bf16, grouped, cached by tokens"
PEERS_BF16 = (PEER_BF16, PEER_CACHED, PEER_GROUPED, PEER_BUDGET)
FLAG = "FlagEmbedding, bf16"
MATRICES = "matrix products"
# (figure, contestants, other, bound): least ratio of a contestant's tokens per second to the other's.
GOALS = [
    ("{mine} / " + PEER_FP32, (OURS, TWO), PEER_FP32, 3.0),
    ("{mine} / " + PEER_BF16, (OURS, TWO), PEER_BF16, 5.0),
    ("{mine} / " + PEER_CACHED, (OURS_CACHED, TWO_CACHED), PEER_CACHED, 3.0),
    ("{mine} / " + FLAG, (OURS, TWO), FLAG, 1.0),
    ("{mine} / " + BARE, (OURS,), BARE, 0.9),
    ("{mine} / " + BARE_CACHED, (OURS_CACHED,), BARE_CACHED, 0.9),
]
GRAD_CACHE_COST = {"full": 1.35, "lora": 1.5}
LARGEST_PADDING = 0.10
FASTEST = "{mine} / sentence-transformers' fastest, bf16"
FASTEST_BOUND = 3.0


@dataclass
class SpeedArguments(Settings):
    model_name_or_path: str = setting("model folder or hub name")
    train_file: str = setting("training records (JSONL or JSON)", files=True)
    output_dir: str = setting("folder for runs and train.json")
    rounds: int = setting("times that every contestant runs", default=3, above=0)
    go_on: bool = setting("keep what an earlier call with these settings measured", default=False)
    max_steps: int = setting("optimizer steps of a contestant", default=8, above=0)
    skip_steps: int = setting("first steps of these that are not timed", default=3, at_least=0)
    contestants: list[str] = setting("names of those that take part (default: all)", default_factory=list)
    global_batch_size: int = setting("queries per step", default=64)
    max_length: int = setting("longest text in tokens", default=256)
    micro_batch_tokens: int = setting(
        "of ours and of the bare loop, padded tokens per forward pass; of sentence-transformers' cached by tokens",
        default=4096,
    )
    mini_batch_size: int = setting("of sentence-transformers' cached loss, texts per forward pass", default=32)
    lora_rank: int = setting("rank of the LoRA matrices; 0 trains all weights", default=0, at_least=0)
    pooling: str = setting("mean (recipes/train_bert.py) or last (train_gpt.py)", default="mean")
    learning_rate: float = setting("constant learning rate", default=2e-5)
    temperature: float = setting("similarities are divided by this", default=0.05)
    deepspeed: str = setting("DeepSpeed JSON of our runs", default="ds_configs/zero1.json")
    num_layers: int = setting("first layers of the model that are kept; 0 keeps all", default=0, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.skip_steps >= self.max_steps:
            raise UserError(f"--skip_steps {self.skip_steps}: leaves none of --max_steps {self.max_steps} to be timed")
        recipe_of(self.pooling)


class Speed:
    """The contestants of one benchmark."""

    def __init__(self, settings: SpeedArguments):
        self.settings, self.folder = settings, Path(settings.output_dir).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = first_layers(settings.model_name_or_path, settings.num_layers, self.folder)

    def contestants(self) -> dict[str, Callable[[int], dict]]:
        settings = self.settings
        every = {
            MATRICES: lambda _: in_process("machine:matrix_rates"),
            OURS: lambda _: self.ours(1),
            TWO: lambda _: self.ours(2),
            OURS_CACHED: lambda _: self.ours(1, grad_cache=True),
            TWO_CACHED: lambda _: self.ours(2, grad_cache=True),
            OURS_FP32: lambda _: self.ours(1, bf16=False),
            BARE: lambda _: self.bare(),
            BARE_CACHED: lambda _: self.bare(grad_cache=True),
            PLAIN: lambda _: self.bare(our_kernels=False),
            PEER_FP32: lambda _: self.peer(bf16=False, cached=False),
            PEER_BF16: lambda _: self.peer(bf16=True, cached=False),
            PEER_CACHED: lambda _: self.peer(bf16=True, cached=True),
            PEER_GROUPED: lambda number: self.peer(bf16=True, cached=False, grouped=True, seed=number),
            PEER_BUDGET: lambda number: self.peer(
                bf16=True, cached=True, grouped=True, seed=number, mini_batch_num_tokens=settings.micro_batch_tokens
            ),
            FLAG: lambda _: self.flag_embedding(),
        }
        wanted = self.settings.contestants
        if not wanted and (self.settings.pooling != "mean" or find_spec("FlagEmbedding") is None):
            del every[FLAG]  # not included in the extra: see flag_embedding.py
        for name in wanted:
            if name not in every:
                raise UserError(f"--contestants '{name}': choose from {', '.join(map(repr, every))}")
        return {name: run for name, run in every.items() if not wanted or name in (MATRICES, *wanted)}

    def ours(self, ranks: int, grad_cache: bool = False, bf16: bool = True) -> dict:
        settings, run = self.settings, self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        finished = launched(
            ranks,
            recipe_of(settings.pooling),
            *flags(
                deepspeed=settings.deepspeed,
                model_name_or_path=self.model,
                train_files=settings.train_file,
                output_dir=run,
                cache_dir=self.folder / "cache",
                query_prefix="",
                doc_prefix="",
                max_length=settings.max_length,
                global_batch_size=settings.global_batch_size,
                micro_batch_tokens=settings.micro_batch_tokens,
                lora_rank=settings.lora_rank,
                **({"lora_alpha": 2 * settings.lora_rank} if settings.lora_rank else {}),
                grad_cache=str(grad_cache).lower(),
                bf16=str(bf16).lower(),
                learning_rate=settings.learning_rate,
                lr_scheduler="constant",
                temperature=settings.temperature,
                max_steps=settings.max_steps,
                report_to="none",
            ),
        )
        return steady(run / "metrics.jsonl", settings.skip_steps) | {"peak_gib": finished.peak_gib}

    def _of_all(self) -> dict:
        names = ("max_steps", "skip_steps", "learning_rate", "temperature", "pooling", "lora_rank")
        same = {name: getattr(self.settings, name) for name in names}
        return same | {"model": self.model, "batch_size": self.settings.global_batch_size}

    def peer(self, *, bf16: bool, cached: bool, **others: Any) -> dict:
        settings = self.settings
        return in_process(
            "peers:train_sentence_transformers",
            **self._of_all(),
            train_file=str(Path(settings.train_file).resolve()),
            folder=self.folder / "peer",
            max_length=settings.max_length,
            bf16=bf16,
            cached=cached,
            mini_batch_size=settings.mini_batch_size,
            **others,
        )

    def flag_embedding(self) -> dict:
        settings = self.settings
        return in_process(
            "flag_embedding:train",
            **self._of_all(),
            train_file=str(Path(settings.train_file).resolve()),
            folder=self.folder / "peer",
            max_length=settings.max_length,
            bf16=True,
        )

    def bare(self, grad_cache: bool = False, our_kernels: bool = True) -> dict:
        stores = sorted((self.folder / "cache").glob("training-*/manifest.json"), key=lambda path: path.stat().st_mtime)
        if not stores:  # our run builds it
            self.ours(1)
            return self.bare(grad_cache, our_kernels)
        return in_process(
            "peers:train_bare_loop",
            **self._of_all(),
            store=stores[-1].parent,
            grad_cache=grad_cache,
            seed=42,
            our_kernels=our_kernels,
            micro_batch_tokens=self.settings.micro_batch_tokens,
        )


def first_layers(model: str, num_layers: int, folder: Path) -> str:
    """The model, or a copy in `folder` with only its first layers."""
    if not num_layers:
        return model
    copy = str(folder / f"model-{num_layers}-layers")
    in_process("machine:keep_layers", model=model, num_layers=num_layers, folder=copy)
    return copy


def recipe_of(pooling: str) -> str:
    """The recipe for a model with this pooling: here decoders pool the last token, and encoders the mean."""
    if pooling not in ("mean", "last"):
        raise UserError(f"--pooling {pooling}: choose mean (a BERT-family model) or last (a decoder)")
    return f"recipes/train_{'gpt' if pooling == 'last' else 'bert'}.py"


def steady(metrics: Path, skip_steps: int) -> dict:
    """Tokens per second of a run after its first steps, and the share of padding in its computation."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()][skip_steps:]
    num_tokens, encoded = (sum(line[key] for line in lines) for key in ("tokens", "tokens_encoded"))
    computed = sum(line["tokens_encoded"] / (1 - line["padding_share"]) for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    return {
        "tokens_per_second": num_tokens / seconds,
        "tokens_encoded_per_second": encoded / seconds,
        "seconds": seconds,
        "num_tokens": num_tokens,
        "padding_share": 1 - encoded / computed,
    }


def share_of_chip(results: dict[str, list[dict]], name: str, operations: int) -> Spread:
    """Operations per second in percent of the rate of matrix products in the same round."""
    dtype = "float32" if "fp32" in name else "bfloat16"
    rounds = zip(results[name], results[MATRICES])
    key = "tokens_encoded_per_second" if name.startswith(OURS) else "tokens_per_second"
    return Spread.of([100 * mine[key] * operations / chip[dtype] for mine, chip in rounds])


def reached_goals(results: dict[str, list[dict]], lora_rank: int) -> list[Goal]:
    wanted = [
        (what.format(mine=mine), mine, other, bound, True) for what, names, other, bound in GOALS for mine in names
    ]
    cost = GRAD_CACHE_COST["lora" if lora_rank else "full"]
    for plain, cached in ((OURS, OURS_CACHED), (TWO, TWO_CACHED)):
        wanted.append((f"cost of grad_cache: {plain} / {cached}", plain, cached, cost, False))
    reached = goals(results, wanted)
    for name in (OURS, TWO):
        peers = [results[peer] for peer in PEERS_BF16 if peer in results]
        if name in results and len(peers) > 1:
            fastest = [max(m["tokens_per_second"] for m in of_round) for of_round in zip(*peers)]
            measured = Spread.of([m["tokens_per_second"] / best for m, best in zip(results[name], fastest)])
            reached.append(Goal(FASTEST.format(mine=name), measured, FASTEST_BOUND))
        if name in results:
            reached.append(Goal(f"padding, {name}", spread(results, name, "padding_share"), LARGEST_PADDING, False))
    return reached


def main() -> None:
    (settings,) = parse_arguments(SpeedArguments)
    speed = Speed(settings)
    contestants = speed.contestants()
    weights = in_process("machine:count_weights", model=speed.model)
    operations = (4 if settings.lora_rank else 6) * weights["multiplied"]
    results = play(contestants, settings.rounds, notebook_of(settings, speed.folder))
    rows = [
        [
            name,
            spread(results, name, "tokens_per_second"),
            f"{share_of_chip(results, name, operations)} %",
            spread(results, name, "peak_gib"),
        ]
        for name in results
        if name != MATRICES
    ]
    chip = ", ".join(
        f"{spread(results, MATRICES, d).median / 1e9:,.0f} GFLOP/s in {d}" for d in ("bfloat16", "float32")
    )
    print(f"\nmatrix products: {chip}; {operations / 1e6:,.0f} million operations per token")
    print_table(["contestant", "tokens/s: median (range)", "of the chip", "peak memory, GiB"], rows)
    reached = reached_goals(results, settings.lora_rank)
    print_goals(reached)
    write_results(speed.folder / "train.json", settings, {"weights": weights, "rounds": results}, reached)


if __name__ == "__main__":
    main()
