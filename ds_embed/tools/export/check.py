"""The proof of an export: the folder, loaded by the library it is for, gives the vectors of the run.

Shapes: n texts, D dimensions; vectors stand as (2n, D), the texts as queries, then as documents.
"""

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ds_embed.data.tokenize import encode_texts
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.kinds import auto_class, without_pooler
from ds_embed.models.pooling import pool
from ds_embed.settings.errors import UserError
from ds_embed.vectors.embedder import Embedder

MIN_COSINE = 0.99999  # in float32
# Of weights that were rounded to 16 bits, against the run in float32. The merge was held to MIN_COSINE before: this
# only finds numbers that 16 bits can't hold.
MIN_COSINE_ROUNDED = 0.95

_TEXTS = [
    "a",
    "A question?",
    "  blanks around, and a line feed \n",
    "tabs\tand\n\nlines   and runs of      blanks",
    "ends with a full stop.",
    "1234567890 3.14159 -7 1e-4 $5 50%",
    "ALL CAPITALS and CamelCase and snake_case",
    "don't, can't; won't: \"quoted\" 'single' (brackets) [square] {curly}",
    "naïve café façade, Ångström, Straße, œuvre",
    "cafe\u0301 with a combining accent",
    "Привет, мир: как дела?",
    "日本語の文章です。",
    "한국어 문장입니다",
    "مرحبا بالعالم",
    "हिन्दी में एक वाक्य",
    "emoji 😀👩‍👩‍👧 and flags 🇫🇷",
    "full\u00a0width \u3000 blanks \u2028 and separators",
    "zero\u200bwidth",
    "def f(x):\n    return x ** 2  # square\n",
    "https://example.org/a?b=c&d=e#f",
    "<b>markup</b> &amp; entities",
    "supercalifragilisticexpialidocious" * 3,
]


@dataclass(frozen=True)
class Agreement:
    """How near two tables of vectors are: the smallest cosine of a row, and the largest difference of a number."""

    cosine: float
    difference: float

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray) -> "Agreement":
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        return cls(float(cosines.min()), float(np.abs(a - b).max()))

    def require(self, least: float, what: str) -> "Agreement":
        """UserError when a cosine is below `least`, or no number."""
        if not self.cosine >= least:
            raise UserError(
                f"{what} gives other vectors than the run (smallest cosine {self.cosine:.6f}, must be at least "
                f"{least}): nothing was written"
            )
        return self

    def __str__(self) -> str:
        return f"smallest cosine {self.cosine:.7f}, largest difference {self.difference:.1e}"


def check_texts(tokenizer: Any, lengths: tuple[int, int]) -> list[str]:
    """A few dozen texts: many scripts, and words of the vocabulary, up to twice the longest that is kept.

    lengths: tokens that are kept of a query and of a document.
    """
    draw = random.Random(0)
    added = set(tokenizer.added_tokens_decoder)
    words = [token for token in sorted(tokenizer.get_vocab().values()) if token not in added]
    longest = max(lengths)
    counts = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, lengths[0] - 4, lengths[1] - 3, 2 * longest]
    drawn = [tokenizer.decode(draw.choices(words, k=max(1, min(count, 2 * longest)))) for count in counts]
    return [text for text in _TEXTS + drawn if text.strip()]


def spelled_texts(tokenizer: Any) -> list[str]:
    """Texts that spell the vocabulary's control and added tokens, such as "</s>"."""
    added = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    return [f"a {token} b{token}c" for token in added[:50]]


def odd_tokens(ours: Any, exported: Any, card: EmbeddingCard, texts: list[str]) -> list[str]:
    """Which of the texts get other token ids from the exported tokenizer than from ds_embed."""
    odd = []
    for text_format in card.text_formats():
        expected = encode_texts(ours, texts, text_format)
        got = exported(
            [text_format.prefix + text for text in texts], truncation=True, max_length=text_format.max_length
        )["input_ids"]
        odd += [text for text, a, b in zip(texts, expected, got) if list(a) != list(b)]
    return odd


def vectors_here(embedder: Embedder, texts: list[str]) -> np.ndarray:
    return np.concatenate([embedder.encode_queries(texts), embedder.encode_documents(texts)])


def vectors_of_transformers(
    folder: Path, base: str | None, card: EmbeddingCard, texts: list[str], device: str, trust: bool, dtype: torch.dtype
) -> np.ndarray:
    """With AutoModel, AutoTokenizer and pooling alone; with PEFT too where `folder` is an adapter on `base`."""
    from transformers import AutoConfig, AutoTokenizer

    whole = base or str(folder)
    config = AutoConfig.from_pretrained(whole, trust_remote_code=trust)
    options = {"trust_remote_code": trust, **without_pooler(config)}
    model = auto_class(config).from_pretrained(whole, dtype=dtype, **options)
    if base is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(folder)).to(dtype)
    model = model.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust)
    rows = []
    for text_format in card.text_formats():
        for start in range(0, len(texts), 8):
            batch = tokenizer(
                [text_format.prefix + text for text in texts[start : start + 8]],
                padding=True,
                truncation=True,
                max_length=text_format.max_length,
                return_tensors="pt",
            ).to(device)
            with torch.inference_mode():
                states = model(**batch).last_hidden_state
                pooled = pool(states, batch["attention_mask"].sum(1), card.pooling)
                rows.append(torch.nn.functional.normalize(pooled, dim=1).cpu().numpy())
    return np.concatenate(rows)


def vectors_of_sentence_transformers(
    folder: Path, texts: list[str], device: str, trust: bool, dtype: torch.dtype
) -> np.ndarray:
    from sentence_transformers import SentenceTransformer

    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)  # it reports every load
    model = SentenceTransformer(str(folder), device=device, trust_remote_code=trust, model_kwargs={"dtype": dtype})
    sides = (model.encode_query, model.encode_document)
    encoded = [encode(texts, convert_to_tensor=True, show_progress_bar=False) for encode in sides]
    return torch.cat(encoded).float().cpu().numpy()
