"""Scores of (query, document) pairs by a cross-encoder: a transformers sequence classifier with 1 or 2 labels.

Shapes: p pairs, S tokens of the longest pair of a micro-batch.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ds_embed.data.plan import cut_by_length
from ds_embed.job.ranks import World
from ds_embed.models.cpu import pack_linear_layers, use_kernels
from ds_embed.models.kinds import count_positions
from ds_embed.models.reranker import default_max_length, find_reranker, is_ours
from ds_embed.models.tokenizer import check_vocabulary
from ds_embed.settings.errors import UserError

logger = logging.getLogger(__name__)

# Tokenized together and cut into micro-batches: what a rank scores does not depend on how many there are.
_BLOCK_PAIRS = 512


class CrossEncoder:
    """A classifier that reads query and document together. Every rank holds it and scores a share of the pairs."""

    def __init__(
        self,
        world: World,
        name: str,
        *,
        flag: str = "cross_encoder",
        prefix: str = "cross_encoder_",
        max_length: int | None = None,
        bf16: bool = False,
        probability: bool = False,
        micro_batch_tokens: int = 16384,
    ):
        """A folder, a hub name, or a run of recipes/train_reranker.py. probability: scores through a sigmoid.

        UserError naming `flag`, or another that begins with `prefix`: no such model, no trained head, neither 1 nor 2
        labels, lengths that do not fit.
        """
        self._world, self._flag, self._prefix = world, flag, prefix
        self._probability = probability
        source = find_reranker(name, flag=flag)
        self._tokenizer, self._model = _load(source.base, bf16, flag)
        if hasattr(self._model, "score") and not is_ours(source):
            logger.warning(
                "warning: --%s %s: a decoder; query and document are put together without a template, so the scores are "
                "wrong if it was trained with one",
                flag,
                name,
            )
        self._model.to(world.device).eval().requires_grad_(False)
        use_kernels()
        pack_linear_layers(self._model)
        longest = count_positions(self._model)
        self._max_length = max_length or default_max_length(source, self._tokenizer, longest)
        if longest is not None and self._max_length > longest:
            raise UserError(f"--{prefix}max_length {max_length}: the model has positions for {longest} tokens")
        around = self._tokenizer.num_special_tokens_to_add(pair=True)
        if self._max_length < around + 2:
            raise UserError(
                f"--{prefix}max_length {self._max_length}: leaves no room beside the {around} tokens around a pair"
            )
        self._budget = micro_batch_tokens
        if self._max_length > self._budget:
            raise UserError(
                f"--micro_batch_tokens {self._budget}: smaller than a pair of {self._max_length} tokens; raise it or "
                f"lower --{prefix}max_length"
            )

    def score(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Scores (p,) float32 of pairs, on every rank, the same bits for any number of ranks."""
        blocks = [range(start, min(start + _BLOCK_PAIRS, len(pairs))) for start in range(0, len(pairs), _BLOCK_PAIRS)]

        def scores_of(number: int | None) -> torch.Tensor:
            if number is None:
                return torch.empty(0, device=self._world.device)
            return self._score_block([pairs[i] for i in blocks[number]])

        shared = self._world.rows_in_turn(list(map(len, blocks)), scores_of)
        scores = np.concatenate([np.empty(0, np.float32), *shared])
        if not np.isfinite(scores).all():
            bad = int(np.argmin(np.isfinite(scores)))
            what = f"the score of '{pairs[bad][0][:60]}' is {scores[bad]}"
            raise UserError(f"--{self._flag}: {what}; try --{self._prefix}bf16 false, or another model")
        return scores

    def _score_block(self, uses: list[tuple[str, str]]) -> torch.Tensor:
        """Scores (p,) of pairs; each pair is read once, however often it stands there."""
        place = {pair: number for number, pair in enumerate(dict.fromkeys(uses))}
        pairs = list(place)
        encoded = self._tokenizer(
            [query for query, _ in pairs],
            [document for _, document in pairs],
            truncation="longest_first",
            max_length=self._max_length,
        )
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        scores = torch.empty(len(pairs), device=self._world.device)
        for batch in cut_by_length(lengths, self._budget):
            chosen = {name: [values[i] for i in batch] for name, values in encoded.items()}
            inputs = self._tokenizer.pad(chosen, return_tensors="pt").to(self._world.device)
            with torch.inference_mode():
                logits = self._model(**inputs).logits.float()
            first = logits[:, 0] if logits.shape[1] == 2 else 0
            scores[torch.from_numpy(batch).to(scores.device)] = logits[:, -1] - first
        scores = scores[[place[pair] for pair in uses]]
        return scores.sigmoid() if self._probability else scores


def _load(name: str, bf16: bool, flag: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=torch.bfloat16 if bf16 else torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"--{flag} {name}: cannot be loaded as a sequence classifier: {first}") from None
    check_vocabulary(tokenizer, flag, name)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"--{flag} {name}: has no trained classifier (no weights {missing}); choose a reranker")
    if model.config.num_labels not in (1, 2):
        raise UserError(f"--{flag} {name}: has {model.config.num_labels} labels; choose a model with 1 or 2")
    if tokenizer.pad_token_id is None:
        raise UserError(f"--{flag} {name}: its tokenizer has no pad token, which batches of pairs need")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders find the last token by it
    return tokenizer, model
