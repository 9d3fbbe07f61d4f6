"""Attention without a wait: what a mask can leave out follows from shapes, and no value is fetched from the device.

transformers looks into the mask (is there padding at all?) and into the positions (is a row several texts?) in every
forward pass. We know both: without padding our encoders pass no mask, and a row is one text.

Shapes: B texts, S tokens (right-padded).
"""

from typing import Any

from torch import Tensor

DEVICE_KERNEL = "sdpa_by_shape"  # torch's own kernel, with these masks


def mask_by_shape(
    *,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **facts: Any,
) -> Tensor | None:
    """transformers' sdpa_mask: (B, 1, S, S) bool, or None where the kernel needs none. attention_mask: (B, S).

    In a causal model no token of a right-padded text sees the padding behind it: there the padding is not masked.
    """
    from transformers.masking_utils import sdpa_mask

    padding = None if allow_is_causal_skip else attention_mask
    return sdpa_mask(
        attention_mask=padding,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip and padding is None,
        **facts,
    )
