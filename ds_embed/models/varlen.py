"""A micro-batch as one row of tokens, its texts one behind the other: nothing is computed for padding.

Attention then needs to know where each text ends. On a GPU that is torch's operator for it (torch.nn.attention.varlen,
which is FlashAttention inside of torch); elsewhere each text is given to torch's plain attention, so that all but the
call of one operator is the same on a CPU. That operator was not run on a GPU by us: there it is compared with the plain
computation before anything is trained or encoded with it.

Shapes: B texts, T tokens of all of them, H heads in G groups that share keys and values, d dimensions a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from ds_embed.job.ranks import World
from ds_embed.models.cpu import takes_math_kernel
from ds_embed.models.pooling import spread
from ds_embed.settings.errors import UserError

VARLEN_KERNEL = "varlen"  # as --attn_implementation
# Families whose code takes positions and hands what it does not know on to the attention, which gets its window from it.
_COUNT_FROM_PADDING = ("roberta", "xlm-roberta", "camembert")  # whose positions begin behind the padding's index
_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "olmo2", "granite", "smollm3")
FAMILIES = ("bert", "distilbert", *_COUNT_FROM_PADDING, "modernbert", *_DECODERS)
# The operator's limits.
CAPABILITY = (8, 0)
_LARGEST_HEAD, _HEAD_UNIT = 256, 8
_LARGEST_ERROR = 0.02  # of outputs and gradients in bfloat16, relative; an error in what sees what makes 0.1 and more


@dataclass(frozen=True)
class Segments:
    """Where the texts of a row end, and who sees whom in a text."""

    lengths: Tensor  # (B,)
    longest: int  # tokens of a text
    bounds: Tensor  # (B + 1,) int32, where each text begins, and T
    is_causal: bool
    wider: int = 0  # by how many tokens windows are wider than the model's code says

    @classmethod
    def of(cls, lengths: Tensor, longest: int, is_causal: bool, wider: int = 0) -> "Segments":
        return cls(lengths, longest, pad(lengths.cumsum(0), (1, 0)).to(torch.int32), is_causal, wider)


@dataclass(frozen=True)
class Packing:
    """How a backbone with this kernel is called."""

    is_causal: bool
    wider: int
    takes_cache: bool  # of keys and values
    padding_id: int | None  # where positions begin behind it, and tokens that are it are not counted

    @classmethod
    def of(cls, config: Any, is_causal: bool) -> "Packing":
        by_config = getattr(config, "is_causal", True) is False  # where transformers makes windows one token wider
        padding_id = config.pad_token_id if config.model_type in _COUNT_FROM_PADDING else None
        return cls(is_causal, int(by_config), config.model_type in _DECODERS, padding_id)

    def arguments(self, ids: Tensor, lengths: Tensor, longest: int) -> dict[str, Any]:
        """What the backbone is called with, for token ids (T,)."""
        segments = Segments.of(lengths, longest, self.is_causal, self.wider)
        given = {"input_ids": ids[None], "position_ids": self.positions(ids, lengths)[None], "segments": segments}
        return given | ({"use_cache": False} if self.takes_cache else {})

    def positions(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The position (T,) of each token in its own text, as the model counts them in a text alone."""
        if self.padding_id is None:
            counted = torch.ones_like(ids)
        else:
            counted = (ids != self.padding_id).to(ids.dtype)
        number = counted.cumsum(0)
        starts = lengths.cumsum(0) - lengths
        before = (number - counted)[starts]
        number = number - spread(before, lengths, len(ids))
        return number - 1 if self.padding_id is None else number * counted + self.padding_id


def use_varlen(config: Any) -> None:
    """Let models call this kernel by its name; UserError where those of this transformers config can't."""
    from transformers import AttentionInterface

    if reason := why_not_model(config, is_trained=False):
        raise UserError(f"--attn_implementation {VARLEN_KERNEL}: {reason}; leave it out")
    AttentionInterface.register(VARLEN_KERNEL, varlen_attention)  # without a function for masks, so that none are made


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention (1, T, H, d) of queries (1, H, T, d), keys and values (1, G, T, d), as transformers calls kernels.

    sliding_window: tokens that see each other are less than that apart.
    """
    refused = [name for name in ("softcap", "position_bias", "s_aux") if more.get(name) is not None]
    if refused or dropout > 0:
        raise UserError(
            f"--attn_implementation {VARLEN_KERNEL}: does not know {', '.join(refused) or 'dropout'}; leave it out"
        )
    if segments is None or attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__}: its model's code does not pass on where texts end")
    row = [part[0].transpose(0, 1) for part in (query, key, value)]
    window = None if sliding_window is None else sliding_window + segments.wider
    # In float32, which the operator does not know, only an adapter is merged on a GPU, and a few texts are compared.
    compute = by_text if query.device.type == "cpu" or query.dtype == torch.float32 else by_operator
    return compute(row[0], row[1], row[2], segments, window, scaling)[None], None


def by_operator(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None, scaling: float | None
) -> Tensor:
    """Attention (T, H, d) of queries (T, H, d), keys and values (T, G, d), by torch's operator."""
    from torch.nn.attention.varlen import varlen_attn

    back = -1 if window is None else window - 1  # tokens on that side that are seen, -1 for all
    bounds, longest = segments.bounds, segments.longest
    sides = (back, 0 if segments.is_causal else back)
    mixed: Any = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scaling, window_size=sides, enable_gqa=True
    )
    return mixed


