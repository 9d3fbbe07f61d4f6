"""Pairs of a query and a document as one sequence of tokens, the input of a reranker.

    head, query, middle, document, tail

Head, middle and tail are the tokens that the tokenizer itself puts around a pair ([CLS] and [SEP]), or those of a
template. A pair that is too long loses tokens at the end of its longer text, as with transformers' longest_first.

Shapes: N queries, M documents of a batch (N positives, then the hard negatives), b pairs, S tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ds_embed.data.batch import GlobalBatch, pad
from ds_embed.data.store import TrainingStore
from ds_embed.data.tokenize import SpecialTokens, TextFormat
from ds_embed.settings.errors import UserError

QUERY, DOCUMENT = "{query}", "{document}"


@dataclass(frozen=True)
class PairFormat:
    """How a pair is converted to tokens; `max_length` includes all of them."""

    head: tuple[int, ...]
    middle: tuple[int, ...]
    tail: tuple[int, ...]
    max_length: int
    has_types: bool  # whether the tokenizer marks query and document with token types
    around: tuple[int, int]  # tokens before and after a single text, which a store includes

    @classmethod
    def of(cls, tokenizer: Any, max_length: int) -> "PairFormat":
        """Find out what the tokenizer puts around a pair, by encoding one."""
        encoded = tokenizer("one", "two", return_special_tokens_mask=True, return_token_type_ids=True)
        is_text = [not special for special in encoded["special_tokens_mask"]]
        first = len(tokenizer("one", add_special_tokens=False)["input_ids"])
        start, end = is_text.index(True), len(is_text) - is_text[::-1].index(True)
        second = end - len(tokenizer("two", add_special_tokens=False)["input_ids"])
        ids = encoded["input_ids"]
        parts = ids[:start], ids[start + first : second], ids[end:]
        special = SpecialTokens.of(tokenizer, False)
        types = "token_type_ids" in tokenizer.model_input_names and 1 in encoded["token_type_ids"]
        return cls(*map(tuple, parts), max_length, types, (len(special.head), len(special.tail)))

    def with_template(self, tokenizer: Any, template: str) -> "PairFormat":
        """The same, with a template's tokens inside those around any text; its control tokens are parsed as such."""
        if (
            template.count(QUERY) != 1
            or template.count(DOCUMENT) != 1
            or template.index(QUERY) > template.index(DOCUMENT)
        ):
            raise UserError(f"--template '{template}': expected {QUERY} and {DOCUMENT} in it, once each, in this order")
        before, rest = template.split(QUERY)
        between, after = rest.split(DOCUMENT)
        head, middle, tail = (
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()
            for text in (before, between, after)
        )
        special = SpecialTokens.of(tokenizer, False)
        return replace(self, head=special.head + head, middle=middle, tail=tail + special.tail, has_types=False)

    @property
    def num_around(self) -> int:
        """Tokens of a pair that are neither the query's nor the document's."""
        return len(self.head) + len(self.middle) + len(self.tail)

    def text_formats(self) -> tuple[TextFormat, TextFormat]:
        """Formats of queries and documents in a store, which keeps as much of them as a pair could hold."""
        form = TextFormat("", self.max_length + sum(self.around), append_eos=False, strip=False)
        return form, form

    def truncated(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths (n,) of queries and documents after truncation, given their lengths (n,) before."""
        room = self.max_length - self.num_around
        short, long = np.minimum(first, second), np.maximum(first, second)
        long = np.minimum(long, np.maximum(short, room - short))
        over = short + long > room
        halves = np.where(over, room // 2, short), np.where(over, room - room // 2, long)
        swapped = first > second
        return np.where(swapped, *halves[::-1]), np.where(swapped, *halves)

    def lengths_of(self, store: TrainingStore, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) of the query and of the document in each pair (n, 2) of texts of the store."""
        lengths = store.lengths_of(pairs) - sum(self.around)
        return self.truncated(lengths[:, 0], lengths[:, 1])

    def collate(self, store: TrainingStore, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids (b, S), lengths (b,), and tokens before the document (b,) of pairs (b, 2); a dummy for none."""
        if len(pairs) == 0:
            return np.zeros((1, 1), dtype=np.int64), np.ones(1, dtype=np.int64), np.ones(1, dtype=np.int64)
        first, second = self.lengths_of(store, pairs)
        rows = [
            np.concatenate([self.head, self._body(store, q, a), self.middle, self._body(store, d, b), self.tail])
            for (q, d), a, b in zip(pairs, first, second)
        ]
        lengths = first + second + self.num_around
        return pad(np.concatenate(rows).astype(np.int64), lengths), lengths, len(self.head) + first + len(self.middle)

    def _body(self, store: TrainingStore, text: int, num_tokens: int) -> np.ndarray:
        return store.tokens_of(int(text))[self.around[0] : self.around[0] + num_tokens]


def as_pairs(batch: GlobalBatch, store: TrainingStore, form: PairFormat) -> GlobalBatch:
    """The same batch with a pair (2,) of texts for each of its M documents, in order, as the texts to encode."""
    first_text = np.asarray(store.first_text[batch.records])
    has_own = np.asarray(store.first_text[batch.records + 1]) - first_text > 2
    num_own = batch.own_negatives.shape[1]
    owners = np.concatenate([np.arange(batch.num_queries), np.repeat(np.flatnonzero(has_own), num_own)])
    documents = batch.texts[batch.rows[batch.num_queries :]]
    pairs = np.stack([first_text[owners], documents], axis=1)
    first, second = form.lengths_of(store, pairs)
    return replace(batch, texts=pairs, lengths=first + second + form.num_around, rows=np.arange(len(pairs)))
