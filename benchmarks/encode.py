"""Is encoding faster than sentence-transformers' `encode` in the same precision? Writes a table and JSON.

    python benchmarks/encode.py --model_name_or_path all-MiniLM-L6-v2 --train_file squad/train.jsonl --output_dir encoding

The texts are shuffled queries and documents of training records (mixed lengths), and the same number of texts with
--same_length words each. Contestants take turns. Ours is recipes/generate.py on one and two ranks; the time of a second
run that encodes a single text is subtracted, which leaves tokenizing, encoding and writing. Embedder and
sentence-transformers are timed within their process after warming up, from texts to vectors. Padding does not count as
tokens. Needs `pip install -e .[benchmark]`.
"""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contest import Goal, goals, in_process, launched, play, print_goals, print_table, spread, write_results
from peers import read_texts

from ds_embed.data.files import read_records
from ds_embed.settings import parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, optional, setting

PEER, EMBEDDER = "sentence-transformers", "ds_embed.Embedder"
OPENVINO = "sentence-transformers, OpenVINO int8"
GENERATE = "generate, {} rank(s)"
MATRICES = "matrix products"
PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}
KINDS = ("mixed", "same")


@dataclass
class EncodingArguments(Settings):
    model_name_or_path: str = setting("model folder or hub name")
    train_file: str = setting("training records, whose texts are encoded (JSONL or JSON)", files=True)
    output_dir: str = setting("folder for texts, vectors and encode.json")
    rounds: int = setting("times that every contestant runs", default=3, above=0)
    num_texts: int = setting("texts that are encoded", default=4000, above=0)
    same_length: int = setting("words of the texts of one length; 0 leaves that case out", default=40, at_least=0)
    precisions: list[str] = setting("bf16, fp32 or both", default_factory=lambda: ["bf16", "fp32"])
    ranks: list[int] = setting("numbers of ranks of generate; 0 leaves it out", default_factory=lambda: [1, 2])
    max_length: int = setting("longest text in tokens", default=256)
    micro_batch_tokens: int = setting("of ours, padded tokens per forward pass", default=16384)
    pooling: str = setting("mean or last", default="mean")
    openvino_python: str | None = optional(
        "Python of an environment with sentence-transformers[openvino], see openvino_peer.py (default: no such contestant)"
    )

    def __post_init__(self):
        super().__post_init__()
        for name in self.precisions:
            if name not in PRECISIONS:
                raise UserError(f"--precisions {name}: choose from {', '.join(PRECISIONS)}")


def encode_with_embedder(
    *, model: str, text_file: str, pooling: str, max_length: int, bf16: bool, micro_batch_tokens: int
) -> dict:
    """Encode with our class; runs in a separate process."""
    from ds_embed import Embedder
    from ds_embed.data.tokenize import encode_texts

    embedder = Embedder.from_pretrained(
        model,
        device="cpu",
        dtype="bfloat16" if bf16 else "float32",
        pooling=pooling,
        max_length=max_length,
        query_prefix="",
        doc_prefix="",
        micro_batch_tokens=micro_batch_tokens,
    )
    texts = read_texts(text_file)
    embedder.encode_documents(texts[:64])
    started = time.perf_counter()
    embedder.encode_documents(texts)
    seconds = time.perf_counter() - started
    num_tokens = sum(map(len, encode_texts(embedder.tokenizer, texts, embedder.card.text_formats()[1])))
    return {"tokens_per_second": num_tokens / seconds, "seconds": seconds, "num_tokens": num_tokens}


def generate(settings: EncodingArguments, folder: Path, text_file: Path, ranks: int, bf16: bool) -> dict:
    """recipes/generate.py for all texts, minus the same for one text."""

    def run(file: Path) -> tuple[float, float, int]:
        for name in ("vectors", "cache"):
            shutil.rmtree(folder / name, ignore_errors=True)
        finished = launched(
            ranks,
            "recipes/generate.py",
            "--model_name_or_path",
            settings.model_name_or_path,
            "--doc_files",
            file,
            "--output_prefix",
            folder / "vectors",
            "--cache_dir",
            folder / "cache",
            "--query_prefix",
            "",
            "--doc_prefix",
            "",
            "--max_length",
            settings.max_length,
            "--bf16",
            str(bf16).lower(),
            "--micro_batch_tokens",
            settings.micro_batch_tokens,
            "--pooling",
            settings.pooling,
        )
        (manifest,) = (folder / "cache").glob("*/manifest.json")
        return finished.seconds, finished.peak_gib, json.loads(manifest.read_text())["num_tokens"]

    start_seconds, _, _ = run(folder / "one.jsonl")
    seconds, peak, num_tokens = run(text_file)
    # With few texts the difference would be noise; then the start is included, and the row says so.
    is_noise = seconds - start_seconds < 0.2 * start_seconds
    net = seconds if is_noise else seconds - start_seconds
    return {
        "tokens_per_second": num_tokens / net,
        "seconds": net,
        "num_tokens": num_tokens,
        "start_seconds": start_seconds,
        "peak_gib": peak,
        "includes_start": is_noise,
    }


