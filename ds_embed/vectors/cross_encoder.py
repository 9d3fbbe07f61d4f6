"""Scores of (query, document) pairs by a cross-encoder: a transformers sequence classifier with 1 or 2 labels.

Shapes: p pairs, S tokens of the longest pair of a micro-batch.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ds_embed.data.plan import cut_by_length
from ds_embed.data.tokenize import put_into_lower_case
from ds_embed.job.ranks import World
from ds_embed.models.cpu import pack_linear_layers, use_kernels
from ds_embed.models.kinds import blaming_files, count_positions
from ds_embed.models.loading import ModelSource, check_weights, without_foreign_code, without_reports
from ds_embed.models.reranker import (
    DEFAULT_TEMPLATE,
    choose_pairs,
    default_max_length,
    find_reranker,
    is_ours,
    pair_tokenizer,
)
from ds_embed.models.sentence_transformers import ModelFiles, read_pair_files
from ds_embed.models.tokenizer import check_vocabulary
from ds_embed.settings.data_arguments import unescape
from ds_embed.settings.errors import UserError

logger = logging.getLogger(__name__)

# Tokenized together and cut into micro-batches: what a rank scores does not depend on how many there are.
_BLOCK_PAIRS = 512
_EXAMPLE = f"'{json.dumps(DEFAULT_TEMPLATE)[1:-1]}'"


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
        template: str | None = None,
        bf16: bool = False,
        probability: bool = False,
        micro_batch_tokens: int = 16384,
    ):
        """A folder, a hub name, or a run of recipes/train_reranker.py. probability: scores through a sigmoid.

        template: text around query and document, in place of what the model's own files say.
        UserError naming `flag`, or another that begins with `prefix`: no such model, no trained head, neither 1 nor 2
        labels, lengths that do not fit, or a decoder of which nothing says how it reads a pair.
        """
        self._world, self._flag, self._prefix = world, flag, prefix
        self._probability = probability
        source = find_reranker(name, flag=flag)
        self._tokenizer, self._model = _load(source, bf16, flag)
        longest, ours = count_positions(self._model), is_ours(source)
        if max_length is not None and longest is not None and max_length > longest:
            raise UserError(f"--{prefix}max_length {max_length}: the model has positions for {longest} tokens")
        files = ModelFiles(source.base, source.revision)
        own = read_pair_files(files, self._model.config, self._tokenizer.chat_template)
        length = own.max_length or default_max_length(source, self._tokenizer, longest)
        self._max_length = max_length or min(length, longest or length)
        self._prompt, self._chat = own.prompt, own.chat
        if own.lower_case:
            put_into_lower_case(self._tokenizer)
        around = 0
        if template is not None:
            if ours:
                raise UserError(
                    f"--{prefix}template {template}: the tokenizer of {name} brings its own; leave the flag out"
                )
            self._prompt, self._chat = "", None
            card = choose_pairs(source, unescape(template), self._tokenizer, self._max_length, self._model, prefix)
            self._tokenizer = pair_tokenizer(self._tokenizer, card)
        elif self._chat is not None:
            self._check_chat()
            around = len(self._tail)
        elif hasattr(self._model, "score") and not ours:
            raise UserError(
                f"--{flag} {name}: a decoder, and no chat template says how it reads query and document; give the text that "
                f"it was trained with as --{prefix}template, such as {_EXAMPLE} or '{{query}}{{document}}'"
            )
        self._model.to(world.device).eval().requires_grad_(False)
        use_kernels()
        pack_linear_layers(self._model)
        around = around or self._tokenizer.num_special_tokens_to_add(pair=True)
        if self._max_length < around + 2:
            raise UserError(
                f"--{prefix}max_length {self._max_length}: leaves no room beside the {around} tokens around a pair"
            )
        if world.is_main and not ours:
            shown = self._tokenizer.decode(self._encode(["QUERY"], ["DOCUMENT"])["input_ids"][0])
            told = "" if own.activation == "Identity" else f"; scores are logits, its {own.activation} is left out"
            if self._model.config.num_labels == 2:
                told += "; a score is the logit of {1} minus that of {0}".format(*self._model.config.id2label.values())
            shown = json.dumps(shown, ensure_ascii=False)
            logger.info("%s reads pairs as %s, at most %d tokens%s", name, shown, self._max_length, told)
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
        encoded = self._encode([query for query, _ in pairs], [document for _, document in pairs])
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

    def _encode(self, queries: list[str], documents: list[str]) -> dict[str, list[list[int]]]:
        """The tokens of pairs, and what else the tokenizer gives the model, cut at the maximum length."""
        if self._chat is None:
            prompted = [self._prompt + query for query in queries]
            return dict(self._tokenizer(prompted, documents, truncation="longest_first", max_length=self._max_length))
        rows = self._tokens_of_chats(queries, documents)
        room = self._max_length - len(self._tail)
        return {"input_ids": [ids if len(ids) <= self._max_length else ids[:room] + self._tail for ids in rows]}

    def _render(self, query: str, document: str) -> str:
        """A pair as the tokenizer's chat template puts it: messages of the roles query and document, as others have it."""

        def message(role: str, text: str) -> dict[str, Any]:
            return {"role": role, "content": text if self._chat == "flat" else [{"type": "text", "text": text}]}

        system = [message("system", self._prompt)] if self._prompt else []
        return self._tokenizer.apply_chat_template(
            [*system, message("query", query), message("document", document)], tokenize=False
        )

    def _tokens_of_chats(self, queries: list[str], documents: list[str]) -> list[list[int]]:
        return self._tokenizer(list(map(self._render, queries, documents)), add_special_tokens=False)["input_ids"]

    def _check_chat(self) -> None:
        """Find the tokens behind a pair, which are kept when it is cut. UserError for a template that is not of pairs."""
        from jinja2 import TemplateError

        try:
            shown = [self._render(*pair) for pair in (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"))]
            reason = "leaves one of the texts out" if shown[0] in shown[1:] else None
        except (TemplateError, ValueError, TypeError) as error:
            reason = f"fails ({' '.join(str(error).split())[:200]})"
        if reason is not None:
            raise UserError(
                f"--{self._flag} {self._model.name_or_path}: its chat template {reason} when it gets messages of the roles query "
                f"and document; give the text that it was trained with as --{self._prefix}template, such as {_EXAMPLE}"
            )
        one, other = self._tokens_of_chats(["0", "1 2 3 4"], ["0", "1 2 3 4"])
        same = next((i for i, (a, b) in enumerate(zip(reversed(one), reversed(other))) if a != b), 0)
        self._tail = one[len(one) - same :]


def _load(source: ModelSource, bf16: bool, flag: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = source.base
    with (
        without_foreign_code(name),
        without_reports(),
        blaming_files(name, flag, "cannot be loaded as a sequence classifier"),
    ):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    own = (getattr(model.config, "auto_map", None) or {}).get(
        "AutoModelForSequenceClassification", type(model).__name__
    )
    if own.split(".")[-1] != type(model).__name__:
        raise UserError(
            f"--{flag} {name}: comes with Python code of its own ({own.split('.')[-1]}), which is not run, and transformers "
            f"takes it for a {type(model).__name__}; choose another"
        )
    check_vocabulary(tokenizer, flag, name)
    check_weights(name, model, report)
    model.config.return_dict = True  # which names its outputs; some files hold false
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
