"""Texts to token ids: prefix, right truncation, and the tokenizer's own special tokens around the rest.

Letters: T texts, S tokens of all of them together.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from ds_embed.settings.data_arguments import TEXT_PLACE
from ds_embed.settings.errors import UserError

# Any would do: they only show what the tokenizer puts around a text.
_PROBE_TEXTS = ("a probe of the tokenizer", "one", "1")


@dataclass(frozen=True)
class TextFormat:
    """How a text of one kind (query or document) becomes tokens.

    prefix: put in front as it is, such as "query: "; the whole is then stripped of blanks. What stands
        behind a {text} in it comes behind the text, and is never cut off. Control tokens spelled in it are tokens.
    max_length: most tokens of one text, special tokens and EOS included.
    append_eos: end every text with EOS where the tokenizer itself puts nothing behind it (for decoders).
    include_prompt: whether the tokens of the prefix are pooled; else TextTokenizer.prompt_length says how many are not.
    strip: False leaves the blanks around the whole as they are.
    """

    prefix: str
    max_length: int
    append_eos: bool
    include_prompt: bool = True
    strip: bool = True


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that stand before (head) and after (tail) the tokens of every text."""

    head: tuple[int, ...]
    tail: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, append_eos: bool) -> SpecialTokens:
        """See what `tokenizer` puts around a text, by trying; then add EOS if asked and nothing stands behind the text.

        BERT gives [CLS] and [SEP], Llama gives BOS in front, SmolLM2 nothing, Qwen3-Embedding <|endoftext|> behind,
        which is not its EOS. UserError if EOS is wanted and the tokenizer has none.
        """
        head, tail = _probe_surroundings(tokenizer)
        if append_eos and not tail:
            if tokenizer.eos_token_id is None:
                raise UserError(
                    f"the tokenizer {_name_of(tokenizer)} adds no token after a text and has no eos_token that could "
                    "be added, from which a decoder's vector is read; name one in its tokenizer_config.json"
                )
            tail = (tokenizer.eos_token_id,)
        return cls(head, tail)


class TextTokenizer:
    """Turns texts into token ids by one TextFormat.

    The prefix is put in front and the whole stripped; what is too long loses its end; suffix, head and
    tail come after that, so that EOS or [SEP] is always there. Special tokens spelled out in the prefix, which is the
    user's, are tokens; in a text, such as "</s>", they are plain text: data cannot smuggle in control tokens. Where a
    tokenizer's own vocabulary still maps the spelling to the control id (Unigram does), that id is
    dropped. What the tokenizer says about padding and truncation plays no part and is left as it was.
    `setting` is the name of the length setting, for errors (UserError).
    """

    def __init__(self, tokenizer: Any, text_format: TextFormat, setting: str = "max_length"):
        self._backend = _backend_of(tokenizer)
        self._strip = str.strip if text_format.strip else str
        prefix, _, suffix = text_format.prefix.partition(TEXT_PLACE)
        self._prefix = prefix = prefix.lstrip() if text_format.strip else prefix
        self._is_control = _control_ids(tokenizer, self._backend)
        self._spellings = [
            token.content for token in self._backend.get_added_tokens_decoder().values() if token.special
        ]
        # Where the last control token in the prefix ends: what stands before that is the same tokens for every text.
        ends = [prefix.rindex(one) + len(one) for one in self._spellings if one in prefix]
        self._fixed = prefix[: max(ends, default=0)]
        fixed = tuple(self._ids([self._fixed], True)[0]) if self._fixed else ()
        self.special_tokens = SpecialTokens.of(tokenizer, text_format.append_eos)
        head, tail = (*self.special_tokens.head, *fixed), (*self._suffix_ids(suffix), *self.special_tokens.tail)
        self._head, self._tail, self._num_fixed = head, tail, len(fixed)
        num_around = len(head) + len(tail)
        num_prefix = len(self._ids([self._strip(prefix)], True)[0]) - len(fixed) if prefix else 0
        if text_format.max_length < num_around + num_prefix + 1:
            kinds = "special tokens" if text_format.prefix == "" else "tokens of prefix and special tokens"
            raise UserError(
                f"{setting}={text_format.max_length} leaves no room for text beside the {num_around + num_prefix} "
                f"{kinds} around it; set {setting} to {num_around + num_prefix + 1} or more"
            )
        self._max_body_tokens = text_format.max_length - num_around
        self.prompt_length = 0 if text_format.include_prompt else self._count_prompt(prefix, tokenizer)

    def _ids(self, texts: list[str], control: bool = False) -> list[list[int]]:
        """The ids of texts, in which the spelling of a control token is one only if `control`."""
        with _plain_settings(self._backend) as backend:
            backend.encode_special_tokens = not control
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _body_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of prefix and text behind the fixed part of the prefix."""
        if not self._fixed:
            return self._ids([self._strip(self._prefix + text) for text in texts])
        # In one piece with the control tokens, since these change how what follows them is cut; but not the texts
        # that spell some themselves.
        rest = self._prefix[len(self._fixed) :]
        spells = [any(one in text for one in self._spellings) for text in texts]
        whole = self._ids(["" if s else self._strip(self._prefix + text) for text, s in zip(texts, spells)], True)
        alone = self._ids([self._strip(rest + text) if s else "" for text, s in zip(texts, spells)])
        return [b if s else a[self._num_fixed :] for a, b, s in zip(whole, alone, spells)]

    def _count_prompt(self, prefix: str, tokenizer: Any) -> int:
        """Leading tokens that pooling leaves out, as sentence-transformers counts them.

        Those of the prefix alone with all that stands around a text, but for a last one that is special.
        """
        if not prefix:
            return 0
        ids = [*self.special_tokens.head, *self._ids([prefix], True)[0], *self.special_tokens.tail]
        return len(ids) - (ids[-1] in tokenizer.all_special_ids)

    def _suffix_ids(self, suffix: str) -> tuple[int, ...]:
        """The tokens of what stands behind every text, as they follow one."""
        if not suffix:
            return ()
        for text in _PROBE_TEXTS:
            bare, longer = self._ids([text, text + suffix], True)
            if longer[: len(bare)] == bare:
                return tuple(longer[len(bare) :])
        raise UserError(
            f"the prefix's '{suffix}' behind {TEXT_PLACE} becomes one token with the end of a text; "
            "let it start with a blank or a new line"
        )

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Encode T texts into one flat array.

        Returns tokens (S, int32), text after text; lengths (T, int64); and the lengths that the texts
        would have had without truncation (T, int64).
        """
        if not texts:
            return np.empty(0, np.int32), *np.empty((2, 0), np.int64)
        id_lists = self._body_ids(texts)
        counts = np.fromiter(map(len, id_lists), np.int64, len(id_lists))
        body = np.fromiter(itertools.chain.from_iterable(id_lists), np.int32, int(counts.sum()))
        is_control = self._is_control[body]
        if is_control.any():
            text_of_token = np.repeat(np.arange(len(counts)), counts)
            counts -= np.bincount(text_of_token[is_control], minlength=len(counts))
            body = body[~is_control]

        kept = np.minimum(counts, self._max_body_tokens)
        position = np.arange(len(body)) - np.repeat(np.cumsum(counts) - counts, counts)
        body = body[position < self._max_body_tokens]
        head, tail = self._head, self._tail
        num_around = len(head) + len(tail)
        lengths = kept + num_around
        ends = np.cumsum(lengths)
        tokens = np.empty(int(ends[-1]), np.int32)
        is_body = np.ones(len(tokens), bool)
        for start, around in ((ends - lengths, head), (ends - len(tail), tail)):
            for index, token in enumerate(around):
                tokens[start + index] = token
                is_body[start + index] = False
        tokens[is_body] = body
        return tokens, lengths, counts + num_around

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids (int32) of each text, in order."""
        tokens, lengths, _ = self.encode_flat(texts)
        return np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []


def encode_texts(tokenizer: Any, texts: Sequence[str], text_format: TextFormat) -> list[np.ndarray]:
    """The token ids (int32) of each text, in order; see TextTokenizer."""
    return TextTokenizer(tokenizer, text_format).encode(texts)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash (32 hex digits) of all that decides the ids of a text, the same in every process.

    Padding and truncation are left out: earlier calls of the tokenizer change them.
    """
    parts = orjson.loads(_backend_of(tokenizer).to_str())
    parts["truncation"] = parts["padding"] = None
    digest = hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS))
    digest.update(json.dumps([tokenizer.eos_token_id]).encode())
    return digest.hexdigest()[:32]


