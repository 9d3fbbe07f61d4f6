"""Texts in, vectors out: the module that DeepSpeed trains.

A learned temperature is trained with it: as log(initial temperature / temperature), which starts at zero, where
bfloat16 is finest. The logarithm makes steps relative (Radford et al. 2021, sec. 2.5).

Shapes: B texts, S tokens (right-padded; packed, of all texts one behind the other), D dimensions.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ds_embed.models.attention import Attention, CausalAttention
from ds_embed.models.kinds import probe_texts, sees_behind
from ds_embed.models.pooling import NORMALIZE, Normalize, build_head, pool, pool_packed
from ds_embed.models.varlen import VARLEN_KERNEL, Packing
from ds_embed.settings.step_arguments import MIN_LEARNED_TEMPERATURE

LOG_SCALE_CHANGE = "log_scale_change"  # the parameter's name in the encoder
PROJECTION = "projection.weight"  # likewise, of a linear map to a teacher's dimensions


class TextEncoder(nn.Module):
    """A Hugging Face backbone (bare, or wrapped by PEFT), pooling, and what comes behind it."""

    backbone: Any

    def __init__(
        self,
        backbone: nn.Module,
        pooling: str,
        attention: Attention,
        check_attention: bool = True,
        head: nn.Sequential | None = None,
    ):
        """check_attention: see _check_attention; tensors without data can't be compared. head: default L2 normalisation."""
        super().__init__()
        self.backbone = backbone
        self.head = build_head([NORMALIZE]) if head is None else head
        self.pooling = pooling
        self.attention = attention
        config: Any = backbone.config
        is_causal = isinstance(attention, CausalAttention)
        self.packing = Packing.of(config, is_causal) if config._attn_implementation == VARLEN_KERNEL else None
        self._attention_is_checked = not check_attention
        self.register_parameter(LOG_SCALE_CHANGE, None)
        self.projection: nn.Linear | None = None
        self.initial_lora: dict[str, Tensor] = {}  # by name, where the base model gave up what these matrices hold

    @property
    def is_packed(self) -> bool:
        """Whether it reads texts in one row, without padding."""
        return self.packing is not None

    def learn_temperature(self) -> None:
        """Add the parameter of a learned temperature; forward then returns its value (1,) beside the vectors."""
        self.log_scale_change = nn.Parameter(torch.zeros(1))

    def learn_projection(self, num_dims: int, teacher_dims: int, seed: int) -> None:
        """Add a linear map to F dimensions; forward in training then returns (B, D + F), its output behind the vectors."""
        projection = nn.Linear(num_dims, teacher_dims, bias=False)
        nn.init.orthogonal_(projection.weight, generator=torch.Generator().manual_seed(seed))
        # ZeRO-3 wants one type of all weights of a group.
        self.projection = projection.to(next(self.backbone.parameters()).dtype)

    def make_unit_vectors(self) -> None:
        """For training, which compares by cosine: normalise also what the model itself leaves as long as it is."""
        if not (len(self.head) and isinstance(self.head[-1], Normalize)):
            self.head.append(Normalize())

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        has_padding: bool = True,
        prompt_lengths: Tensor | None = None,
        longest: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Vectors (B, D) in float32 of token ids (B, S), right-padded, or packed (S,), of `lengths` (B,).

        has_padding: False promises that every text has S tokens, which saves the attention mask.
        prompt_lengths (B,): leading tokens that the pooling leaves out; None where it takes all.
        longest: tokens of the longest text, where they are packed.
        """
        if not self._attention_is_checked:  # the first forward pass
            self._check_attention(input_ids)
        states = self._states(input_ids, lengths, has_padding, longest)
        pooled = (pool_packed if self.is_packed else pool)(states, lengths, self.pooling, prompt_lengths)
        vectors = self.head(pooled)
        if self.projection is not None and self.training:
            projected = self.projection(vectors.to(self.projection.weight.dtype))
            vectors = torch.cat([vectors, projected.float()], 1)
        if self.log_scale_change is None:
            return vectors
        # A product, since under ZeRO-3 the parameter itself is empty again after the forward pass.
        return vectors, self.log_scale_change.float() * 1.0

    def _states(self, input_ids: Tensor, lengths: Tensor, has_padding: bool, longest: int) -> Tensor:
        """(B, S, D), or packed (S, D)."""
        if self.packing is not None:
            return self.backbone(**self.packing.arguments(input_ids, lengths, longest)).last_hidden_state[0]
        dtype = next(self.backbone.parameters()).dtype
        arguments = self.attention.arguments(lengths, input_ids.shape[1], has_padding, dtype)
        return self.backbone(input_ids=input_ids, **arguments).last_hidden_state

    @torch.no_grad()
    def _check_attention(self, like: Tensor) -> None:
        """See once, on the real weights, that tokens depend on those behind them just when they should.

        It runs within the first forward pass, on whatever device and under whatever partitioning that has,
        and draws no random numbers. A RuntimeError would mean that the model's code does not do as it is told.
        """
        self._attention_is_checked = True
        was_training = self.backbone.training
        self.backbone.eval()
        ids = probe_texts(self.backbone.config).to(like.device)
        lengths = torch.full((len(ids),), ids.shape[1], device=like.device)
        states = self._states(ids.flatten() if self.is_packed else ids, lengths, False, ids.shape[1])
        is_bidirectional = sees_behind(states.view(*ids.shape, -1))
        self.backbone.train(was_training)
        is_causal = isinstance(self.attention, CausalAttention)
        # Weights that are NaN show nothing, and whoever uses the vectors will notice.
        if is_bidirectional is not None and is_bidirectional == is_causal:
            found, wanted = ("bidirectional", "causal") if is_causal else ("causal", "bidirectional")
            raise RuntimeError(
                f"{type(self.backbone).__name__}: its attention is {found} and should be {wanted}; "
                "another --attn_implementation may do"
            )


def learned_temperature(initial: float, log_scale_change: Tensor) -> Tensor:
    """The temperature (), in float64, that a value () of the parameter stands for."""
    return (initial * torch.exp(-log_scale_change.double())).clamp_min(MIN_LEARNED_TEMPERATURE)
