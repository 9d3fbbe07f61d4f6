"""Which tokens a token sees: all of its text, or in a causal decoder those before it and itself.

A decoder made bidirectional sees all of the text; in its layers with a sliding window of w tokens, those less
than w away on either side: whatever the causal layer lets see each other in one direction, it does in both.

Shapes: B texts, S tokens (right-padded).
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_embed.models.cpu import MATH_KERNEL
from ds_embed.models.kernels import DEVICE_KERNEL
from ds_embed.models.kinds import Kind, is_bert_style, make_bidirectional
from ds_embed.models.pooling import token_mask
from ds_embed.models.varlen import VARLEN_KERNEL
from ds_embed.settings.errors import UserError

# Decoders whose forward pass takes masks as they are: one for all layers, without a window or with one, or one
# per type of layer.
_ONE_MASK = ("llama", "gemma", "olmo2", "granite")
_ONE_WINDOWED_MASK = ("mistral", "phi3")
_MASK_PER_LAYER_TYPE = ("qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3")
BIDIRECTIONAL_FAMILIES = (*_ONE_MASK, *_ONE_WINDOWED_MASK, *_MASK_PER_LAYER_TYPE)
OUR_KERNELS = (DEVICE_KERNEL, MATH_KERNEL)
_KERNELS = ("sdpa", *OUR_KERNELS, VARLEN_KERNEL, "eager", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class EncoderAttention:
    """Models that are bidirectional by themselves: padding has to be masked, and the model's code does the rest.

    always_masks: code that is not BERT's may take no mask for a causal one.
    """

    always_masks: bool = False
    takes_cache: bool = False  # of keys and values, which only a causal model can use again

    def arguments(self, lengths: Tensor, num_tokens: int, has_padding: bool, dtype: torch.dtype) -> dict[str, Any]:
        """What the backbone is called with besides the token ids."""
        is_masked = has_padding or self.always_masks
        mask = {"attention_mask": token_mask(lengths, num_tokens).long() if is_masked else None}
        return mask | ({"use_cache": False} if self.takes_cache else {})


@dataclass(frozen=True)
class CausalAttention:
    """No token of a right-padded text sees the padding behind it: a mask would change nothing but the kernel."""

    kernel: str

    def arguments(self, lengths: Tensor, num_tokens: int, has_padding: bool, dtype: torch.dtype) -> dict[str, Any]:
        # Without one transformers looks for several texts in a row; our kernels drop it again.
        mask = token_mask(lengths, num_tokens) if self.kernel in OUR_KERNELS else None
        return {"attention_mask": mask, "use_cache": False}


@dataclass(frozen=True)
class BidirectionalAttention:
    """A decoder that sees all of the text, by masks of our own.

    What transformers does with `config.is_causal = False` differs from kernel to kernel: the window is one
    token wider in one, and without padding another stays causal.
    """

    kernel: str
    windows: dict[str, int | None]  # tokens, by type of layer; under "" those of all layers

    def arguments(self, lengths: Tensor, num_tokens: int, has_padding: bool, dtype: torch.dtype) -> dict[str, Any]:
        mask: Any
        if self.kernel.startswith("flash"):  # takes the padding, and the window as we define it, by itself
            mask = token_mask(lengths, num_tokens).long() if has_padding else None
        else:
            tokens = token_mask(lengths, num_tokens) if has_padding else None
            masks = {name: self._mask(tokens, window, lengths, num_tokens) for name, window in self.windows.items()}
            if self.kernel == "eager":
                masks = {name: _additive(mask, num_tokens, lengths, dtype) for name, mask in masks.items()}
            mask = masks.get("", masks)
            if mask is None and self.kernel in OUR_KERNELS:  # as CausalAttention does
                mask = token_mask(lengths, num_tokens)
        return {"attention_mask": mask, "use_cache": False}

    def _mask(self, tokens: Tensor | None, window: int | None, lengths: Tensor, num_tokens: int) -> Tensor | None:
        """Who sees whom, (B or 1, 1, S or 1, S) bool; None where every token sees every other."""
        seen = None if tokens is None else tokens[:, None, None, :]
        # At S = w too, where all see all, since transformers would make a causal mask of its own there.
        if window is not None and num_tokens >= window:
            place = torch.arange(num_tokens, device=lengths.device)
            distance = (place[:, None] - place[None, :]).abs()
            near = (distance < window)[None, None]
            # Padding sees itself, so that no row is empty: a softmax over nothing is no number.
            seen = near if seen is None else near & seen | (distance == 0)
        return seen


Attention = EncoderAttention | CausalAttention | BidirectionalAttention


def _additive(mask: Tensor | None, num_tokens: int, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as the eager kernel adds it to scores; it takes none for causal, so here there is always one."""
    if mask is None:
        return torch.zeros((1, 1, 1, num_tokens), dtype=dtype, device=lengths.device)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def choose_direction(config: Any, kind: Kind, asked: bool | None, name: str) -> bool:
    """Whether every token is to see the whole text. UserError when the model can't be made bidirectional or causal."""
    if not kind.is_causal:
        if asked is False:
            raise UserError(f"--bidirectional false: {name} is bidirectional by itself; leave the flag out")
        return True
    if asked and config.model_type not in BIDIRECTIONAL_FAMILIES:
        raise UserError(
            f"--bidirectional true: {name} is a {config.model_type}, which can't be made bidirectional; "
            f"supported are {', '.join(BIDIRECTIONAL_FAMILIES)}"
        )
    return bool(asked)


def choose_attention(backbone: Any, kind: Kind, bidirectional: bool) -> Attention:
    """How a loaded backbone is called; it is told in place where it is not causal. UserError for other kernels."""
    if kind.is_causal:
        return _both_ways(backbone) if bidirectional else CausalAttention(backbone.config._attn_implementation)
    if getattr(backbone.config, "is_causal", True) is False:
        make_bidirectional(backbone)
    takes_cache = "use_cache" in inspect.signature(backbone.forward).parameters
    return EncoderAttention(always_masks=not is_bert_style(backbone.config), takes_cache=takes_cache)


def _both_ways(backbone: Any) -> BidirectionalAttention:
    config = backbone.config
    kernel = config._attn_implementation
    if kernel not in _KERNELS:
        raise UserError(f"--attn_implementation {kernel}: with --bidirectional true choose {', '.join(_KERNELS)}")
    make_bidirectional(backbone)
    window = getattr(config, "sliding_window", None)
    if config.model_type not in _MASK_PER_LAYER_TYPE:
        return BidirectionalAttention(kernel, {"": window if config.model_type in _ONE_WINDOWED_MASK else None})
    types = {"full_attention", *config.layer_types}
    return BidirectionalAttention(kernel, {name: window if name == "sliding_attention" else None for name in types})
