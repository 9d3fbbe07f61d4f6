"""Measures a model's cost by running its own forward and backward code on tensors with shapes but no data.

So no formula is needed for architectures, attention kernels, LoRA or checkpointing. The tensors claim to be on a CPU,
where attention can be called without a GPU; its fused kernel saves the same tensors for the backward pass as the GPU's.

Shapes: B texts, S tokens of the longest text.
"""

import warnings
import weakref
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from ds_embed.models.card import EmbeddingCard
from ds_embed.models.cpu import training_kernel, use_cpu_dropout
from ds_embed.models.encoder import TextEncoder
from ds_embed.models.loading import build_encoder
from ds_embed.models.lora import add_lora
from ds_embed.models.varlen import VARLEN_KERNEL
from ds_embed.settings import LoraArguments, ModelArguments, StepArguments

# Attention on CPU tensors, which torch's registry of FLOPs lacks.
flop_registry.setdefault(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    shape_wrapper(lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)),
)
flop_registry.setdefault(
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    shape_wrapper(lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)),
)


@dataclass(frozen=True)
class Pass:
    """Cost of a micro-batch's forward and backward, without weights and their gradients; a multiply-add is 2 FLOPs."""

    kept_bytes: float  # live after the forward pass, for the backward pass
    peak_bytes: float  # during both passes
    forward_flops: float
    flops: float  # of both passes


@dataclass(frozen=True)
class ModelCost:
    """A model's parameters, and the cost of micro-batches of texts of equal length."""

    trained: tuple[int, ...]  # elements of each trained parameter
    frozen: tuple[int, ...]  # elements of each other parameter
    in_4bit: tuple[int, ...]  # the elements of `frozen` that are stored in 4 bits
    buffer_bytes: int
    num_dims: int
    num_tokens: int  # S
    one: Pass  # 1 text of S tokens
    two: Pass  # 2 texts of S tokens
    short: Pass  # 1 text of S / 2 tokens

    @property
    def num_trained(self) -> int:
        return sum(self.trained)

    @property
    def num_all(self) -> int:
        return sum(self.trained) + sum(self.frozen)

    def of_tokens(self, part: str, num_tokens: float) -> float:
        """Bytes of `part` of a Pass for a micro-batch of num_tokens, in texts of S tokens; linear in num_tokens."""
        one, two = getattr(self.one, part), getattr(self.two, part)
        return max(0.0, one + (two - one) * (num_tokens / self.num_tokens - 1))

    def flops(self, part: str, length: Any) -> Any:
        """FLOPs of one text of `length` tokens, or of each of (n,): a linear term and a quadratic one, for attention."""
        half, long = self.num_tokens / 2, float(self.num_tokens)
        at_half, at_long = getattr(self.short, part), getattr(self.one, part)
        quadratic = max(0.0, (at_long - 2 * at_half) / (long**2 - 2 * half**2))
        return (at_long / long - quadratic * long) * length + quadratic * length**2


def measure_model(
    config: Any,
    card: EmbeddingCard,
    model: ModelArguments,
    lora: LoraArguments,
    step: StepArguments,
    *,
    bf16: bool,
    num_tokens: int,
    on_gpu: bool,
) -> ModelCost:
    """Measure the model of a transformers `config`, with texts of at most num_tokens tokens.

    UserError if it lacks the modules for LoRA or the attention kernel.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    num_tokens = max(2, num_tokens - num_tokens % 2)
    # Texts in one row cost what the same tokens do in torch's own fused attention.
    asked = None if model.attn_implementation == VARLEN_KERNEL else model.attn_implementation
    with torch.device("meta"):
        encoder = build_encoder(
            config,
            **card.encoding,
            bf16=bf16,
            attn_implementation=training_kernel(config, asked, "cuda" if on_gpu else "cpu"),
            trust_remote_code=model.trust_remote_code,
        )
        encoder.make_unit_vectors()
        if step.gradient_checkpointing:
            # Without data there is no random state to preserve.
            settings = {"use_reentrant": False, "preserve_rng_state": False}
            backbone: Any = encoder.backbone
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        if lora.lora_rank:
            add_lora(encoder, lora, seed=0, dtype=torch.bfloat16 if bf16 else torch.float32)
        if step.learnable_temperature:
            encoder.learn_temperature()
    layers = (layer for layer in encoder.backbone.modules() if isinstance(layer, torch.nn.Linear))
    linear = [layer.weight.numel() for layer in layers if not layer.weight.requires_grad]
    if not on_gpu:
        use_cpu_dropout(encoder)
    # transformers would read from the positions whether a row holds several texts. Here they have no values, so it
    # would make a mask, and attention with a mask saves more for the backward pass.
    one_text_a_row = patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None)
    with FakeTensorMode(allow_non_fake_inputs=True), one_text_a_row, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kernels and checkpointing warn about missing data
        encoder.train().to_empty(device="cpu")
        parameters = list(encoder.parameters())
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        passes = [measure_pass(encoder, *shape) for shape in ((1, num_tokens), (2, num_tokens), (1, num_tokens // 2))]
    return ModelCost(
        tuple(p.numel() for p in parameters if p.requires_grad),
        tuple(p.numel() for p in parameters if not p.requires_grad),
        tuple(n for n in linear if model.load_in_4bit is not None),
        sum(b.numel() * b.element_size() for b in encoder.buffers()),
        card.dimensions(config.get_text_config().hidden_size),
        num_tokens,
        *passes,
    )


def measure_pass(encoder: TextEncoder, num_texts: int, num_tokens: int) -> Pass:
    """Run forward and backward on B texts of S tokens, with whatever kind of tensors the encoder has."""
    ids = torch.zeros(num_texts, num_tokens, dtype=torch.long)
    lengths = torch.full((num_texts,), num_tokens)
    with Tally([*encoder.parameters(), *encoder.buffers(), ids, lengths]) as tally:
        outputs = encoder(ids, lengths, True)
        kept_bytes, forward_flops = tally.live_bytes, tally.flops
        vectors = outputs[0] if isinstance(outputs, tuple) else outputs
        (vectors * vectors.detach()).sum().backward()
    return Pass(kept_bytes, tally.peak_bytes, forward_flops, tally.flops)


class Tally(TorchDispatchMode):
    """Counts the FLOPs of operations inside it, and the current and peak bytes of the storages that they allocate.

    Storages of `known` tensors don't count. (torch's own FLOP counter is not used: it keeps modules' outputs alive.)
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.live_bytes = self.peak_bytes = self.flops = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.live_bytes -= num_bytes
