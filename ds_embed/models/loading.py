"""Backbones and tokenizers from folders or hub names: base model, adapter on a base, or a finished run."""

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_embed.models.adapters import put_adapter_on, read_adapter
from ds_embed.models.attention import choose_attention, choose_direction
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.cpu import MATH_KERNEL, takes_math_kernel, use_cpu_kernels
from ds_embed.models.encoder import TextEncoder
from ds_embed.models.kernels import DEVICE_KERNEL, register_device_kernel
from ds_embed.models.kinds import auto_class, backbone_class, kind_of, loading_options, plain_config, without_pooler
from ds_embed.settings import LoraArguments, ModelArguments, TextArguments
from ds_embed.settings.errors import UserError


@dataclass(frozen=True)
class ModelSource:
    """Where a model's parts are: `base` weights, an optional PEFT `adapter`, the tokenizer, the card."""

    base: str
    adapter: Path | None
    tokenizer: str
    card: EmbeddingCard | None


def find_model(
    model_name_or_path: str, adapter_path: str | None = None, flag: str = "model_name_or_path"
) -> ModelSource:
    """Resolve a base model, a run folder, a PEFT folder, or a base plus an adapter.

    Raises UserError naming the flag when a folder does not exist or holds no model.
    """
    folder = _model_folder(flag, model_name_or_path)
    if adapter_path is not None:
        adapter = _model_folder("adapter_path", adapter_path)
        if adapter is None or not (adapter / "adapter_config.json").exists():
            raise UserError(f"--adapter_path {adapter_path}: no adapter_config.json there; give a LoRA run or adapter")
        return ModelSource(str(folder or model_name_or_path), adapter, str(adapter), EmbeddingCard.load(adapter))
    if folder is None:
        return ModelSource(model_name_or_path, None, model_name_or_path, None)
    if not (folder / "adapter_config.json").exists():
        return ModelSource(str(folder), None, str(folder), EmbeddingCard.load(folder))
    card = EmbeddingCard.load(folder)
    return ModelSource(_find_base(folder, card, flag), folder, str(folder), card)


def _find_base(adapter: Path, card: EmbeddingCard | None, flag: str) -> str:
    """The base model that an adapter names: as it is named, beside the adapter, or where it stood when both were moved."""
    name = read_adapter(adapter).base_model_name_or_path
    if not name:
        raise UserError(
            f"--{flag} {adapter}: its adapter_config.json names no base model; give that as --model_name_or_path, and this "
            "as --adapter_path"
        )
    for place in (Path(name).expanduser(), adapter / name, adapter / (card.base_model if card else name)):
        if (place / "config.json").exists():
            return str(place.resolve())
    folder = _model_folder(flag, name, hint=f" (the base model that {adapter} names)")
    if folder is not None and (folder / "adapter_config.json").exists():
        raise UserError(
            f"--{flag} {adapter}: its base model {name} is an adapter itself; merge that first, by "
            "recipes/export.py --format merged"
        )
    return str(folder or name)


def _model_folder(flag: str, name: str, hint: str = "") -> Path | None:
    """The folder with the model's files, or None when `name` is to be looked up on the hub."""
    path = Path(name).expanduser()
    for folder in (path, path / "model"):
        if (folder / "adapter_config.json").exists() or (folder / "config.json").exists():
            return folder.resolve()
    if path.is_dir():
        unfinished = (path / "config.yaml").exists()
        reason = "a run that has not finished: no model/ in it" if unfinished else "no config.json in this folder"
        raise UserError(f"--{flag} {name}{hint}: {reason}")
    if path.exists():
        raise UserError(f"--{flag} {name}{hint}: is a file; give the folder that holds config.json")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        if name.count("/") or name.startswith((".", "~")):
            raise UserError(f"--{flag} {name}{hint}: no such folder")
    return None


def load_config(source: ModelSource, trust_remote_code: bool) -> Any:
    """The transformers config of the base model. UserError when it is not one we can embed with."""
    from transformers import AutoConfig

    try:
        with without_foreign_code(source.base):
            config = AutoConfig.from_pretrained(source.base, trust_remote_code=trust_remote_code)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model_name_or_path {source.base}: neither a folder here nor a model that could be fetched: {first}"
        ) from None
    config = plain_config(config, source.base)
    backbone_class(config, trust_remote_code, source.base)  # or says why there is none
    return config