def put_into_lower_case(tokenizer: Any) -> None:
    """Let the tokenizer do so first of all, in place, where it does not yet."""
    from tokenizers import normalizers

    backend = _backend_of(tokenizer)
    if backend.normalizer is None or "owercase" not in str(backend.normalizer).replace("lowercase=False", ""):
        backend.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), *([] if backend.normalizer is None else [backend.normalizer])]
        )


def _backend_of(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):
        raise UserError(
            f"the tokenizer {_name_of(tokenizer)} has no fast version (tokenizer.json), which is needed to "
            "encode whole corpora; convert it, or choose a model that has one"
        )
    return backend


def _name_of(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


@contextmanager
def _plain_settings(backend: Any) -> Iterator[Any]:
    """The tokenizer without padding and truncation, and blind to special tokens; put back afterwards."""
    saved = backend.encode_special_tokens, backend.truncation, backend.padding
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        encode_special_tokens, truncation, padding = saved
        backend.encode_special_tokens = encode_special_tokens
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def _probe_surroundings(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    with _plain_settings(_backend_of(tokenizer)) as backend:
        for text in _PROBE_TEXTS:
            bare = backend.encode(text, add_special_tokens=False).ids
            dressed = backend.encode(text, add_special_tokens=True).ids
            for start in range(len(dressed) - len(bare) + 1):
                if bare and dressed[start : start + len(bare)] == bare:
                    return tuple(dressed[:start]), tuple(dressed[start + len(bare) :])
    raise UserError(
        f"the tokenizer {_name_of(tokenizer)} changes the tokens of a text when it adds special tokens, "
        "so texts cannot be cut to length first; choose a tokenizer with a plain post-processor"
    )


def _control_ids(tokenizer: Any, backend: Any) -> np.ndarray:
    """Which ids a text may never produce: (vocabulary,) bool. The unknown token is not among them."""
    # By the largest id, not the size: vocabularies may have holes.
    is_control = np.zeros(max(backend.get_vocab(with_added_tokens=True).values()) + 1, bool)
    added = backend.get_added_tokens_decoder()
    is_control[[index for index, token in added.items() if token.special]] = True
    model = orjson.loads(backend.model.__getstate__())
    unknown_ids = [getattr(tokenizer, "unk_token_id", None), model.get("unk_id")]
    if model.get("unk_token") is not None:
        unknown_ids.append(backend.token_to_id(model["unk_token"]))
    is_control[[index for index in unknown_ids if index is not None]] = False
    return is_control
