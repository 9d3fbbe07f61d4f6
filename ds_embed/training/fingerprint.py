"""What a run is made of, as short strings by name, so that a resumed run is the same run or says what changed."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_embed.config import DataArguments, LoraArguments, OptimizerArguments, RunArguments, StepArguments
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.loading import ModelSource

# These change how the work is done, or how much of it; every other setting decides the numbers. The text
# settings come from the card, which has their defaults filled in.
_LOGISTICS = {
    "micro_batch_tokens", "grad_cache", "gradient_checkpointing", "train_files", "cache_dir",
    "max_length", "query_max_length", "doc_max_length", "query_prefix", "doc_prefix",
    "max_steps", "num_train_epochs",
}  # fmt: skip
_RUN_SETTINGS = ("seed", "bf16")
_CARD_SETTINGS = (
    "pooling", "bidirectional", "query_prefix", "doc_prefix", "query_max_length", "doc_max_length", "append_eos",
)  # fmt: skip
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


def fingerprint(
    manifest: dict[str, Any],
    source: ModelSource,
    commit: str | None,
    card: EmbeddingCard,
    lora: LoraArguments,
    data: DataArguments,
    step: StepArguments,
    optimizer: OptimizerArguments,
    run: RunArguments,
) -> dict[str, str]:
    """Everything that decides the numbers of a run, by the name of its flag where it has one.

    `manifest` is the token store's: it has the files' SHA-256, so moving or touching them changes nothing.
    `commit` is the revision of a model that comes from the hub.
    """
    files = [f"{file['sha256'][:16]} ({file['num_records']:,} records)" for file in manifest["files"]]
    known = {
        "train_files": ", ".join(files),
        "tokenizer": _short(manifest["settings"]["tokenizer_fingerprint"]),
        "base_model": _describe_model(source.base, commit),
        "adapter": "none" if source.adapter is None else _describe_model(str(source.adapter), None),
    }
    for name in _CARD_SETTINGS:
        known[name] = repr(getattr(card, name))
    for group in (lora, data, step, optimizer):
        settings = {name: value for name, value in asdict(group).items() if not name.startswith("val_")}
        known |= {name: repr(value) for name, value in settings.items() if name not in _LOGISTICS}
    return known | {name: repr(getattr(run, name)) for name in _RUN_SETTINGS}


def check_unchanged(path: Path, old: dict[str, str], new: dict[str, str], accepted: list[str]) -> list[str]:
    """ValueError with every change that `accepted` does not name; returns the accepted ones, as text.

    A name that only one side knows belongs to another version of ds_embed and can't be compared.
    """
    changed = {name: f"{name} was {old[name]} and is {new[name]}" for name in new if old.get(name, new[name]) != new[name]}
    unknown = [name for name in accepted if name not in new]
    if unknown:
        raise ValueError(f"--accept_changes {unknown[0]}: no such name; known are {', '.join(sorted(new))}")
    refused = [name for name in changed if name not in accepted]
    if refused:
        raise ValueError(
            f"{path} belongs to a run that differs: {'; '.join(changed[name] for name in refused)}. Put that back, "
            f"choose another --output_dir, or go on all the same with --accept_changes {' '.join(changed)}"
        )
    return list(changed.values())


def _describe_model(name: str, commit: str | None) -> str:
    """Sizes and a hash of the weight files, from blocks spread over them: whole files could be hundreds of GB."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name} at revision {commit}"
    digest, num_bytes = hashlib.sha256(), 0
    configs = sorted(path for path in folder.glob("*config.json") if path.name in ("config.json", "adapter_config.json"))
    weights = sorted(path for pattern in _WEIGHT_FILES for path in folder.glob(pattern))
    for path in (*configs, *weights):
        size = path.stat().st_size
        num_bytes += size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return f"{digest.hexdigest()[:16]} ({len(weights)} weight file(s), {num_bytes:,} bytes)"


def _short(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