def write_texts(settings: EncodingArguments, folder: Path) -> dict[str, Path]:
    """Write files with texts of mixed length, with texts of equal length, and with one text."""
    texts = {text for _, record in read_records(settings.train_file) for text in (record["query"], record["pos_doc"])}
    shuffled = sorted(texts)
    rng = random.Random(0)
    rng.shuffle(shuffled)
    words = " ".join(shuffled).split()
    cases = {"mixed": (shuffled * -(-settings.num_texts // len(shuffled)))[: settings.num_texts]}
    if settings.same_length:
        rows = (rng.choices(words, k=settings.same_length) for _ in range(settings.num_texts))
        cases["same"] = [" ".join(row) for row in rows]
    cases["one"] = cases["mixed"][:1]
    for name, case in cases.items():
        lines = (json.dumps({"pos_doc": text, "doc_id": f"d{i}"}) + "\n" for i, text in enumerate(case))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in cases if name != "one"}


def contestants(settings: EncodingArguments, folder: Path, text_file: Path, bf16: bool) -> dict[str, Callable]:
    same = {
        "model": settings.model_name_or_path,
        "text_file": text_file,
        "pooling": settings.pooling,
        "max_length": settings.max_length,
        "bf16": bf16,
    }
    ours = same | {"micro_batch_tokens": settings.micro_batch_tokens}
    playing: dict[str, Callable[[int], dict]] = {
        MATRICES: lambda _: in_process("machine:matrix_rates"),
        PEER: lambda _: in_process("peers:encode_sentence_transformers", **same),
        EMBEDDER: lambda _: in_process("encode:encode_with_embedder", **ours),
    }
    if settings.openvino_python is not None and bf16:  # it has one precision of its own
        of_texts = {name: same[name] for name in ("model", "text_file", "max_length")}
        python = str(Path(settings.openvino_python).absolute())
        playing[OPENVINO] = lambda _: in_process("openvino_peer:encode", python, **of_texts)
    for ranks in filter(None, settings.ranks):
        playing[GENERATE.format(ranks)] = lambda _, ranks=ranks: generate(settings, folder, text_file, ranks, bf16)
    return playing


def main() -> None:
    (settings,) = parse_arguments(EncodingArguments)
    folder = Path(settings.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    weights = in_process("machine:count_weights", model=settings.model_name_or_path)["multiplied"]
    reached: list[Goal] = []
    rows, every = [], {}
    for kind, text_file in write_texts(settings, folder).items():
        for precision in settings.precisions:
            case = f"{kind}, {precision}"
            results = play(contestants(settings, folder, text_file, precision == "bf16"), settings.rounds)
            every[case] = results
            chip = spread(results, MATRICES, PRECISIONS[precision]).median
            names = [name for name in results if name != MATRICES]
            if OPENVINO in results:
                print(f"{case}: cosine of OpenVINO's int8 with float32: {spread(results, OPENVINO, 'cosine')}")
            for name in names:
                rate = spread(results, name, "tokens_per_second")
                share = f"{200 * weights * rate.median / chip:.3g} %"
                shown = f"{name}, start included" if any(m.get("includes_start") for m in results[name]) else name
                rows.append([case, shown, rate, share, spread(results, name, "peak_gib")])
            # The goal: faster for texts of mixed length, and never slower.
            bound = 1.5 if kind == "mixed" else 1.0
            reached += goals(
                results,
                [
                    (f"{case}: {name} / {PEER}", name, PEER, bound, True)
                    for name in names
                    if name not in (PEER, OPENVINO)
                ],
            )
    print(
        "\nof the chip: 2 N operations per token (N: weights without embedding tables) of the rate of matrix products"
    )
    print_table(["texts", "contestant", "tokens/s: median (range)", "of the chip", "peak memory, GiB"], rows)
    print_goals(reached)
    write_results(folder / "encode.json", settings, every, reached)


if __name__ == "__main__":
    main()
