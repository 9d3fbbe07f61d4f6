"""bfloat16 products on CPUs that have no instructions for them: through float32, as such instructions compute inside.

Without AVX-512 torch multiplies matrices of bfloat16 number by number: on a CPU of that kind a product of 2048 x 576 x 1536
takes 0.2 s, or 3 s with the weights transposed as backward passes need them, where float32 takes 0.03 s. There torch's
products and its attention kernel are given float32 copies of their operands, and what they find is rounded to bfloat16
once. The instructions do the same elsewhere: tensors are bfloat16, sums float32. A copy lives for one product.

The kernels are replaced in torch's own table, for the whole process: so backward passes, PEFT's layers and weights that
ZeRO-3 gathers are all reached, and other models in the process gain as well. Nothing else of torch changes.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, get_kernel

# Products, and how many of their results are as wide as their operands; the attention's sums of exponentials are float32.
_RESULTS = {
    "mm": 1,
    "bmm": 1,
    "addmm": 1,
    "baddbmm": 1,
    "_scaled_dot_product_flash_attention_for_cpu": 1,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
}
_IN_PLACE = ("addmm_", "baddbmm_")
# This environment variable, set to float32, computes on any CPU as on one without bfloat16 instructions: for vectors that
# must have the same bits on both, and for tests of both ways.
WAY = "DS_EMBED_BFLOAT16"


def multiplies_bfloat16() -> bool:
    """Whether oneDNN, to which torch then leaves products of bfloat16, can compute them on this CPU."""
    if os.environ.get(WAY) == "float32":
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def use_quick_products(device_type: str) -> None:
    """Let products of bfloat16 go through float32 in this process, where they are on a CPU that has none of its own."""
    if device_type == "cpu" and not multiplies_bfloat16():
        multiply_through_float32()


@cache  # once; and the registration lasts as long as the object
def multiply_through_float32() -> Library:
    """Replace torch's kernels for products on a CPU by ones that compute bfloat16 in float32; others stay as they are."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that kernels are replaced
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
