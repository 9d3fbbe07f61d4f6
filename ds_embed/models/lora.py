"""LoRA (Hu et al. 2021) with PEFT: small trained matrices beside frozen weights, either new or from a run.

Variants: rslora (Kalajdzievski 2023), dora (Liu et al. 2024), pissa (Meng et al. 2024).
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_embed.models.encoder import TextEncoder
from ds_embed.settings import LoraArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import listed


def last_parts(names: Iterable[str]) -> set[str]:
    """The last components of dotted module names."""
    return {name.split(".")[-1] for name in names}


def linear_modules(model: torch.nn.Module) -> set[str]:
    """The last name components of the model's linear modules."""
    return last_parts(name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))


def add_lora(encoder: TextEncoder, arguments: LoraArguments, *, seed: int, dtype: torch.dtype) -> None:
    """Freeze the backbone and add new trainable LoRA matrices to its modules, in place.

    The initial values depend only on `seed`, so they are the same on every rank. UserError if no module has a requested
    name.
    """
    from peft import LoraConfig, get_peft_model

    settings: Any = arguments.with_defaults(16)
    modules, variant = settings.lora_target_modules, settings.lora_variant
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        init_lora_weights="pissa" if variant == "pissa" else True,
    )
    torch.manual_seed(seed)
    try:
        encoder.backbone = get_peft_model(encoder.backbone, config)
    except ValueError as error:
        known = "linear modules of this model: " + ", ".join(sorted(linear_modules(encoder.backbone)))
        raise UserError(f"--lora_target_modules {listed(modules)}: {error}; {known}") from None
    if variant == "pissa":  # what PiSSA subtracted from the base model's weights
        matrices = {n: p for n, p in encoder.backbone.named_parameters() if p.requires_grad}
        encoder.initial_lora = {n: p.detach().float().cpu().clone() for n, p in matrices.items()}
    start_training(encoder, dtype)


def save_adapter(encoder: TextEncoder, weights: dict[str, Tensor], folder: Path) -> None:
    """Write the matrices, given by their names in the backbone, as a PEFT folder for the original base model.

    PiSSA subtracted s B0 A0 from the base, so the change is s (B A - B0 A0) = s [B, -B0] [A; A0], a LoRA of rank 2r.
    """
    config = encoder.backbone.peft_config["default"]
    if encoder.initial_lora:
        initial = {n: m if ".lora_A." in n else -m for n, m in encoder.initial_lora.items()}
        both = {n: torch.cat([weights[n].float().cpu(), m], int(".lora_B." in n)) for n, m in initial.items()}
        weights = weights | both
        doubled = {"r": 2 * config.r, "lora_alpha": 2 * config.lora_alpha, "init_lora_weights": True}
        encoder.backbone.peft_config["default"] = replace(config, **doubled)
    # "auto" would query the hub to find out whether the base model's embeddings were resized.
    encoder.backbone.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    encoder.backbone.peft_config["default"] = config


def start_training(encoder: TextEncoder, dtype: torch.dtype) -> None:
    """Convert the trained matrices to `dtype`, and use LoraLinear where it is exact."""
    from ds_embed.models.lora_linear import use_lora_linear

    for parameter in encoder.backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    use_lora_linear(encoder)
