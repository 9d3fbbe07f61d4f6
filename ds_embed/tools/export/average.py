"""The mean of runs of one base, weight by weight (Wortsman et al. 2022), adapters merged in, in float32."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_embed.models.loading import ModelSource
from ds_embed.settings.errors import UserError
from ds_embed.vectors.embedder import Embedder

# Of a card: what decides no vector, or what training alone knew.
_FREE = {"base_model", "consumed_samples", "temperature", "similarity", "prompts"}


def shares_of(weights: Sequence[float], num_runs: int) -> list[float]:
    """What each run counts, 1 in all. UserError unless there is a weight for each, with a positive sum."""
    if not weights:
        return [1 / num_runs] * num_runs
    shown = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != num_runs:
        raise UserError(f"--weights {shown}: {len(weights)} for {num_runs} runs of --average; give one for each")
    if not all(map(math.isfinite, weights)) or sum(weights) <= 0:
        raise UserError(f"--weights {shown}: their sum must be above 0, since the mean divides by it")
    return [weight / sum(weights) for weight in weights]


def check_alike(names: Sequence[str], sources: Sequence[ModelSource]) -> None:
    """UserError naming the run and what it has otherwise, unless all come from one base and make vectors in one way."""
    first = _traits(sources[0])
    for name, source in zip(names[1:], sources[1:]):
        for trait, value in _traits(source).items():
            if value != first[trait]:
                raise UserError(
                    f"--average {name}: its {trait} is {value!r}, and that of {names[0]} is {first[trait]!r}; only runs of "
                    "one base that make vectors in one way have a mean"
                )


def average(
    names: Sequence[str],
    sources: Sequence[ModelSource],
    shares: Sequence[float],
    load: Callable[[ModelSource], Embedder],
) -> Embedder:
    """The first run with the mean of all, in float32. UserError when weights don't fit."""

    def whole(source: ModelSource) -> Embedder:
        run = load(source)
        if source.is_adapted:
            run.encoder.backbone = run.encoder.backbone.merge_and_unload(safe_merge=True)
        return run

    mean = whole(sources[0])
    tensors = dict(mean.encoder.named_parameters())
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.mul_(shares[0])
        for number in range(1, len(names)):
            other = whole(sources[number])
            found = dict(other.encoder.named_parameters())
            shapes, known = ({name: tuple(t.shape) for name, t in table.items()} for table in (found, tensors))
            odd = sorted(name for name in shapes.keys() | known.keys() if shapes.get(name) != known.get(name))
            if odd or other.tokenizer.get_vocab() != mean.tokenizer.get_vocab():
                what = (
                    f"{odd[0]} is {shapes.get(odd[0])} there and {known.get(odd[0])}"
                    if odd
                    else "the vocabulary differs from that"
                )
                raise UserError(f"--average {names[number]}: {what} in {names[0]}; only runs of one base have a mean")
            for name, tensor in tensors.items():
                tensor.add_(found[name], alpha=shares[number])
    return mean


def _traits(source: ModelSource) -> dict[str, Any]:
    card = {name: value for name, value in source.card.content.items() if name not in _FREE}
    card["head"] = [{k: v for k, v in layer.items() if k != "path"} for layer in card["head"]]
    base = source.base if source.is_adapted else source.card.base_model
    return {"base": str(Path(base).resolve()) if Path(base).exists() else base, **card}