def by_text(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, window: int | None, scaling: float | None
) -> Tensor:
    """The same, text by text; those of one length that stand together at once."""
    outputs, first = [], 0
    for length, same in groupby(segments.lengths.tolist()):
        number = len(list(same))
        last = first + number * length
        run = [part[first:last].unflatten(0, (number, length)).transpose(1, 2) for part in (query, key, value)]
        mask = None
        if window is not None and length > window:
            place = torch.arange(length, device=query.device)
            distance = place[:, None] - place[None, :]
            mask = (distance < window) & (distance >= 0 if segments.is_causal else distance > -window)
        options: dict[str, Any] = {
            "attn_mask": mask,
            "is_causal": segments.is_causal and mask is None,
            "scale": scaling,
        }
        mixed = scaled_dot_product_attention(run[0], run[1], run[2], **options, enable_gqa=True)
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))
        first = last
    return torch.cat(outputs)


def why_not_varlen(config: Any, asked: str | None, world: World, *, bf16: bool, is_trained: bool) -> str | None:
    """What speaks against this kernel for a model of a transformers config; None where it is to be taken.

    Taken by itself on GPUs alone. Every rank must call it, and it is taken by all or none. UserError where it was asked
    for and something speaks against it.
    """
    device = world.device
    if asked not in (None, VARLEN_KERNEL):
        return f"{asked} was asked for"
    if asked is None and device.type != "cuda":
        return "no GPU"
    reason = why_not_model(config, is_trained)
    if reason is None and device.type == "cuda":
        reason = why_not_gpu(config, bf16, torch.cuda.get_device_capability(device)) or _why_not_here(config, device)
        if world.max([float(reason is not None)])[0]:
            reason = reason or "can't be used on another rank's GPU"
    if reason is not None and asked is not None:
        raise UserError(f"--attn_implementation {VARLEN_KERNEL}: {reason}; leave it out")
    return reason


def describe_choice(kernel: str | None, against: str | None) -> str:
    """Which kernel was taken, and what spoke against this one, in a line."""
    if against is None:
        return f"{VARLEN_KERNEL}: texts stand one behind the other, without padding"
    return f"{kernel or 'of the model'}; not {VARLEN_KERNEL}: {against}"


def why_not_model(config: Any, is_trained: bool) -> str | None:
    """What of a model speaks against the kernel on any device."""
    if config.model_type not in FAMILIES or not takes_math_kernel(config) or getattr(config, "auto_map", None):
        own = ", with attention of its own" if config.model_type in FAMILIES else ""
        return f"not for this {config.model_type}{own}; it is for {', '.join(FAMILIES)}"
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        probability = getattr(config, name, None)
        if is_trained and probability:
            return f"has no dropout, and the model trains with {name} {probability} (0 in its config.json would train without)"
    return None


def why_not_gpu(config: Any, bf16: bool, capability: tuple[int, int] = CAPABILITY) -> str | None:
    """What of a GPU of this capability, or of the precision and head size there, speaks against the kernel."""
    head = _head_size(config)
    if not bf16:
        return "computes in bfloat16 on a GPU, and --bf16 is false"
    if capability < CAPABILITY:
        return f"is for GPUs of capability 8.0 (Ampere) and later, and this one has {'.'.join(map(str, capability))}"
    if head % _HEAD_UNIT or head > _LARGEST_HEAD:
        return (
            f"is for heads of a multiple of {_HEAD_UNIT} dimensions up to {_LARGEST_HEAD}, and the model's have {head}"
        )
    return None


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _why_not_here(config: Any, device: torch.device) -> str | None:
    """What trying the operator on this GPU shows, in the model's own shapes, with gradients."""
    heads, window = config.num_attention_heads, getattr(config, "sliding_window", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    try:
        errors = [
            kernel_error(device, heads, groups, _head_size(config), is_causal, width)
            for is_causal in (False, True)
            for width in (None, min(window or 16, 16))
        ]
    except RuntimeError as error:  # how torch says that a kernel is not built, or not for such a GPU
        return f"does not run on this GPU ({str(error).strip().splitlines()[0]})"
    worst = max(errors)  # NaN, where it comes first, compares as neither
    if all(error <= _LARGEST_ERROR for error in errors):
        return None
    return f"computes something else on this GPU than torch's plain attention (a relative difference of {worst:.2g})"


def kernel_error(
    device: torch.device,
    num_heads: int,
    num_groups: int,
    head_size: int,
    is_causal: bool,
    window: int | None,
    compute: Callable[..., Tensor] = by_operator,
) -> float:
    """The largest relative difference of outputs and gradients in bfloat16 to text by text in float32."""
    # Of less than one of the operator's blocks, and of several.
    lengths = torch.tensor([300, 70, 33, 33, 17, 1], device=device)
    segments, noise = Segments.of(lengths, 300, is_causal), torch.Generator().manual_seed(0)
    shapes = [(int(lengths.sum()), heads, head_size) for heads in (num_heads, num_groups, num_groups, num_heads)]
    *inputs, gradient = (torch.randn(shape, generator=noise).to(device, torch.bfloat16) for shape in shapes)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [part.to(dtype).requires_grad_() for part in inputs]
        with torch.enable_grad():
            mixed = function(*leaves, segments, window, head_size**-0.5)
        return [mixed.detach(), *torch.autograd.grad(mixed, leaves, gradient.to(dtype))]

    pairs = zip(results(compute, torch.bfloat16), results(by_text, torch.float32))
    return max(float((got.float() - wanted).norm() / wanted.norm()) for got, wanted in pairs)
