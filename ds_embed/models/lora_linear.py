"""A linear layer with LoRA that adds the low-rank part to the product in place, in forward and backward passes.

    y = x W^T + b + s (x A^T) B^T;   dx = g W + s (g B) A,   dA = s (g B)^T x,   dB = s g^T (x A^T)

PEFT stores the low-rank part, its product with s and the sum as separate (n, O) tensors, and as many gradients.

Shapes: n tokens, I and O dimensions in and out, r the rank.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn


class _LoraProduct(torch.autograd.Function):
    """x (n, I), frozen weight (O, I) and bias (O,) or None, A (r, I), B (O, r), s to (n, O)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float):
        low = values @ down.T
        ctx.save_for_backward(values, low, weight, down, up)
        ctx.scale = scale
        return nn.functional.linear(values, weight, bias).addmm_(low, up.T, alpha=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        values, low, weight, down, up = ctx.saved_tensors
        on_low = (gradient @ up).mul_(ctx.scale)
        # Nothing below the first layer's input is trained.
        on_values = (gradient @ weight).addmm_(on_low, down) if ctx.needs_input_grad[0] else None
        return on_values, None, None, on_low.T @ values, (gradient.T @ low).mul_(ctx.scale), None


class LoraLinear(PeftLinear):
    """PEFT's layer with a faster implementation; cases that it does not cover are left to PEFT."""

    def forward(self, values: Tensor, *arguments: Any, **named: Any) -> Tensor:  # type: ignore[override]
        adapters, base = self.active_adapters, self.base_layer
        # Under ZeRO-3 weights are only present while the module that holds them runs. (Gathering this layer as a whole,
        # with DeepSpeed's leaf modules, fails if a step has several backward passes.)
        is_plain = type(base) is nn.Linear and not hasattr(base.weight, "ds_id") and not (arguments or named)
        if not is_plain or self.disable_adapters or self.merged or len(adapters) != 1:
            return super().forward(values, *arguments, **named)
        adapter = adapters[0]
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        flat = values.reshape(-1, values.shape[-1])
        product = _LoraProduct.apply(flat, base.weight, base.bias, down, up, self.scaling[adapter])
        return product.view(*values.shape[:-1], product.shape[-1])


def use_lora_linear(model: nn.Module) -> None:
    """Turn PEFT's LoRA layers around a frozen nn.Linear, without dropout or variants such as DoRA, into LoraLinear."""
    for module in model.modules():
        if type(module) is PeftLinear and type(module.base_layer) is nn.Linear and not module.lora_variant:
            dropouts = module.lora_dropout.values()
            biases = any(part.bias is not None for part in module.lora_B.values())
            frozen = not any(parameter.requires_grad for parameter in module.base_layer.parameters())
            if frozen and not biases and all(type(dropout) is nn.Identity for dropout in dropouts):
                module.__class__ = LoraLinear
