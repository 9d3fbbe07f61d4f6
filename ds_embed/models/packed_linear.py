"""Linear layers for encoding on a CPU: weights stored in the order in which oneDNN multiplies them.

A float32 product takes six sevenths of the time it takes with weights in rows, and an activation function behind it is
computed before the result leaves the cache. torch.compile takes the same operators when it freezes a model; here
nothing is compiled. Weights can't be read or trained any more, so training never sees these layers.

Shapes: I and O dimensions in and out.
"""

import torch
from torch import Tensor, nn

from ds_embed.models.cpu_products import multiplies_bfloat16

_DTYPES = (torch.float32, torch.bfloat16)
_EXPECTED_ROWS = 2048  # of an input, for which oneDNN chooses the order
# Where transformers' modules keep a linear layer and the activation function that is called on its output alone.
_ACTIVATED = (("dense", "intermediate_act_fn"), ("gate_proj", "act_fn"))
# How far the outputs of a module may move when its activation is computed before they are rounded, relative.
_SAME = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


class PackedLinear(nn.Module):
    """y = f(x W^T + b) of x (..., I), for weights W (O, I) of a Linear and f one of oneDNN's functions."""

    def __init__(self, linear: nn.Linear, function: tuple[str, str] = ("none", "")):
        """function: name of oneDNN's function, and which approximation of it."""
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.weight = weight.to("meta")  # for models that ask for its dtype; it has no values
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        name, approximation = self.function
        return torch.ops.mkldnn._linear_pointwise(values, self.packed, self.bias, name, [], approximation)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, function={self.function[0]}"


def pack_linear_layers(model: nn.Module) -> None:
    """Make every nn.Linear of a model on the CPU, in place, a PackedLinear, with the activation function behind it.

    Nothing changes where oneDNN can't compute in the model's precision. LoRA matrices stay as they are.
    """
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    if not linear or not can_pack(linear[0].weight.device.type, linear[0].weight.dtype):
        return
    for module in list(model.modules()):
        for layer, activation in _ACTIVATED:
            if type(getattr(module, layer, None)) is nn.Linear and hasattr(module, activation):
                _pack_with_activation(module, layer, activation)
        if isinstance(module, nn.ModuleDict):  # PEFT's, which looks into the matrices that it holds
            continue
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))


def can_pack(device_type: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN computes linear layers of this precision on this device from packed weights."""
    if device_type != "cpu" or dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or multiplies_bfloat16()


def describe_kernels(device_type: str, dtype: torch.dtype, is_partitioned: bool) -> str:
    """How linear layers are computed for encoding, as far as it changes bits.

    is_partitioned: under ZeRO-3 weights are only there while a module runs, so they can't be packed.
    """
    if device_type != "cpu":
        return device_type
    if can_pack(device_type, dtype) and not is_partitioned:
        return "cpu, packed linear layers"
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        return "cpu, bfloat16 products through float32"
    return "cpu, torch's linear layers"


def _pack_with_activation(module: nn.Module, layer: str, activation: str) -> None:
    """Let the layer compute the module's activation, if it is one that oneDNN knows and the module's output stays."""
    linear, function = getattr(module, layer), getattr(module, activation)
    known = _onednn_function(function)
    if known is None:
        return
    sample = torch.randn(4, linear.in_features, generator=torch.Generator().manual_seed(0)).to(linear.weight.dtype)
    with torch.no_grad():
        before = module(sample).float()
        setattr(module, layer, PackedLinear(linear, known))
        setattr(module, activation, nn.Identity())
        after = module(sample).float()
    if not (after - before).norm() <= _SAME[linear.weight.dtype] * before.norm():  # also where it is no number
        setattr(module, layer, linear)
        setattr(module, activation, function)


def _onednn_function(function: object) -> tuple[str, str] | None:
    """What oneDNN calls an activation function, seen by its values; None for one that is not among those tried."""
    places = torch.linspace(-12.0, 12.0, 193)
    candidates = {
        ("gelu", "none"): nn.functional.gelu(places),
        ("gelu", "tanh"): nn.functional.gelu(places, approximate="tanh"),
        ("swish", ""): nn.functional.silu(places),
        ("relu", ""): nn.functional.relu(places),
    }
    if not callable(function) or (isinstance(function, nn.Module) and any(True for _ in function.parameters())):
        return None
    values = function(places)
    return next((name for name, wanted in candidates.items() if torch.allclose(values, wanted, atol=1e-6)), None)
