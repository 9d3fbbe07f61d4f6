"""LoRA (Hu et al. 2021) through PEFT: small trained matrices beside frozen weights."""

import torch

from ds_embed.models.encoder import TextEncoder
from ds_embed.settings import LoraArguments
from ds_embed.settings.errors import UserError


def add_lora(encoder: TextEncoder, arguments: LoraArguments, *, seed: int, dtype: torch.dtype) -> None:
    """Freeze the backbone and put trained LoRA matrices beside its modules, in place.

    The initial values depend on `seed` alone, so that every rank has the same. Raises UserError
    when no module has the asked-for name.
    """
    from peft import LoraConfig, get_peft_model

    from ds_embed.models.lora_linear import use_lora_linear

    modules = arguments.lora_target_modules
    config = LoraConfig(
        task_type="FEATURE_EXTRACTION",
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
    )
    torch.manual_seed(seed)
    try:
        encoder.backbone = get_peft_model(encoder.backbone, config)
    except ValueError as error:
        linear = sorted(
            {n.split(".")[-1] for n, m in encoder.backbone.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        raise UserError(
            f"--lora_target_modules {' '.join(modules)}: {error}; linear modules of this model: {', '.join(linear)}"
        ) from None
    for parameter in encoder.backbone.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    use_lora_linear(encoder)
