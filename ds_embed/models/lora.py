"""LoRA (Hu et al. 2021) through PEFT: small trained matrices beside frozen weights, new ones or those of a run.

Variants: rslora (Kalajdzievski 2023), dora (Liu et al. 2024), pissa (Meng et al. 2024).
"""

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_embed.artifact.durable import folder_when_whole
from ds_embed.artifact.identity import check_unchanged, identify_model
from ds_embed.models.adapters import changes_base, read_adapter
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.encoder import TextEncoder
from ds_embed.models.kinds import backbone_class, is_bert_style, kind_of
from ds_embed.models.loading import ModelSource, load_config, load_encoder
from ds_embed.settings import LoraArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import listed

logger = logging.getLogger(__name__)


def resolve_lora(arguments: LoraArguments, source: ModelSource, config: Any, trust_remote_code: bool) -> LoraArguments:
    """The settings with nothing left open: those of the LoRA run that is trained further, else the defaults.

    config: the base model's transformers config. UserError when they ask for other matrices than the run has,
    and not for new ones.
    """
    if source.adapter is None:
        if arguments.new_lora:
            raise UserError("--new_lora true: the model is no LoRA run, so its matrices are new anyway; leave it out")
        is_decoder = not is_bert_style(config) or kind_of(config, trust_remote_code, source.base).is_causal
        resolved = arguments.with_defaults(16 if is_decoder else 0)
        if not resolved.lora_rank and arguments.lora_variant is not None:
            raise UserError(
                f"--lora_variant {arguments.lora_variant}: without --lora_rank, such as 16, there is no LoRA"
            )
        _check_4bit(source, resolved)
        return resolved
    adapter = read_adapter(source.adapter)
    targets = adapter.target_modules or []
    own = LoraArguments(
        lora_rank=adapter.r,
        lora_alpha=float(adapter.lora_alpha),
        lora_dropout=adapter.lora_dropout,
        lora_target_modules=[targets] if isinstance(targets, str) else sorted(_last_parts(targets)),
        lora_variant="dora" if adapter.use_dora else "rslora" if adapter.use_rslora else "lora",
    )
    given = {name: value for name, value in asdict(arguments).items() if value is not None}
    resolved = replace(own, **given)
    _check_4bit(source, resolved)
    if not resolved.lora_rank or resolved.new_lora:
        return resolved
    for name in ("lora_rank", "lora_alpha", "lora_target_modules", "lora_variant"):
        asked, known = getattr(resolved, name), getattr(own, name)
        meant = asked
        if name == "lora_target_modules" and asked is not known:
            if asked == ["all-linear"]:
                with torch.device("meta"):
                    meant = _linear_modules(backbone_class(config, trust_remote_code, source.base)(config))
            meant = sorted(_last_parts(meant))
        if meant != known:
            asked, known = (listed(v) if isinstance(v, list) else v for v in (asked, known))
            raise UserError(
                f"--{name} {asked}: the LoRA run that is trained further, {source.adapter}, has {known}; leave the flag "
                "out to go on with its matrices, or set --new_lora true to merge them into the base and start new ones"
            )
    if changes_base(adapter):
        raise UserError(
            f"{source.adapter}: init_lora_weights {adapter.init_lora_weights} changes the base model's weights, so its "
            "matrices can't be trained further; set --new_lora true to merge them into the base and start new ones"
        )
    return replace(resolved, lora_target_modules=own.lora_target_modules)


def _check_4bit(source: ModelSource, resolved: LoraArguments) -> None:
    flag = f"--load_in_4bit {source.load_in_4bit}"
    if source.load_in_4bit is not None and not resolved.lora_rank:
        raise UserError(f"{flag}: weights in 4 bits can't be trained; set --lora_rank, such as 16, or leave it out")
    if source.load_in_4bit is not None and resolved.lora_variant == "pissa":
        raise UserError(f"--lora_variant pissa: changes the base model's weights, which {flag} rounds; choose another")