def choose_card(source: ModelSource, text: TextArguments, model: ModelArguments) -> EmbeddingCard:
    """How texts become vectors: flags, else the model's own card, else our defaults for its kind.

    UserError when a length exceeds what the model has positions for, or its attention can't be as asked.
    """
    config = load_config(source, model.trust_remote_code)
    kind = kind_of(config, model.trust_remote_code, source.base)
    asked = model.bidirectional
    if asked is None and kind.is_causal and source.card is not None:
        asked = source.card.bidirectional
    choose_direction(config, kind, asked, source.base)
    return EmbeddingCard.choose(
        text,
        model,
        decoder=kind.is_causal,
        bidirectional=not kind.is_causal,
        base=source.base,
        known=source.card,
        longest=kind.longest,
    )


def load_tokenizer(source: ModelSource, trust_remote_code: bool) -> Any:
    """The fast tokenizer that belongs to the model."""
    from transformers import AutoTokenizer

    with without_foreign_code(source.tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise UserError(f"--model_name_or_path {source.tokenizer}: has no fast tokenizer (tokenizer.json); convert it")
    return tokenizer


def load_encoder(
    source: ModelSource,
    *,
    pooling: str,
    bidirectional: bool,
    bf16: bool,
    attn_implementation: str | None,
    trust_remote_code: bool,
    trained: LoraArguments | None = None,
) -> TextEncoder:
    """The encoder with its base weights, and the adapter where the source has one.

    bidirectional: whether a decoder's tokens see the whole text; encoders' always do.
    trained: how the adapter is to be trained further; it is frozen if None.
    Under an active ZeRO-3 HfDeepSpeedConfig transformers partitions the weights while loading.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar per rank for reading a file
    use_cpu_kernels()
    register_device_kernel()
    config = load_config(source, trust_remote_code)
    options = _model_options(config, bf16, attn_implementation, trust_remote_code)
    with without_foreign_code(source.base), _named_attention(attn_implementation):
        backbone = auto_class(config).from_pretrained(source.base, config=config, **options, **loading_options(config))
    attention = choose_attention(backbone, kind_of(config, trust_remote_code, source.base), bidirectional)
    if source.adapter is not None:
        with without_foreign_code(str(source.adapter)):
            backbone = put_adapter_on(backbone, source.adapter, trained)
        for parameter in backbone.parameters():  # buffers, such as rotary frequencies, stay as exact as they are
            parameter.data = parameter.data.to(options["dtype"])
    return TextEncoder(backbone, pooling, attention)


def build_encoder(
    config: Any,
    *,
    pooling: str,
    bidirectional: bool,
    bf16: bool,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> TextEncoder:
    """The encoder of a transformers config, with weights that were never loaded: for a count of what it takes."""
    use_cpu_kernels()
    register_device_kernel()
    options = _model_options(config, bf16, attn_implementation, trust_remote_code)
    with _named_attention(attn_implementation):
        backbone = auto_class(config).from_config(config, **options, **without_pooler(config))
    attention = choose_attention(backbone, kind_of(config, trust_remote_code), bidirectional)
    return TextEncoder(backbone, pooling, attention, check_attention=False)


def _model_options(config: Any, bf16: bool, attn_implementation: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What AutoModel is told about every backbone."""
    if attn_implementation in (MATH_KERNEL, DEVICE_KERNEL) and not takes_math_kernel(config):
        raise UserError(
            f"--attn_implementation {attn_implementation}: {config.model_type} models can't take it; leave the flag out"
        )
    return {
        "dtype": torch.bfloat16 if bf16 else torch.float32,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
    }


@contextlib.contextmanager
def _named_attention(attn_implementation: str | None) -> Iterator[None]:
    """A model's complaint, made inside, about the attention kernel that was asked for names the flag."""
    try:
        yield
    except (ImportError, ValueError) as error:
        if attn_implementation in (None, MATH_KERNEL, DEVICE_KERNEL):
            raise
        raise UserError(f"--attn_implementation {attn_implementation}: {error}") from None


@contextlib.contextmanager
def without_foreign_code(name: str) -> Iterator[None]:
    """UserError naming the model when reading it would run code of its own, or its weights are not plain tensors."""
    from safetensors import SafetensorError

    try:
        yield
    except (pickle.UnpicklingError, EOFError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: its weights can't be read as plain tensors, and nothing else of them is run ({reason}); "
            "bring back the file, best as .safetensors"
        ) from None
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"{name}: comes with Python code of its own, which is not run; read it, and if you trust it give "
            "--trust_remote_code true"
        ) from None
