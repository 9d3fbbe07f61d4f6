"""Are our own layers worthwhile on this machine? Each takes turns with what it replaces, in one process if possible.

    python benchmarks/cpu_kernels.py --model_name_or_path SmolLM2-135M-Instruct --output_dir kernels
    python benchmarks/cpu_kernels.py --model_name_or_path all-MiniLM-L6-v2 --output_dir kernels --parts training encoding compiled

"lora": a training pass (forward and backward) with LoraLinear and with PEFT's layers. "training": one with all weights,
with our attention kernel and dropout for CPUs and with torch's. "encoding": a forward pass with packed and with plain
linear layers, in both precisions. "compiled": a training pass with and without torch.compile for each layer of the
model; the first pass, which compiles, is reported separately. "products": both passes in bfloat16 with products in
float32, preceded by torch's own, which take minutes on a CPU without bfloat16 instructions and are faster on other
CPUs; this part only runs if it is named. Texts are random tokens of equal length.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import Spread, in_process, play, print_table, write_results

from ds_embed.settings import parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting

SHORT_PARTS = ("lora", "training", "encoding", "compiled")
PARTS = (*SHORT_PARTS, "products")


@dataclass
class KernelArguments(Settings):
    model_name_or_path: str = setting("model folder or hub name")
    output_dir: str = setting("folder for cpu_kernels.json")
    parts: list[str] = setting(f"what is compared: {', '.join(PARTS)}", default_factory=lambda: list(SHORT_PARTS))
    rounds: int = setting("timed passes of either side", default=7, above=0)
    num_texts: int = setting("texts of a pass", default=32, above=0)
    length: int = setting("tokens of a text", default=64, above=0)
    lora_rank: int = setting("rank of the LoRA matrices, in lora, and in compiled unless 0", default=16, at_least=0)

    def __post_init__(self):
        super().__post_init__()
        if "lora" in self.parts and not self.lora_rank:
            raise UserError(
                "--lora_rank 0: leaves nothing to compare in lora; give a rank, or leave lora out of --parts"
            )
        for part in self.parts:
            if part not in PARTS:
                raise UserError(f"--parts {part}: choose from {', '.join(PARTS)}")


def load(model: str, kernel: str | None, bf16: bool = True) -> Any:
    """Load the encoder as training and generate do."""
    from ds_embed.models.kinds import kind_of
    from ds_embed.models.loading import find_model, load_config, load_encoder

    source = find_model(model)
    decoder = kind_of(load_config(source, False), False).is_causal
    return load_encoder(
        source,
        pooling="last" if decoder else "mean",
        bidirectional=not decoder,
        bf16=bf16,
        attn_implementation=kernel,
        trust_remote_code=False,
    )


def trained(model: str, kernel: str | None, lora_rank: int) -> Any:
    """The encoder, prepared as the training loop does on a CPU."""
    import torch

    from ds_embed.models.cpu import use_cpu_dropout
    from ds_embed.models.lora import add_lora
    from ds_embed.settings import LoraArguments

    encoder = load(model, kernel)
    if lora_rank:
        add_lora(encoder, LoraArguments(lora_rank=lora_rank), seed=0, dtype=torch.bfloat16)
    if kernel is not None:
        use_cpu_dropout(encoder)
    return encoder.train()


def random_texts(encoder: Any, num_texts: int, length: int) -> tuple[Any, Any]:
    import torch

    words = encoder.backbone.config.vocab_size
    return torch.randint(words // 2, words, (num_texts, length)), torch.full((num_texts,), length)


def training_pass(encoder: Any, num_texts: int, length: int) -> Callable[[], None]:
    import torch

    ids, lengths = random_texts(encoder, num_texts, length)

    def run() -> None:
        encoder.zero_grad()
        vectors = encoder(ids, lengths, False)
        (vectors * torch.linspace(-1, 1, vectors.shape[1])).sum().backward()

    return run


def forward_pass(encoder: Any, num_texts: int, length: int) -> Callable[[], None]:
    import torch

    ids, lengths = random_texts(encoder, num_texts, length)
    encoder.eval().requires_grad_(False)

    def run() -> None:
        with torch.inference_mode():
            encoder(ids, lengths, False)

    return run


def timed(run: Callable[[], None]) -> Callable[[int], dict]:
    def contestant(_: int) -> dict:
        started = time.perf_counter()
        run()
        return {"seconds": time.perf_counter() - started}

    return contestant


def by_turns(passes: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every pass in every round, after a first one that is reported separately as `name, first`."""
    played = play({name: timed(run) for name, run in passes.items()}, rounds + 1)
    seconds = {name: [measured["seconds"] for measured in results] for name, results in played.items()}
    return {f"{name}, first": times[:1] for name, times in seconds.items()} | {n: t[1:] for n, t in seconds.items()}


