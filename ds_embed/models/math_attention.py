"""The attention kernel that training on a CPU takes: plain matrix products in the model's precision.

torch's own kernel for CPUs knows no dropout: with one, it computes in float32 and looks for rows that see nothing.
Without, its backward pass in bfloat16 takes 2 to 7 times as long (head sizes 32 and 64, 40 to 512 tokens).

    O = c (K * softmax(Q K^T / sqrt(d))) V,   K which weights are kept, c = 1 / (1 - probability of dropout)

Shapes: B texts, S tokens, H heads in G groups that share keys and values, d dimensions a head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ds_embed.models.dropout import draw_kept
from ds_embed.settings.errors import UserError

MATH_KERNEL = "math"  # as --attn_implementation
# Longer texts go to torch's kernel, which keeps no (H, S, S) weights, unless they need dropout.
_LONGEST = 1024


def register_math_kernel() -> None:
    """Let transformers' models take it by its name."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(MATH_KERNEL, math_attention)
    AttentionMaskInterface.register(MATH_KERNEL, sdpa_mask)


def takes_math_kernel(config: Any) -> bool:
    """Whether models of this transformers config call their attention kernel by its name, and nothing but sdpa's way."""
    from transformers import MODEL_MAPPING

    model_class = MODEL_MAPPING.get(type(config), None)
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return softcap is None and getattr(model_class, "_supports_attention_backend", False) and model_class._supports_sdpa


def training_kernel(config: Any, asked: str | None, device_type: str) -> str | None:
    """The kernel to train with: the one that was asked for; else this one on CPUs; else None, transformers' choice."""
    return MATH_KERNEL if asked is None and device_type == "cpu" and takes_math_kernel(config) else asked


def math_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention (B, S, H, d) of queries (B, H, S, d), keys and values (B, G, S, d), as transformers calls kernels.

    attention_mask: (B or 1, 1, S or 1, S) bool, True where a token sees another; None for all, or those before it.
    Outside of training, and for what it can't do, it is sdpa.
    """
    num_tokens = query.shape[2]
    is_slow_elsewhere = dropout > 0 or (query.dtype != torch.float32 and num_tokens <= _LONGEST)
    if not (module.training and is_slow_elsewhere and num_tokens == key.shape[2] and query.device.type == "cpu"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling=scaling, is_causal=is_causal, **more
        )
    refused = [name for name in ("softcap", "position_bias", "s_aux") if more.get(name) is not None]
    if refused:
        raise UserError(f"--attn_implementation {MATH_KERNEL}: does not know {', '.join(refused)}; choose eager")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and is_causal and num_tokens > 1:
        attention_mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril_()[None, None]
    # Added to the scores: on a CPU much quicker than filling by a mask.
    bias = None
    if attention_mask is not None:
        bias = torch.zeros(attention_mask.shape, dtype=query.dtype).masked_fill_(~attention_mask, -torch.inf)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    texts, heads, _, dims = query.shape
    groups = texts * key.shape[1]
    kept = None
    if dropout > 0:
        kept = draw_kept((groups, heads // key.shape[1] * num_tokens, num_tokens), dropout, query.dtype)
    mixed = _Attention.apply(
        (query * scaling).reshape(groups, -1, dims),
        key.reshape(groups, num_tokens, dims),
        value.reshape(groups, num_tokens, dims),
        bias,
        kept,
        1.0 / (1.0 - dropout),
    )
    return mixed.view(texts, heads, num_tokens, dims).transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Scaled queries (B G, H/G S, d), keys and values (B G, S, d), bias (B or 1, 1, S or 1, S) to (B G, H/G S, d)."""

    @staticmethod
    def forward(ctx, query, key, value, bias, kept, scale):
        scores = query @ key.transpose(1, 2)
        if bias is not None:
            tokens = key.shape[1]
            scores.view(len(bias), -1, tokens, tokens).add_(bias)
        weights = torch.softmax(scores, 2)
        ctx.save_for_backward(query, key, value, weights, kept)
        ctx.scale = scale
        return (_drop(weights, kept) @ value).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value, weights, kept = ctx.saved_tensors
        gradient = gradient * ctx.scale
        on_value = _drop(weights, kept).transpose(1, 2) @ gradient
        on_weights = _drop(gradient @ value.transpose(1, 2), kept)
        on_scores = torch.ops.aten._softmax_backward_data(on_weights, weights, 2, weights.dtype)
        return on_scores @ key, on_scores.transpose(1, 2) @ query, on_value, None, None, None


def _drop(weights: Tensor, kept: Tensor | None) -> Tensor:
    return weights if kept is None else weights * kept
