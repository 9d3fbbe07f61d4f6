"""How fast is a 7B model trained and run on this machine's accelerators, compared with their rate of matrix products?

    python benchmarks/gpu.py --output_dir gpu --num_ranks 8
    python benchmarks/gpu.py --output_dir small --small true --num_ranks 2      # tries the script, CPUs will do

The model has the shape of Mistral 7B with random weights, and texts are random words; speed does not depend on either.
First the varlen kernel, which had not been run on a GPU when it was written, is compared with attention text by text in
float32: outputs and gradients, for heads of several shapes. Then the shipped recipes run through the launcher, with each
kernel of --kernels: LoRA 16 under ZeRO-2 and ZeRO-3 with grad_cache off and on, with gradient checkpointing, then
encoding. Prints results and writes results.json: tokens per second without padding, the peak memory
of the fullest rank and the prediction of --dry_run true (which on a GPU includes 1.5 GiB of context), and the model
FLOPs utilisation relative to the measured rate of large bfloat16 products: 4 N per token for training LoRA (forward 2,
gradients of activations 2), 2 N for encoding, where N is the number of weights in matrix products. Recomputation
(grad_cache, checkpointing) and attention do not count.
"""

import json
import random
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from recovery import launched

from ds_embed.models.varlen import by_operator, by_text, kernel_error
from ds_embed.settings import parse_arguments
from ds_embed.settings.fields import Settings, setting

MISTRAL_7B = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    sliding_window=4096,
)
SMALL = MISTRAL_7B | dict(
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=896,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
)


@dataclass
class GpuArguments(Settings):
    output_dir: str = setting("folder for the model, runs, vectors and results.json")
    small: bool = setting("a model of 4 million weights in place of 7 billion, to try the script", default=False)
    num_ranks: int = setting("ranks, one per GPU", default=1, above=0)
    stages: list[int] = setting("ZeRO stages to train under", default_factory=lambda: [2, 3])
    kernels: list[str] = setting(
        "values of --attn_implementation to compare", default_factory=lambda: ["varlen", "sdpa_by_shape"]
    )
    max_steps: int = setting("optimizer steps of a run; the first two are not counted", default=6, at_least=3)
    global_batch_size: int = setting("queries per step, each with a document and a hard negative", default=256, above=0)
    micro_batch_tokens: int = setting("tokens per forward pass of one rank, padding included", default=16384, above=0)
    query_tokens: int = setting(
        "mean tokens of a query; lengths are between half and one and a half", default=32, at_least=3
    )
    doc_tokens: int = setting("mean tokens of a document, likewise", default=128, at_least=3)
    encode_texts: int = setting(
        "documents to encode; so many and a tenth are timed and subtracted", default=20000, at_least=10
    )


def matrix_rate(device: str, size: int, seconds: float = 2.0) -> float:
    """FLOP/s of square bfloat16 matrix products on one device (on a CPU, with all threads)."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    left, right = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(3):
        left @ right
    wait()
    started, products = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(5):
            left @ right
        wait()
        products += 5
    return products * 2 * size**3 / (time.perf_counter() - started)


def make_model(settings: GpuArguments, device: str, folder: Path) -> int:
    """Save a model with random weights and a whole-word tokenizer; return N, its weights in matrix products."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModel, MistralConfig, PreTrainedTokenizerFast

    config = MistralConfig(**(SMALL if settings.small else MISTRAL_7B), architectures=["MistralForCausalLM"])
    with torch.device(device):
        model = AutoModel.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return model.num_parameters() - model.get_input_embeddings().weight.numel()


