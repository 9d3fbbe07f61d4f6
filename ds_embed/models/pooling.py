"""From token states to one vector per text.

Shapes: B texts, S tokens (right-padded), D dimensions.
"""

import torch
from torch import Tensor


def token_mask(lengths: Tensor, num_tokens: int) -> Tensor:
    """Which positions hold tokens of the text, (B, S) bool, for right-padded texts of `lengths` (B,)."""
    return torch.arange(num_tokens, device=lengths.device)[None, :] < lengths[:, None]


def pool(states: Tensor, lengths: Tensor, pooling: str) -> Tensor:
    """Pool states (B, S, D) over the first `lengths` (B,) tokens, in float32, to (B, D).

    "last" and "cls" take the last or first token. "mean" averages. "weighted_mean" gives the i-th
    token (from 1) the weight i, so that a causal model's better-informed tokens count more
    (Muennighoff 2022, SGPT, eq. 1).
    """
    if pooling == "cls":
        return states[:, 0].float()
    if pooling == "last":
        return states[torch.arange(states.shape[0], device=states.device), lengths - 1].float()
    weights = token_mask(lengths, states.shape[1]).float()
    if pooling == "weighted_mean":
        weights = weights * torch.arange(1, states.shape[1] + 1, device=states.device)
    else:
        assert pooling == "mean", pooling
    total = torch.einsum("bsd,bs->bd", states.float(), weights)
    return total / weights.sum(1, keepdim=True)
