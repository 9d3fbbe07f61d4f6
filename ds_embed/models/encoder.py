"""Texts in, unit vectors out: the module that DeepSpeed trains.

Shapes: B texts, S tokens (right-padded), D dimensions.
"""

import torch
from torch import Tensor, nn

from ds_embed.models.pooling import pool, token_mask


class TextEncoder(nn.Module):
    """A Hugging Face backbone (bare, or wrapped by PEFT), pooling, and L2 normalisation."""

    def __init__(self, backbone: nn.Module, pooling: str, causal: bool):
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.causal = causal

    def forward(self, input_ids: Tensor, lengths: Tensor, has_padding: bool = True) -> Tensor:
        """Unit vectors (B, D) in float32 of token ids (B, S), right-padded, of `lengths` (B,).

        has_padding: False promises that every text has S tokens, which saves the attention mask.
        """
        attention_mask = None
        # In a causal model no token of a right-padded text sees the padding behind it, so the
        # mask would change nothing but the kernel: without it attention takes the fast causal path.
        if has_padding and not self.causal:
            attention_mask = token_mask(lengths, input_ids.shape[1]).long()
        arguments = {"use_cache": False} if self.causal else {}
        states = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **arguments).last_hidden_state
        return nn.functional.normalize(pool(states, lengths, self.pooling), dim=1)
