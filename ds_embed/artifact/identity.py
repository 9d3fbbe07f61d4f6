"""What determines the content of an output, as short strings by name, so that resumed work is the same work or reports
what changed."""

import hashlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ds_embed.artifact.durable import sha256_of
from ds_embed.settings.errors import UserError

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
_CONFIGS = ("config.json", "adapter_config.json")
_SAMPLES, _SAMPLE_BYTES = 64, 2**16
_BEFORE = {"vector_dtype": "float32"}  # values of settings that older versions did not have

logger = logging.getLogger(__name__)


def identify_model(base: str, adapter: str | os.PathLike | None, commit: str | None) -> dict[str, str]:
    """Identify a model's weights and configs. `commit` is the revision of a `base` that comes from the hub."""
    on_it = "none" if adapter is None else identify_weights(str(adapter))
    return {"base_model": identify_weights(base, commit), "adapter": on_it}


def identify_weights(name: str, commit: str | None = None) -> str:
    """Identify the weight files and configs of a model's folder, or a model on the hub by its name and revision."""
    folder = Path(name)
    if not folder.is_dir():
        return f"{name} at revision {commit}"
    configs = (path for path in folder.glob("*config.json") if path.name in _CONFIGS)
    weights = [path for pattern in _WEIGHT_FILES for path in folder.glob(pattern)]
    digest, num_bytes = _sampled([*sorted(configs), *sorted(weights)])
    return f"{digest} ({len(weights)} weight file(s), {num_bytes:,} bytes)"


def identify_large(paths: Iterable[Path]) -> str:
    """Identify large files by their sizes and 64 blocks of each, since whole files could be hundreds of GB."""
    digest, num_bytes = _sampled(sorted(paths))
    return f"{digest} ({num_bytes:,} bytes)"


def identify_texts(paths: Iterable[str | os.PathLike]) -> str:
    """Identify files by the SHA-256 of their content, so that moving or touching them changes nothing."""
    return ", ".join(sha256_of(Path(path))[:16] for path in paths)


def identify_files(manifest: Mapping[str, Any]) -> str:
    """Like identify_texts, for the files of a token store, which were hashed as they were read."""
    return ", ".join(f"{file['sha256'][:16]} ({file['num_records']:,} records)" for file in manifest["files"])


def identify_tokenizer(manifest: Mapping[str, Any]) -> str:
    """The tokenizer that a token store was built with."""
    return hashlib.sha256(repr(manifest["settings"]["tokenizer_fingerprint"]).encode()).hexdigest()[:16]


def check_unchanged(
    path: Path,
    old: dict[str, str],
    new: Mapping[str, str],
    accepted: Collection[str],
    flag: str,
    *,
    acceptable: Collection[str] = (),
    so_that: str = "goes on all the same",
) -> None:
    """UserError with the cure and every change in what `path` was made from that is not in `accepted`.

    A name that only one side has comes from another version of ds_embed and is not compared. `acceptable` are the names
    that --accept_changes takes, and `so_that` says what it does; accepted changes are logged as warnings.
    """
    old = _BEFORE | old
    unknown = [name for name in accepted if name not in acceptable]
    if unknown:
        raise UserError(f"--accept_changes {unknown[0]}: no such name; known are {', '.join(sorted(acceptable))}")
    changed = (name for name, value in new.items() if old.get(name, value) != value)
    changes = {name: f"{name} was {old[name]} and is {new[name]}" for name in changed}
    refused = [name for name in changes if name not in accepted]
    if refused:
        cure = f"Put that back, remove {path} to start afresh, or choose another {flag}"
        if set(refused) <= set(acceptable):
            cure += f"; --accept_changes {' '.join(changes)} {so_that}"
        raise UserError(f"{path} was made from something else: {'; '.join(changes[name] for name in refused)}. {cure}")
    for change in changes.values():
        logger.warning("warning: %s: accepted although it was made from something else: %s", path, change)


def _sampled(paths: Iterable[Path]) -> tuple[str, int]:
    """A hash of the names, sizes and evenly spaced blocks of files, and their total bytes."""
    digest, num_bytes = hashlib.sha256(), 0
    for path in paths:
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
    return digest.hexdigest()[:16], num_bytes
