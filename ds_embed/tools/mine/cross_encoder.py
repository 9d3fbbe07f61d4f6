"""Scores of (query, document) pairs by a cross-encoder: a transformers sequence classifier with 1 or 2 labels.

Shapes: p pairs, S tokens of the longest pair of a micro-batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ds_embed.data.plan import cut_by_length
from ds_embed.job.ranks import World
from ds_embed.models.cpu import pack_linear_layers, use_cpu_kernels
from ds_embed.models.kinds import count_positions
from ds_embed.settings.errors import UserError
from ds_embed.settings.mining_arguments import MiningArguments
from ds_embed.tools.mine.catalog import Catalog

# Tokenized together and cut into micro-batches: what a rank scores does not depend on how many there are.
_BLOCK_PAIRS = 512
_DEFAULT_MAX_LENGTH = 512


class CrossEncoder:
    """A classifier that reads query and document together. Every rank holds it and scores a share of the pairs."""

    def __init__(self, world: World, arguments: MiningArguments):
        """UserError: no such model, no trained head, neither 1 nor 2 labels, lengths that do not fit."""
        self._world = world
        self._probability = arguments.cross_encoder_scores == "probability"
        self._tokenizer, self._model = _load(arguments.cross_encoder, arguments.cross_encoder_bf16)
        self._model.to(world.device).eval().requires_grad_(False)
        use_cpu_kernels()
        pack_linear_layers(self._model)
        longest = count_positions(self._model)
        wanted = arguments.cross_encoder_max_length
        self._max_length = min(_DEFAULT_MAX_LENGTH, longest or _DEFAULT_MAX_LENGTH) if wanted is None else wanted
        if longest is not None and self._max_length > longest:
            raise UserError(f"--cross_encoder_max_length {wanted}: the model has positions for {longest} tokens")
        self._budget = arguments.micro_batch_tokens
        if self._max_length > self._budget:
            raise UserError(
                f"--micro_batch_tokens {self._budget}: smaller than a pair of {self._max_length} tokens; raise it or "
                "lower --cross_encoder_max_length"
            )

    def score(self, catalog: Catalog, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """Scores (p,) float32 of pairs of rows, on every rank, the same bits for any number of ranks."""
        blocks = [
            range(start, min(start + _BLOCK_PAIRS, len(queries))) for start in range(0, len(queries), _BLOCK_PAIRS)
        ]
        shares = [blocks[rank :: self._world.size] for rank in range(self._world.size)]
        own = [torch.empty(0, device=self._world.device)]
        for block in shares[self._world.rank]:
            pairs = [(catalog.queries[queries[i]], catalog.documents[documents[i]]) for i in block]
            own.append(self._score_block(pairs))
        counts = [sum(map(len, share)) for share in shares]
        gathered = self._world.all_gather_rows(torch.cat(own), counts).cpu().numpy()
        scores = np.empty(len(queries), dtype=np.float32)
        scores[[i for share in shares for block in share for i in block]] = gathered
        if not np.isfinite(scores).all():
            bad = int(np.argmin(np.isfinite(scores)))
            raise UserError(
                f"--cross_encoder: the score of '{catalog.queries[queries[bad]][:60]}' is {scores[bad]}; "
                "try --cross_encoder_bf16 false, or another model"
            )
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
            scores[torch.from_numpy(batch).to(scores.device)] = logits[:, -1] - (
                logits[:, 0] if logits.shape[1] == 2 else 0
            )
        scores = scores[[place[pair] for pair in uses]]
        return scores.sigmoid() if self._probability else scores


def _load(name: str, bf16: bool) -> tuple[Any, Any]:
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
        raise UserError(f"--cross_encoder {name}: cannot be loaded as a sequence classifier: {first}") from None
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"--cross_encoder {name}: has no trained classifier (no weights {missing}); choose a reranker")
    if model.config.num_labels not in (1, 2):
        raise UserError(f"--cross_encoder {name}: has {model.config.num_labels} labels; choose a model with 1 or 2")
    if tokenizer.pad_token_id is None:
        raise UserError(f"--cross_encoder {name}: its tokenizer has no pad token, which batches of pairs need")
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # decoders find the last token by it
    return tokenizer, model
