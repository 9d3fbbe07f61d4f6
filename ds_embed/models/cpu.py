"""Everything that is computed differently on CPUs; GPUs are not affected.

- On CPUs without bfloat16 instructions, bfloat16 products are computed in float32 (`use_kernels`).
- Attention and dropout for training are several times as fast as torch's (`training_kernel`, `use_cpu_dropout`).
- Linear layers for encoding have their weights in the memory layout that oneDNN uses (`pack_linear_layers`).

`use_kernels` is the only function that changes torch's own table of kernels. It is called when a model is loaded, never
in a forward pass; without it torch computes every product itself.

Shapes: B texts, S tokens, H heads in G groups that share keys and values, d dimensions per head; I and O input and
output dimensions of a linear layer.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library, get_kernel

from ds_embed.models.kernels import DEVICE_KERNEL, mask_by_shape
from ds_embed.settings.errors import UserError

# If this environment variable is float32, any CPU computes like one without bfloat16 instructions: for vectors that
# must be bitwise equal on both, and to test both paths.
WAY = "DS_EMBED_BFLOAT16"
MATH_KERNEL = "math"  # the value of --attn_implementation
# Products, and how many of their results have the operands' dtype; attention's sums of exponentials are float32.
_RESULTS = {
    "mm": 1,
    "bmm": 1,
    "addmm": 1,
    "baddbmm": 1,
    "_scaled_dot_product_flash_attention_for_cpu": 1,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}
_IN_PLACE = ("addmm_", "baddbmm_")
# Longer texts use torch's attention, which stores no (H, S, S) weights, unless they need dropout.
_LONGEST = 1024
_DROPOUT_VALUES = 2**16
_PACKED_DTYPES = (torch.float32, torch.bfloat16)
_EXPECTED_ROWS = 2048  # rows of an input, for which oneDNN chooses the layout
# Names in transformers' modules of a linear layer and the activation function that is applied only to its output.
_ACTIVATED = (("dense", "intermediate_act_fn"), ("gate_proj", "act_fn"))
# Largest relative change of a module's outputs when its activation is computed before rounding.
_SAME = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def multiplies_bfloat16() -> bool:
    """Whether oneDNN, which torch uses for bfloat16 products, can compute them on this CPU."""
    if os.environ.get(WAY) == "float32":
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def use_kernels() -> None:
    """Install our kernels in this process: attention under its name, and products of tensors on CPUs.

    Without AVX-512 torch multiplies bfloat16 matrices element by element: a product of 2048 x 576 x 1536 takes 0.2 s,
    or 3 s with transposed weights as in backward passes, compared with 0.03 s in float32. On such a CPU, torch's
    products and attention get float32 copies of their operands, and their results are rounded to bfloat16 once, as
    bfloat16 instructions do. The kernels are replaced in torch's own table, which covers backward passes, PEFT's layers
    and weights gathered by ZeRO-3.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name, kernel in ((MATH_KERNEL, math_attention), (DEVICE_KERNEL, sdpa_attention_forward)):
        AttentionInterface.register(name, kernel)
        AttentionMaskInterface.register(name, mask_by_shape)
    if not multiplies_bfloat16():
        multiply_through_float32()


@cache  # call it once; the registration lasts as long as the object
def multiply_through_float32() -> Library:
    """Make torch compute bfloat16 products on CPUs in float32; other dtypes are unchanged."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # about replaced kernels
        for name in (*_RESULTS, *_IN_PLACE):
            library.impl(name, _through_float32(name), "CPU", with_keyset=True)
    return library


def _through_float32(name: str) -> Callable:
    kernel = get_kernel(f"aten::{name}", "CPU")

    def run(keys: Any, first: Tensor, *others: Any, **named: Any) -> Any:
        if first.dtype != torch.bfloat16:
            return kernel.call_boxed(keys, first, *others, **named)
        wide = [_widened(value) for value in (first, *others)]
        found = kernel.call_boxed(keys, *wide, **{key: _widened(value) for key, value in named.items()})
        if name in _IN_PLACE:
            return first.copy_(found)
        if isinstance(found, Tensor):
            return found.bfloat16()
        return *(part.bfloat16() for part in found[: _RESULTS[name]]), *found[_RESULTS[name] :]

    return run


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def takes_math_kernel(config: Any) -> bool:
    """Whether models of this transformers config look up their attention kernel by name and call it like sdpa's."""
    from transformers import MODEL_MAPPING

    model_class: Any = MODEL_MAPPING.get(type(config), None)
    softcap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return softcap is None and getattr(model_class, "_supports_attention_backend", False) and model_class._supports_sdpa


