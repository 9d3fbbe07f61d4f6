"""What decides the numbers of a piece of work, as short strings by name, so that work that goes on is the same
work, or says what changed."""

import hashlib
from pathlib import Path
from typing import Any

from ds_embed.models.loading import ModelSource

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


def identify_model(source: ModelSource, commit: str | None) -> dict[str, str]:
    """Weights and configs of a model. `commit` is the revision of a base model that comes from the hub."""
    adapter = "none" if source.adapter is None else _describe_weights(str(source.adapter), None)
    return {"base_model": _describe_weights(source.base, commit), "adapter": adapter}


def identify_files(manifest: dict[str, Any]) -> str:
    """The content of the files of a token store: their SHA-256, so moving or touching them changes nothing."""
    return ", ".join(f"{file['sha256'][:16]} ({file['num_records']:,} records)" for file in manifest["files"])


def identify_tokenizer(manifest: dict[str, Any]) -> str:
    """The tokenizer that a token store was built with."""
    return hashlib.sha256(repr(manifest["settings"]["tokenizer_fingerprint"]).encode()).hexdigest()[:16]


def list_changes(old: dict[str, str], new: dict[str, str]) -> dict[str, str]:
    """By name, what differs, as text. A name that only one side knows belongs to another version of ds_embed."""
    return {name: f"{name} was {old[name]} and is {new[name]}" for name in new if old.get(name, new[name]) != new[name]}


def _describe_weights(name: str, commit: str | None) -> str:
    """Sizes and a hash of the weight files, from blocks spread over them: whole files could be hundreds of GB."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name} at revision {commit}"
    digest, num_bytes = hashlib.sha256(), 0
    configs = sorted(
        path for path in folder.glob("*config.json") if path.name in ("config.json", "adapter_config.json")
    )
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
