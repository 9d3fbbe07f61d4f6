"""The inputs of a step, on the rank's device. They are prepared while the previous step is being computed.

Shapes: U distinct texts of the global batch, T uses of them, b texts of a micro-batch, S tokens, M documents.
A packed micro-batch is a row of the S tokens of all its texts.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_embed.data.batch import GlobalBatch
from ds_embed.data.order import key_of
from ds_embed.data.plan import Plan, plan_micro_batches
from ds_embed.job.ranks import World
from ds_embed.training.stored_vectors import StoredVectors


@dataclass(frozen=True)
class MicroBatch:
    """The texts of one forward pass."""

    ids: Tensor  # (b, S); packed, (S,)
    lengths: Tensor  # (b,)
    has_padding: bool
    num_texts: int  # 0: the text is a dummy, so that all ranks make equally many passes
    noise_seed: int  # for dropout
    prompt_lengths: Tensor | None  # (b,) leading tokens that the pooling leaves out; None if there are none
    longest: int | None  # tokens of the longest text; None if they are not packed

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the model."""
        padded = self.ids, self.lengths, self.has_padding, self.prompt_lengths
        return padded if self.longest is None else (*padded, self.longest)


@dataclass(frozen=True)
class StepInputs:
    """A global batch and this rank's share of its texts."""

    batch: GlobalBatch
    plan: Plan
    micro_batches: list[MicroBatch]  # this rank's
    rank_order: Tensor  # (U,) texts in the order of the ranks that hold them
    rows: Tensor | None  # (T,) the text of each use; None if U is T
    document_keys: Tensor  # (M, J)
    own_negatives: Tensor  # (N, K)
    positive_pairs: Tensor  # (P, 2)
    teacher_scores: Tensor  # (M,)
    pair_scores: Tensor  # (P,)
    guide: Tensor | None = None  # (T, E) vectors of another model, which tell what is no negative
    teacher: Tensor | None = None  # (T, F) vectors of a model to learn from


def prepare_inputs(
    batch: GlobalBatch,
    collate: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]],
    world: World,
    micro_batch_tokens: int,
    seed: int,
    vectors: Mapping[str, StoredVectors] = MappingProxyType({}),
    is_packed: bool = False,
) -> StepInputs:
    """Plan the batch, and put this rank's share on its device. It enters no collective, since it runs in a thread.

    collate returns token ids (b, S) or packed (S,), lengths (b,) and prompt lengths (b,) for some of batch.texts.
    vectors: those of "guide" and "teacher".
    """
    is_cuda = world.device.type == "cuda"

    def put(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(world.device, non_blocking=True) if is_cuda else tensor.to(world.device)

    def micro_batch(number: int, chosen: np.ndarray) -> MicroBatch:
        ids, lengths, prompts = collate(batch.texts[chosen])
        # Dropout is a pure function of (seed, step, rank, micro-batch): the second pass of grad_cache draws the same
        # masks as the first, and a resumed run those that the interrupted one would have drawn.
        noise_seed = int(key_of(seed, batch.first_sample, world.rank, number)) % 2**63
        left_out = None if prompts is None else put(prompts)
        longest = int(lengths.max())
        has_padding = not is_packed and bool(lengths.min() < longest)
        packed = longest if is_packed else None
        return MicroBatch(put(ids), put(lengths), has_padding, len(chosen), noise_seed, left_out, packed)

    # In a new thread the current device is GPU 0, whichever GPU is this rank's.
    with torch.cuda.device(world.device) if is_cuda else contextlib.nullcontext():
        plan = plan_micro_batches(batch.lengths, micro_batch_tokens, world.size, is_packed)
        return StepInputs(
            batch,
            plan,
            [micro_batch(number, chosen) for number, chosen in enumerate(plan.micro_batches[world.rank])],
            put(plan.rank_order()),
            put(batch.rows) if len(batch.pair_scores) or len(batch.rows) > len(batch.texts) else None,
            put(batch.document_keys),
            put(batch.own_negatives),
            put(batch.positive_pairs),
            put(batch.teacher_scores),
            put(batch.pair_scores),
            **{name: put(stored.of(batch)) for name, stored in vectors.items()},
        )
