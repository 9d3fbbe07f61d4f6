"""Dropout that a CPU draws quickly: four elements from each 64-bit number, and no tensors of booleans.

torch draws one double for every element, one after the other: a sixth of the time of a training step of MiniLM.
The probability is rounded to a multiple of 2^-16. The numbers are torch's own, so torch.manual_seed decides them.
"""

import torch
from torch import Tensor, nn

_VALUES = 2**16


def draw_kept(shape: tuple[int, ...], probability: float, dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU that is 0 with the given probability and else 1, element by element."""
    count = torch.Size(shape).numel()
    numbers = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    # Of the 2^16 values of 16 bits, the first `highest` + 1 are those that drop.
    highest = max(0, min(_VALUES - 2, round(probability * _VALUES) - 1)) - _VALUES // 2
    return numbers.view(torch.int16)[:count].clamp_(highest, highest + 1).sub_(highest).to(dtype).view(shape)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return (values * kept).mul_(scale)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None, None


class CpuDropout(nn.Dropout):
    """As nn.Dropout (Srivastava et al. 2014), for tensors on the CPU."""

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        return _Drop.apply(values, draw_kept(values.shape, self.p, values.dtype), 1.0 / (1.0 - self.p))


def use_cpu_dropout(model: nn.Module) -> None:
    """Make every nn.Dropout of the model that drops something a CpuDropout."""
    for module in model.modules():
        if type(module) is nn.Dropout and 0.0 < module.p < 1.0:
            module.__class__ = CpuDropout
