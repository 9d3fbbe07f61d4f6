"""From token states to one vector per text, and what may come behind the pooling.

Shapes: B texts, S tokens (right-padded), T tokens of texts that stand one behind the other, D dimensions.
"""

from typing import Any

import torch
from torch import Tensor, nn

# Behind the pooling of a model that says nothing else.
NORMALIZE: dict[str, Any] = {"type": "Normalize"}
# Activation functions of Dense layers by the class names that their files hold; nothing that a file names is imported.
ACTIVATIONS = {
    kind.__name__: kind
    for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU)
    + (nn.ReLU6, nn.Mish, nn.Softplus, nn.Softsign, nn.Hardswish, nn.Hardtanh, nn.LogSigmoid, nn.CELU)
}


def token_mask(lengths: Tensor, num_tokens: int) -> Tensor:
    """Which positions hold tokens of the text, (B, S) bool, for right-padded texts of `lengths` (B,)."""
    return torch.arange(num_tokens, device=lengths.device)[None, :] < lengths[:, None]


def pool(states: Tensor, lengths: Tensor, pooling: str, prompt_lengths: Tensor | None = None) -> Tensor:
    """Pool states (B, S, D) over the first `lengths` (B,) tokens, in float32, to (B, D).

    "last" and "cls" take the last or first token, "max" the largest number of each dimension. "mean" averages,
    "mean_sqrt_len" divides the sum by the root of the count. "weighted_mean" gives the i-th token (from 1) the weight
    i, so that a causal model's better-informed tokens count more (Muennighoff 2022, SGPT, eq. 1). Several with + in
    between stand one behind the other, (B, n D). prompt_lengths (B,): that many leading tokens of each text are left
    out, but for its last token; the weights i stay.
    """
    texts = torch.arange(states.shape[0], device=states.device)
    first = None if prompt_lengths is None else torch.minimum(prompt_lengths, lengths - 1)

    def pooled(name: str) -> Tensor:
        if name == "cls":
            return (states[:, 0] if first is None else states[texts, first]).float()
        if name == "last":
            return states[texts, lengths - 1].float()
        mask = token_mask(lengths, states.shape[1])
        if first is not None:
            mask = mask & ~token_mask(first, states.shape[1])
        if name == "max":
            return states.float().masked_fill(~mask[..., None], -torch.inf).max(1).values
        weights = mask.float()
        if name == "weighted_mean":
            weights = weights * torch.arange(1, states.shape[1] + 1, device=states.device)
        count = weights.sum(1, keepdim=True)
        count = count.sqrt() if name == "mean_sqrt_len" else count
        return torch.einsum("bsd,bs->bd", states.float(), weights) / count

    parts = [pooled(name) for name in pooling.split("+")]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def pool_packed(states: Tensor, lengths: Tensor, pooling: str, prompt_lengths: Tensor | None = None) -> Tensor:
    """What `pool` makes of the same texts, one behind the other in states (T, D)."""
    ends, num_tokens = lengths.cumsum(0), states.shape[0]
    starts = ends - lengths
    first = torch.zeros_like(lengths) if prompt_lengths is None else torch.minimum(prompt_lengths, lengths - 1)
    place = torch.arange(num_tokens, device=states.device) - spread(starts, lengths, num_tokens)
    is_pooled = place >= spread(first, lengths, num_tokens)

    def pooled(name: str) -> Tensor:
        if name in ("cls", "last"):
            return states[starts + first if name == "cls" else ends - 1].float()
        if name == "max":
            seen = states.float().masked_fill(~is_pooled[:, None], -torch.inf)
            return torch.segment_reduce(seen, "max", lengths=lengths, unsafe=True)
        weights = is_pooled * (place + 1) if name == "weighted_mean" else is_pooled
        weighted = states.float() * weights[:, None]
        total, count = (
            torch.segment_reduce(part, "sum", lengths=lengths, unsafe=True) for part in (weighted, weights.float())
        )
        return total / (count.sqrt() if name == "mean_sqrt_len" else count)[:, None]

    parts = [pooled(name) for name in pooling.split("+")]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def spread(values: Tensor, lengths: Tensor, num_tokens: int) -> Tensor:
    """The value (B,) of each token's text, (T,). Told how many tokens there are, the host waits for no device."""
    return torch.repeat_interleave(values, lengths, output_size=num_tokens)


class Normalize(nn.Module):
    """Vectors (B, D) to the same of length 1."""

    def forward(self, vectors: Tensor) -> Tensor:
        return nn.functional.normalize(vectors, dim=1)


class Dense(nn.Module):
    """A trained linear layer with an activation function, as sentence-transformers has it; float32 in and out."""

    def __init__(self, layer: dict[str, Any]):
        super().__init__()
        wide, narrow = layer["in_features"], layer["out_features"]
        self.linear = nn.Linear(wide, narrow, bias=layer["bias"])
        self.activation = ACTIVATIONS[layer["activation"]]()
        self.use_residual = layer["use_residual"]
        if self.use_residual and wide != narrow:
            self.residual = nn.Linear(wide, narrow, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        inputs = vectors.to(self.linear.weight.dtype)
        outputs = self.activation(self.linear(inputs).float())
        if self.use_residual:
            outputs = outputs + (self.residual(inputs).float() if hasattr(self, "residual") else vectors)
        return outputs


def build_head(layers: list[dict[str, Any]]) -> nn.Sequential:
    """The modules behind the pooling, from their descriptions in a card; Dense layers with random weights."""
    return nn.Sequential(*(Dense(layer) if layer["type"] == "Dense" else Normalize() for layer in layers))
