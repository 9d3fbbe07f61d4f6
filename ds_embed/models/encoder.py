"""Texts in, unit vectors out: the module that DeepSpeed trains.

A learned temperature is trained with it: as log(initial temperature / temperature), which starts at zero, where
bfloat16 is finest. The logarithm makes steps relative (Radford et al. 2021, sec. 2.5).

Shapes: B texts, S tokens (right-padded), D dimensions.
"""

import math

import torch
from torch import Tensor, nn

from ds_embed.config.step_arguments import MIN_LEARNED_TEMPERATURE
from ds_embed.models.pooling import pool, token_mask

LOG_SCALE_CHANGE = "log_scale_change"  # the parameter's name in the encoder


class TextEncoder(nn.Module):
    """A Hugging Face backbone (bare, or wrapped by PEFT), pooling, and L2 normalisation."""

    def __init__(self, backbone: nn.Module, pooling: str, causal: bool):
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.causal = causal
        self.register_parameter(LOG_SCALE_CHANGE, None)

    def learn_temperature(self) -> None:
        """Add the parameter of a learned temperature; forward then returns its value (1,) beside the vectors."""
        self.log_scale_change = nn.Parameter(torch.zeros(1))

    def forward(
        self, input_ids: Tensor, lengths: Tensor, has_padding: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
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
        vectors = nn.functional.normalize(pool(states, lengths, self.pooling), dim=1)
        if self.log_scale_change is None:
            return vectors
        # A product, since under ZeRO-3 the parameter itself is empty again after the forward pass.
        return vectors, self.log_scale_change.float() * 1.0


def learned_temperature(initial: float, log_scale_change: float) -> float:
    """The temperature that a value of the parameter stands for."""
    return max(MIN_LEARNED_TEMPERATURE, initial * math.exp(-log_scale_change))
