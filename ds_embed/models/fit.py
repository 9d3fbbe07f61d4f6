"""Checks that a model's config, weights, tokenizer and adapter belong together. Of a base only headers are read."""

import importlib.util
import warnings
from typing import Any

from ds_embed.data.tokenize import encode_texts
from ds_embed.models.adapters import changes_base, put_adapter_on, read_adapter
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.kinds import auto_class, blaming_files, loading_options
from ds_embed.models.loading import (
    ModelSource,
    check_checkpoint,
    check_weights,
    load_config,
    without_foreign_code,
    without_reports,
)
from ds_embed.settings.errors import UserError


def check_parts(source: ModelSource, card: EmbeddingCard, tokenizer: Any, trust_remote_code: bool) -> None:
    """UserError naming both parts if two don't fit, before any text is tokenized or weight is read."""
    if source.load_in_4bit is not None:
        _check_4bit(source)
    if source.checkpoint is not None:
        check_checkpoint(source, getattr(load_config(source, trust_remote_code), "_commit_hash", None))
    model = _check_weights(source, trust_remote_code)
    if source.adapter is not None:
        with without_foreign_code(str(source.adapter)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that copying into tensors without data does nothing
            put_adapter_on(model, source.adapter)
    _check_tokens(source, card, tokenizer, model)


def _check_4bit(source: ModelSource) -> None:
    flag = f"--load_in_4bit {source.load_in_4bit}"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{flag}: needs bitsandbytes; pip install bitsandbytes, or leave it out")
    if source.adapter is not None and changes_base(read_adapter(source.adapter)):
        raise UserError(
            f"{flag}: the adapter {source.adapter} changes the base model's weights, which can't be done in 4 bits; merge "
            "it first, by ds-embed export --format merged, or leave the flag out"
        )


def _check_weights(source: ModelSource, trust_remote_code: bool) -> Any:
    """The model without weights, after checking that its files contain every weight with the shape given by the config.

    Otherwise transformers would continue with random weights.
    """
    config = load_config(source, trust_remote_code)
    with blaming_files(source.base, what="can't be loaded"), without_foreign_code(source.base), without_reports():
        model, report = auto_class(config).from_pretrained(
            source.base,
            revision=source.revision,
            config=config,
            trust_remote_code=trust_remote_code,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **loading_options(config),
        )
    check_weights(source.base, model, report)
    return model


def _check_tokens(source: ModelSource, card: EmbeddingCard, tokenizer: Any, model: Any) -> None:
    """UserError if a token is beyond the table, except control tokens that no text uses, such as a Llama's [PAD]."""
    rows = model.get_input_embeddings().weight.shape[0]
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    given = {int(i) for form in card.text_formats() for ids in encode_texts(tokenizer, ["a"], form) for i in ids}
    largest = max({*tokenizer.get_vocab().values()} - control | given)
    if largest >= rows:
        raise UserError(
            f"{source.tokenizer}: its tokenizer knows {tokenizer.convert_ids_to_tokens(largest)!r} as token {largest}, and "
            f"the embedding table of {source.base} has {rows} rows; bring the tokenizer that belongs to the model"
        )