def training_kernel(config: Any, asked: str | None, device_type: str) -> str | None:
    """The kernel for training: the one requested, else ours if the model supports it, else the model's default."""
    if asked is not None or not takes_math_kernel(config):
        return asked
    return MATH_KERNEL if device_type == "cpu" else DEVICE_KERNEL


def math_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention (B, S, H, d) of queries (B, H, S, d), keys and values (B, G, S, d), as transformers calls kernels.

        O = c (K * softmax(Q K^T / sqrt(d))) V,   K which weights are kept, c = 1 / (1 - probability of dropout)

    attention_mask: (B or 1, 1, S or 1, S) bool, True where a token sees another; None for all tokens or, if causal,
    earlier ones. It uses plain products in the model's precision: on CPUs torch's kernel supports no dropout, and its
    backward pass in bfloat16 takes 2 to 7 times as long (head sizes 32 and 64, 40 to 512 tokens). Outside of training
    it calls sdpa.
    """
    num_tokens = query.shape[2]
    is_slow_elsewhere = dropout > 0 or (query.dtype != torch.float32 and num_tokens <= _LONGEST)
    if not (module.training and is_slow_elsewhere and num_tokens == key.shape[2] and query.device.type == "cpu"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        more |= {"scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, **more)
    refused = [name for name in ("softcap", "position_bias", "s_aux") if more.get(name) is not None]
    if refused:
        raise UserError(f"--attn_implementation {MATH_KERNEL}: does not know {', '.join(refused)}; choose eager")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and is_causal and num_tokens > 1:
        attention_mask = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril_()[None, None]
    # Added to the scores, which is much faster on a CPU than masked_fill.
    bias = None
    if attention_mask is not None:
        # Not -inf: padding whose window contains only padding would become NaN, which multiplying by 0 does not remove.
        lowest = torch.finfo(query.dtype).min
        bias = torch.zeros(attention_mask.shape, dtype=query.dtype).masked_fill_(~attention_mask, lowest)
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    texts, heads, _, dims = query.shape
    groups = texts * key.shape[1]
    kept = None
    if dropout > 0:
        kept = draw_kept((groups, heads // key.shape[1] * num_tokens, num_tokens), dropout, query.dtype)
    mixed = _Attention.apply(
        (query * scaling).reshape(groups, -1, dims),
        key.reshape(groups, num_tokens, dims),
        value.reshape(groups, num_tokens, dims),
        bias,
        kept,
        1.0 / (1.0 - dropout),
    )
    return mixed.view(texts, heads, num_tokens, dims).transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Scaled queries (B G, H/G S, d), keys and values (B G, S, d), bias (B or 1, 1, S or 1, S) to (B G, H/G S, d)."""

    @staticmethod
    def forward(ctx, query, key, value, bias, kept, scale):
        scores = query @ key.transpose(1, 2)
        if bias is not None:
            tokens = key.shape[1]
            scores.view(len(bias), -1, tokens, tokens).add_(bias)
        weights = torch.softmax(scores, 2)
        ctx.save_for_backward(query, key, value, weights, kept)
        ctx.scale = scale
        return (_drop(weights, kept) @ value).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value, weights, kept = ctx.saved_tensors
        gradient = gradient * ctx.scale
        on_value = _drop(weights, kept).transpose(1, 2) @ gradient
        on_weights = _drop(gradient @ value.transpose(1, 2), kept)
        on_scores = torch.ops.aten._softmax_backward_data(on_weights, weights, 2, weights.dtype)
        return on_scores @ key, on_scores.transpose(1, 2) @ query, on_value, None, None, None


def _drop(weights: Tensor, kept: Tensor | None) -> Tensor:
    return weights if kept is None else weights * kept