def compare(*, part: str, model: str, rounds: int, num_texts: int, length: int, lora_rank: int) -> dict:
    """Seconds of both sides in each round of one part, for each precision if there are two."""
    from peft.tuners.lora.layer import Linear as PeftLinear

    from ds_embed.models.cpu import pack_linear_layers, training_kernel
    from ds_embed.models.loading import find_model, load_config
    from ds_embed.models.lora_linear import LoraLinear

    shape = (num_texts, length)
    if part == "products":
        return products(model, rounds, shape)
    kernel = training_kernel(load_config(find_model(model), False), None, "cpu")
    if part == "lora":
        ours, plain = (trained(model, kernel, lora_rank) for _ in range(2))
        for module in plain.modules():
            if isinstance(module, LoraLinear):
                module.__class__ = PeftLinear
        passes = {"LoraLinear": training_pass(ours, *shape), "PEFT's layers": training_pass(plain, *shape)}
    elif part == "training":
        passes = {
            "our attention and dropout": training_pass(trained(model, kernel, 0), *shape),
            "torch's": training_pass(trained(model, None, 0), *shape),
        }
    elif part == "encoding":
        passes = {}
        for name, bf16 in (("bf16", True), ("fp32", False)):
            packed, plain = (load(model, None, bf16) for _ in range(2))
            pack_linear_layers(packed)
            passes[f"{name}: packed layers"] = forward_pass(packed, *shape)
            passes[f"{name}: plain layers"] = forward_pass(plain, *shape)
    else:
        compiled, plain = (trained(model, kernel, lora_rank) for _ in range(2))
        for layer in layers_of(compiled.backbone):
            layer.compile(dynamic=True)
        passes = {"compiled": training_pass(compiled, *shape), "not compiled": training_pass(plain, *shape)}
    return by_turns(passes, rounds)


def products(model: str, rounds: int, shape: tuple[int, int]) -> dict:
    """Seconds of passes with torch's bfloat16 products, then with ours: kernels are replaced process-wide."""
    from unittest.mock import patch

    from ds_embed.models.cpu import multiply_through_float32

    def passes(whose: str) -> dict[str, Callable[[], None]]:
        training, encoding = trained(model, None, 0), load(model, None)
        return {
            f"training: {whose}": training_pass(training, *shape),
            f"encoding: {whose}": forward_pass(encoding, *shape),
        }

    with patch("ds_embed.models.cpu.multiplies_bfloat16", return_value=True):
        torchs = by_turns(passes("torch's"), rounds)
        multiply_through_float32()
        ours = by_turns(passes("through float32"), rounds)
    return {name: times for pair in zip(ours.items(), torchs.items()) for name, times in pair}


def layers_of(backbone: Any) -> Any:
    """The list of a model's identical layers."""
    import torch

    return max((m for m in backbone.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


def main() -> None:
    (settings,) = parse_arguments(KernelArguments)
    names = ("rounds", "num_texts", "length", "lora_rank")
    same = {name: getattr(settings, name) for name in names} | {"model": settings.model_name_or_path}
    rows, results = [], {}
    for part in settings.parts:
        found = in_process("cpu_kernels:compare", part=part, **same)
        results[part] = found
        sides = [name for name in found if not name.endswith(", first") and name != "peak_gib"]
        for ours, other in zip(sides[::2], sides[1::2]):
            gain = Spread.of([theirs / mine for mine, theirs in zip(found[ours], found[other])])
            seconds = [f"{1000 * Spread.of(found[side]).median:,.0f}" for side in (ours, other)]
            rows.append([part, f"{ours} / {other}", *seconds, gain, f"{found[f'{ours}, first'][0]:.1f}"])
    print_table(["part", "what", "ours, ms", "other, ms", "times as fast: median (range)", "first pass, s"], rows)
    write_results(Path(settings.output_dir) / "cpu_kernels.json", settings, results)


if __name__ == "__main__":
    main()
