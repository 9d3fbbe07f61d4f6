"""A tokenizer that does by itself what TextTokenizer does, for other libraries."""

import json
from pathlib import Path
from typing import Any

from ds_embed.data.tokenize import SpecialTokens
from ds_embed.models.card import EmbeddingCard
from ds_embed.settings.errors import UserError


def check_vocabulary(tokenizer: Any, flag: str, name: str) -> None:
    """UserError for a tokenizer of special tokens alone, which transformers makes up where a folder has none.

    And for a length that is no number.
    """
    length = tokenizer.model_max_length
    if not isinstance(length, int | float):
        raise UserError(f"--{flag} {name}: tokenizer_config.json: model_max_length {length!r} must be a number")
    special = set(tokenizer.all_special_tokens).union(tokenizer.get_added_vocab())
    if len(tokenizer.get_vocab().keys() - special) < 2:  # T5's has a blank too
        raise UserError(
            f"--{flag} {name}: has no tokenizer of its own (tokenizer.json); copy that of the model it was made from there"
        )


def tokenizer_for_others(tokenizer: Any, card: EmbeddingCard) -> Any:
    """The model's tokenizer, unchanged if a plain call does all that the card says, else one that does.

    If unchanged, it parses control tokens spelled in a text as tokens, as usual in other libraries.
    """
    around = SpecialTokens.of(tokenizer, False)
    does_all = around == SpecialTokens.of(tokenizer, card.append_eos) and tokenizer.truncation_side == "right"
    if card.strip:
        does_all = does_all and tokenizer(" \n a b \n")["input_ids"] == tokenizer("a b")["input_ids"]
    return tokenizer if does_all else self_contained(tokenizer, card)


def self_contained(tokenizer: Any, card: EmbeddingCard) -> Any:
    """A fast tokenizer whose plain call gives the ids of TextTokenizer.

    White space around a text is removed, text that is too long is truncated, and then special tokens are added,
    including EOS if wanted. Special tokens spelled in a text remain text, unless a prefix contains some, which must be
    tokens. Padding is on the right.
    """
    from tokenizers import normalizers, processors

    special, backend = SpecialTokens.of(tokenizer, card.append_eos), plain_backend(tokenizer)
    if card.strip:
        own = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Strip(), *own])
    head = [backend.id_to_token(token) for token in special.head]
    tail = [backend.id_to_token(token) for token in special.tail]
    backend.post_processor = processors.TemplateProcessing(
        single=[*head, "$A", *tail], special_tokens=list(zip([*head, *tail], [*special.head, *special.tail]))
    )
    # Any token can be used for padding, since the attention mask hides it.
    pad = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token or backend.id_to_token(0)
    return fast_tokenizer(
        backend,
        tokenizer,
        max(card.query_max_length, card.doc_max_length),
        pad,
        split_special_tokens=not any(t in card.query_prefix + card.doc_prefix for t in tokenizer.all_special_tokens),
        chat_template=tokenizer.chat_template,
        model_input_names=["input_ids", "attention_mask"],
    )


def plain_backend(tokenizer: Any) -> Any:
    """A copy of a fast tokenizer's backend, without truncation and padding."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def fast_tokenizer(backend: Any, like: Any, max_length: int, pad_token: str, **options: Any) -> Any:
    """A tokenizer for a backend with the special tokens of `like`; pads and truncates right, at max_length tokens."""
    from transformers import PreTrainedTokenizerFast

    names = {name: token for name, token in like.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="right",
        truncation_side="right",
        model_max_length=max_length,
        **names | {"pad_token": pad_token},
        **options,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer; one made here gets the class name that every version of transformers knows."""
    tokenizer.save_pretrained(folder)
    if type(tokenizer).__name__ not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text("utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", "utf-8")
