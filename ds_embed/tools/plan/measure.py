"""What a model takes, from its config alone: its own code runs on tensors that have shapes and no data.

So parameters, activations and FLOPs are counted, not estimated, for any architecture, attention kernel, LoRA
and activation checkpointing. What a kernel takes inside itself is not seen.

Shapes: B texts, S tokens.
"""

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ds_embed.models.card import EmbeddingCard
from ds_embed.models.cpu import training_kernel, use_cpu_dropout
from ds_embed.models.encoder import TextEncoder
from ds_embed.models.loading import build_encoder
from ds_embed.models.lora import add_lora
from ds_embed.settings import LoraArguments, ModelArguments

# Attention on tensors that say they are on a CPU, which torch's registry of FLOPs lacks: where the queries stand among
# the arguments. Two matrix products forward, and five backward, which computes the scores again.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 0,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 1,
}


@dataclass(frozen=True)
class Parameters:
    """Number of elements of each parameter."""

    trained: tuple[int, ...]
    frozen: tuple[int, ...]
    buffer_bytes: int

    @property
    def num_trained(self) -> int:
        return sum(self.trained)

    @property
    def num_frozen(self) -> int:
        return sum(self.frozen)

    @property
    def num_all(self) -> int:
        return self.num_trained + self.num_frozen

    @property
    def largest(self) -> int:
        return max(self.trained + self.frozen)


@dataclass(frozen=True)
class Pass:
    """Forward and backward of one micro-batch, without weights and their gradients; FLOPs count a multiply-add as 2."""

    kept_bytes: float  # live after the forward pass, for the backward pass
    peak_bytes: float  # at any moment of both
    forward_flops: float
    flops: float  # of both


@dataclass(frozen=True)
class ModelCost:
    """A model's parameters and what micro-batches of one length cost it."""

    parameters: Parameters
    num_dims: int
    num_tokens: int  # S: the longest text
    one: Pass  # of 1 text of S tokens
    two: Pass  # of 2
    short: Pass  # of 1 text of half as many

    def of_tokens(self, part: str, num_tokens: float) -> float:
        """Bytes of `part` of a Pass for a micro-batch of texts of S tokens each, linear in their number."""
        one, two = getattr(self.one, part), getattr(self.two, part)
        return max(0.0, one + (two - one) * (num_tokens / self.num_tokens - 1))

    def flops(self, part: str, length: float) -> float:
        """FLOPs of one text of `length` tokens: one term linear in it and one of attention, quadratic."""
        half, long = self.num_tokens / 2, float(self.num_tokens)
        at_half, at_long = getattr(self.short, part), getattr(self.one, part)
        quadratic = max(0.0, (at_long - 2 * at_half) / (long**2 - 2 * half**2))
        return (at_long / long - quadratic * long) * length + quadratic * length**2


def measure_model(
    config: Any,
    card: EmbeddingCard,
    model: ModelArguments,
    lora: LoraArguments,
    *,
    bf16: bool,
    gradient_checkpointing: bool,
    learnable_temperature: bool,
    num_tokens: int,
    on_gpu: bool,
) -> ModelCost:
    """Count what the model of a transformers `config` takes, with texts of at most num_tokens tokens.

    UserError when it has no module that LoRA asks for, or not the attention kernel.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    num_tokens = max(2, num_tokens - num_tokens % 2)
    with torch.device("meta"):
        encoder = build_encoder(
            config,
            pooling=card.pooling,
            bidirectional=card.bidirectional,
            bf16=bf16,
            attn_implementation=training_kernel(config, model.attn_implementation, "cuda" if on_gpu else "cpu"),
            trust_remote_code=model.trust_remote_code,
        )
        if gradient_checkpointing:
            # There is no random state to keep where there are no numbers.
            settings = {"use_reentrant": False, "preserve_rng_state": False}
            encoder.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        if lora.lora_rank:
            add_lora(encoder, lora, seed=0, dtype=torch.bfloat16 if bf16 else torch.float32)
        if learnable_temperature:
            encoder.learn_temperature()
    if not on_gpu:
        use_cpu_dropout(encoder)
    encoder.train()
    with FakeTensorMode(allow_non_fake_inputs=True), _one_text_a_row(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels and checkpoints that miss their data
        _without_data(encoder)
        shapes = {"one": (1, num_tokens), "two": (2, num_tokens), "short": (1, num_tokens // 2)}
        passes = {name: measure_pass(encoder, *shape) for name, shape in shapes.items()}
    parameters = list(encoder.parameters())
    return ModelCost(
        parameters=Parameters(
            trained=tuple(p.numel() for p in parameters if p.requires_grad),
            frozen=tuple(p.numel() for p in parameters if not p.requires_grad),
            buffer_bytes=sum(b.numel() * b.element_size() for b in encoder.buffers()),
        ),
        num_dims=config.get_text_config().hidden_size,
        num_tokens=num_tokens,
        **passes,
    )


def measure_pass(encoder: TextEncoder, num_texts: int, num_tokens: int) -> Pass:
    """Forward and backward of B texts of S tokens, with whatever tensors the encoder has."""
    ids = torch.zeros(num_texts, num_tokens, dtype=torch.long)
    lengths = torch.full((num_texts,), num_tokens)
    with Tally([*encoder.parameters(), *encoder.buffers(), ids, lengths]) as tally:
        outputs = encoder(ids, lengths, True)
        kept_bytes, forward_flops = tally.live_bytes, tally.flops
        vectors = outputs[0] if isinstance(outputs, tuple) else outputs
        (vectors * vectors.detach()).sum().backward()
    return Pass(kept_bytes, tally.peak_bytes, forward_flops, tally.flops)


@contextlib.contextmanager
def _one_text_a_row() -> Iterator[None]:
    """Tell transformers that no row holds several texts, which it would otherwise read from positions without values.

    Not knowing, it makes a mask, and attention with a mask keeps more for the backward pass.
    """
    from transformers import masking_utils

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original


def _without_data(encoder: TextEncoder) -> None:
    """Put tensors that have a shape and no data in place of the meta ones; gradients are dropped where they arise."""
    made: dict[torch.Tensor, torch.Tensor] = {}  # a tied weight stays one
    for module in encoder.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                made[parameter] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
                if parameter.requires_grad:
                    made[parameter].register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            module._parameters[name] = made[parameter]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class Tally(TorchDispatchMode):
    """Counts what operations inside do: bytes of the storages that they made, now and at their peak, and FLOPs.

    The storages of `known` tensors don't count. (torch's own FLOP counter keeps the modules' outputs alive.)
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.live_bytes = self.peak_bytes = self.flops = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        operation = function._overloadpacket
        if operation in _CPU_ATTENTION:
            queries, keys = args[_CPU_ATTENTION[operation]], args[_CPU_ATTENTION[operation] + 1]
            products = 2 if operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu else 5
            self.flops += products * 2 * queries.numel() * keys.shape[-2]
        elif operation in flop_registry:
            self.flops += flop_registry[operation](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._seen.discard(key)
        self.live_bytes -= num_bytes