def draw_kept(shape: tuple[int, ...], probability: float, dtype: torch.dtype) -> Tensor:
    """A CPU tensor whose elements are 0 with the given probability and otherwise 1.

    torch draws a double for every element, which takes a sixth of a training step of MiniLM; here each 64-bit random
    number of torch gives four elements. The probability is rounded to a multiple of 2^-16.
    """
    count = torch.Size(shape).numel()
    numbers = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    # 16-bit values up to `highest`, counted from the lowest, drop their element.
    highest = max(0, min(_DROPOUT_VALUES - 2, round(probability * _DROPOUT_VALUES) - 1)) - _DROPOUT_VALUES // 2
    kept = torch.empty(count, dtype=dtype)  # comparing into it takes half as long as converting what is compared
    return torch.gt(numbers.view(torch.int16)[:count], highest, out=kept).view(shape)


class CpuDropout(nn.Dropout):
    """Like nn.Dropout (Srivastava et al. 2014), for tensors on the CPU."""

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return values
        return (values * draw_kept(values.shape, self.p, values.dtype)).mul_(1.0 / (1.0 - self.p))


def use_cpu_dropout(model: nn.Module) -> None:
    """Turn every nn.Dropout of the model with a probability between 0 and 1 into a CpuDropout."""
    for module in model.modules():
        if type(module) is nn.Dropout and 0.0 < module.p < 1.0:
            module.__class__ = CpuDropout


class PackedLinear(nn.Module):
    """y = f(x W^T + b) of x (..., I), with weights W (O, I) of a Linear and f one of oneDNN's functions.

    A float32 product takes six sevenths of the time that it takes with row-major weights, and f is computed while the
    result is still in the cache. The weights can no longer be read or trained.
    """

    def __init__(self, linear: nn.Linear, function: tuple[str, str] = ("none", "")):
        """function: the name of oneDNN's function and of its approximation."""
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _EXPECTED_ROWS)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.weight = weight.to("meta")  # for models that read its dtype; it has no values
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        name, approximation = self.function
        return torch.ops.mkldnn._linear_pointwise(values, self.packed, self.bias, name, [], approximation)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, function={self.function[0]}"


def pack_linear_layers(model: nn.Module) -> None:
    """Turn every nn.Linear of a model on the CPU into a PackedLinear, in place, including the activation after it.

    Does nothing if oneDNN can't compute in the model's precision. LoRA matrices are not changed.
    """
    linear = [module for module in model.modules() if type(module) is nn.Linear]
    if not linear or not can_pack(linear[0].weight.device.type, linear[0].weight.dtype):
        return
    for module in list(model.modules()):
        for layer, activation in _ACTIVATED:
            if type(getattr(module, layer, None)) is nn.Linear and hasattr(module, activation):
                _pack_with_activation(module, layer, activation)
        # PEFT reads the values of its own matrices and, with DoRA, the layer's weights.
        if isinstance(module, nn.ModuleDict) or getattr(module, "lora_variant", None):
            continue
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))


def can_pack(device_type: str, dtype: torch.dtype) -> bool:
    """Whether oneDNN can compute linear layers with packed weights in this precision on this device."""
    if device_type != "cpu" or dtype not in _PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or multiplies_bfloat16()


def describe_kernels(device_type: str, dtype: torch.dtype, is_partitioned: bool) -> str:
    """How linear layers are computed for encoding, as far as it affects the bits of vectors.

    is_partitioned: under ZeRO-3 weights are only present while a module runs, so they can't be packed.
    """
    if device_type != "cpu":
        return device_type
    if can_pack(device_type, dtype) and not is_partitioned:
        return "cpu, packed linear layers"
    if dtype == torch.bfloat16 and not multiplies_bfloat16():
        return "cpu, bfloat16 products through float32"
    return "cpu, torch's linear layers"


def _pack_with_activation(module: nn.Module, layer: str, activation: str) -> None:
    """Let the layer compute the module's activation, if oneDNN has it and the module's output does not change."""
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
    if not (after - before).norm() <= _SAME[linear.weight.dtype] * before.norm():  # also true for NaN
        setattr(module, layer, linear)
        setattr(module, activation, function)


def _onednn_function(function: object) -> tuple[str, str] | None:
    """oneDNN's name for an activation function, identified by its values; None if it is none of those tried."""
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
