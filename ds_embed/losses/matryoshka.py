"""Prefixes of embeddings as embeddings of their own (Kusupati et al. 2022, eq. 1): sum_m w_m loss(first m dimensions).

Shapes: T texts, D dimensions, m of them.
"""

import torch
from torch import Tensor


def prefix_of(table: Tensor, num_dims: int) -> tuple[Tensor, Tensor]:
    """The first m columns of the table (T, D) as unit vectors (T, m), and their norms (T, 1) before."""
    prefix = table[:, :num_dims]
    norms = torch.linalg.vector_norm(prefix, dim=1, keepdim=True).clamp_min(1e-12)
    return prefix / norms, norms


def add_prefix_gradient(gradient: Tensor, prefix: Tensor, norms: Tensor, grad_prefix: Tensor) -> None:
    """Add to `gradient` (T, D) what a gradient (T, m) by the unit prefixes means for the embeddings.

    For u = x / |x| it is (g - (g . u) u) / |x|.
    """
    radial = (grad_prefix * prefix).sum(1, keepdim=True)
    gradient[:, : prefix.shape[1]] += (grad_prefix - radial * prefix) / norms