def _last_parts(names: Iterable[str]) -> set[str]:
    return {name.split(".")[-1] for name in names}


def _linear_modules(model: torch.nn.Module) -> set[str]:
    return _last_parts(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))


def merge_adapter(source: ModelSource, card: EmbeddingCard, folder: Path, trust_remote_code: bool) -> None:
    """Write `folder`, whole or not at all: the base model with the adapter merged in, in float32.

    What stands there already is kept when it was made from the same weights. UserError when it was not.
    """
    commit = getattr(load_config(source, trust_remote_code), "_commit_hash", None)
    made_from, record = identify_model(source.base, source.adapter, commit), folder / "merged_from.json"
    if folder.exists():
        check_unchanged(folder, json.loads(record.read_text("utf-8")), made_from, (), "--output_dir")
        return
    logger.info("merging %s into %s: %s", source.adapter, source.base, folder)
    encoder = load_encoder(
        replace(source, load_in_4bit=None),
        pooling=card.pooling,
        bidirectional=card.bidirectional,
        bf16=False,
        attn_implementation=None,
        trust_remote_code=trust_remote_code,
    )
    with folder_when_whole(folder) as part:
        encoder.backbone.merge_and_unload(safe_merge=True).save_pretrained(part)
        (part / record.name).write_text(json.dumps(made_from, indent=2) + "\n", "utf-8")


def add_lora(encoder: TextEncoder, arguments: LoraArguments, *, seed: int, dtype: torch.dtype) -> None:
    """Freeze the backbone and put new trained LoRA matrices beside its modules, in place.

    The initial values depend on `seed` alone, so that every rank has the same. Raises UserError
    when no module has the asked-for name.
    """
    from peft import LoraConfig, get_peft_model

    arguments = arguments.with_defaults(16)
    modules, variant = arguments.lora_target_modules, arguments.lora_variant
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        init_lora_weights="pissa" if variant == "pissa" else True,
    )
    torch.manual_seed(seed)
    try:
        encoder.backbone = get_peft_model(encoder.backbone, config)
    except ValueError as error:
        linear = sorted(_linear_modules(encoder.backbone))
        raise UserError(
            f"--lora_target_modules {' '.join(modules)}: {error}; linear modules of this model: {', '.join(linear)}"
        ) from None
    if variant == "pissa":  # what was taken from the base model's weights
        matrices = {n: p for n, p in encoder.backbone.named_parameters() if p.requires_grad}
        encoder.initial_lora = {n: p.detach().float().cpu().clone() for n, p in matrices.items()}
    start_training(encoder, dtype)


def save_adapter(encoder: TextEncoder, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the matrices, by their names in the backbone, as a PEFT folder on the base model as it was.

    PiSSA took s B0 A0 out of the base, which so has gained s (B A - B0 A0) = s [B, -B0] [A; A0]: a LoRA of rank 2r.
    """
    config = encoder.backbone.peft_config["default"]
    if encoder.initial_lora:
        initial = {n: m if ".lora_A." in n else -m for n, m in encoder.initial_lora.items()}
        weights = {n: torch.cat([m.float(), initial[n]], int(".lora_B." in n)) for n, m in weights.items()}
        doubled = {"r": 2 * config.r, "lora_alpha": 2 * config.lora_alpha, "init_lora_weights": True}
        encoder.backbone.peft_config["default"] = replace(config, **doubled)
    # "auto" would ask the hub whether the base model's embeddings were resized.
    encoder.backbone.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    encoder.backbone.peft_config["default"] = config


def start_training(encoder: TextEncoder, dtype: torch.dtype) -> None:
    """Have the trained matrices in `dtype`, and computed where the product lies as far as that is exact."""
    from ds_embed.models.lora_linear import use_lora_linear

    for parameter in encoder.backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    use_lora_linear(encoder)