def write_texts(settings: GpuArguments, vocab_size: int, folder: Path) -> tuple[Path, dict[int, Path]]:
    """Write training records and files of documents; return their paths, those of documents by number of tokens."""
    drawn = random.Random(0)
    counted = 0

    def text(mean: int) -> str:
        nonlocal counted
        length = drawn.randint(mean // 2, mean + mean // 2)
        counted += length + 1  # including EOS
        return " ".join(f"w{drawn.randrange(2, vocab_size)}" for _ in range(length))

    records = folder / "train.jsonl"
    with open(records, "w", encoding="utf-8") as file:
        for _ in range(settings.global_batch_size * settings.max_steps):
            record = {"query": text(settings.query_tokens)}
            record |= {name: text(settings.doc_tokens) for name in ("pos_doc", "neg_doc")}
            file.write(json.dumps(record) + "\n")
    files = {}
    for name, number in (("few", settings.encode_texts // 10), ("many", settings.encode_texts)):
        path, counted = folder / f"{name}.jsonl", 0
        with open(path, "w", encoding="utf-8") as file:
            for row in range(number):
                file.write(json.dumps({"pos_doc": text(settings.doc_tokens), "doc_id": str(row)}) + "\n")
        files[counted] = path
    return records, files


def varlen_errors(device: str) -> dict[str, float]:
    """Relative differences of torch's operator; on a CPU, which has none, of what takes its place there."""
    errors = {}
    for heads, groups, head_size in ((32, 8, 128), (12, 12, 32), (16, 16, 64), (8, 1, 256)):
        for is_causal in (False, True):
            for window in (None, 16):
                name = f"{heads}/{groups} heads of {head_size}, causal {is_causal}, window {window}".lower()
                shape = heads, groups, head_size, is_causal, window
                errors[name] = kernel_error(torch.device(device), *shape, by_operator if device == "cuda" else by_text)
    return errors


def model_flags(settings: GpuArguments, output: Path, kernel: str) -> list[object]:
    return [
        "--attn_implementation",
        kernel,
        "--model_name_or_path",
        output / "model",
        "--query_prefix",
        "",
        "--doc_prefix",
        "",
        "--max_length",
        512,
        "--micro_batch_tokens",
        settings.micro_batch_tokens,
        "--cache_dir",
        output / "cache",
    ]


def train(
    settings: GpuArguments, output: Path, records: Path, stage: int, grad_cache: bool, kernel: str
) -> dict[str, float]:
    """The median rate after the first two steps, the peak memory, and its prediction."""
    run_folder = output / f"zero{stage}-{'cached' if grad_cache else 'kept'}-{kernel}"
    words = [
        "train_gpt.py",
        "--deepspeed",
        f"ds_configs/zero{stage}.json",
        *model_flags(settings, output, kernel),
        "--train_files",
        records,
        "--output_dir",
        run_folder,
        "--lora_rank",
        16,
        "--hard_negatives",
        1,
        "--global_batch_size",
        settings.global_batch_size,
        "--max_steps",
        settings.max_steps,
        "--report_to",
        "none",
        "--grad_cache",
        str(grad_cache).lower(),
        "--gradient_checkpointing",
        "true",
        "--save_interval",
        0,
    ]
    planned = launched(settings, *words, "--dry_run", "true")
    launched(settings, *words)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines[2:]),
        "peak_memory_gib": lines[-1]["peak_memory_gib"],
        "planned_memory_gib": float(re.search(r"\(yours\) +([\d.]+)", planned)[1]),
    }


def encode(settings: GpuArguments, output: Path, files: dict[int, Path], kernel: str) -> dict[str, float]:
    """The rate from the time for many documents minus that for a few, so that startup and loading cancel out."""
    seconds = {}
    for num_tokens, path in files.items():
        started = time.perf_counter()
        words = ["--doc_files", path, "--output_prefix", output / f"vectors-{path.stem}-{kernel}"]
        launched(settings, "generate.py", *model_flags(settings, output, kernel), *words)
        seconds[num_tokens] = time.perf_counter() - started
    (few, few_seconds), (many, many_seconds) = sorted(seconds.items())
    return {"tokens_per_second": (many - few) / (many_seconds - few_seconds)}


def main() -> None:
    (settings,) = parse_arguments(GpuArguments)
    output = Path(settings.output_dir).resolve()
    output.mkdir(parents=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    # Ranks on a CPU share its threads.
    rate = matrix_rate(device, 8192 if device == "cuda" else 1024) * (settings.num_ranks if device == "cuda" else 1)
    errors = varlen_errors(device)
    worst = max(errors, key=lambda name: errors[name])
    print(f"varlen against text by text: a relative difference of at most {errors[worst]:.1e} ({worst})")
    num_weights = make_model(settings, device, output / "model")
    if device == "cuda":
        torch.cuda.empty_cache()
    records, files = write_texts(settings, (SMALL if settings.small else MISTRAL_7B)["vocab_size"], output)
    print(f"{settings.num_ranks} rank(s), {name}: {rate / 1e12:.3f} TFLOP/s in matrix products, N = {num_weights:,}")
    print(f"{'':38}{'tokens/s':>12}{'utilisation':>13}{'peak GiB':>10}{'planned GiB':>13}", flush=True)
    results = {}

    def add(what: str, flops_per_weight: int, found: dict[str, float]) -> None:
        found["model_flops_utilisation"] = found["tokens_per_second"] * flops_per_weight * num_weights / rate
        results[what] = found
        memory = [found.get(key) for key in ("peak_memory_gib", "planned_memory_gib")]
        peak, planned = ("-" if value is None else f"{value:.2f}" for value in memory)
        share = f"{found['model_flops_utilisation']:.1%}"
        print(f"{what:38}{found['tokens_per_second']:12,.0f}{share:>13}{peak:>10}{planned:>13}", flush=True)

    for kernel in settings.kernels:
        for stage in settings.stages:
            for grad_cache in (False, True):
                what = f"ZeRO-{stage}, grad_cache {str(grad_cache).lower()}, {kernel}"
                add(what, 4, train(settings, output, records, stage, grad_cache, kernel))
        add(f"encoding, {kernel}", 2, encode(settings, output, files, kernel))
    facts = {"varlen_errors": errors, "device": name, "matrix_flops_per_second": rate, "num_weights": num_weights}
    (output / "results.json").write_text(
        json.dumps(facts | {"settings": settings.__dict__, "results": results}, indent=2)
    )


if __name__ == "__main__":
    main()
