"""Checks that a model's config, weights, tokenizer and adapter belong together. Of a base only headers are read."""

import importlib.util
import re
import warnings
from typing import Any

from ds_embed.data.tokenize import encode_texts
from ds_embed.models.adapters import changes_base, put_adapter_on, read_adapter
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.kinds import auto_class, loading_options
from ds_embed.models.loading import ModelSource, check_checkpoint, load_config, without_foreign_code, without_reports
from ds_embed.settings.errors import UserError


def check_parts(source: ModelSource, card: EmbeddingCard, tokenizer: Any, trust_remote_code: bool) -> None:
    """UserError naming both parts if two don't fit, before any text is tokenized or weight is read."""
    if source.load_in_4bit is not None:
        _check_4bit(source)
    if source.checkpoint is not None:
        check_checkpoint(source, getattr(load_config(source, trust_remote_code), "_commit_hash", None))
    model = _check_weights(source, trust_remote_code)
    _check_tokens(source, card, tokenizer, model)
    if source.adapter is not None:
        with without_foreign_code(str(source.adapter)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that copying into tensors without data does nothing
            put_adapter_on(model, source.adapter)


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
    with without_foreign_code(source.base), without_reports():
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
    names = [name for name, _ in model.named_parameters()]
    # Poolers do not affect a token's state.
    missing = sorted(name for name in report["missing_keys"] if "pooler" not in name)
    if missing:
        raise UserError(
            f"{source.base}: its weight files lack {missing[0]} ({len(missing)} of the {len(names)} tensors that its "
            "config.json asks for); nothing is made up in their place: bring the files that belong together"
        )
    for name, *shapes in sorted(report["mismatched_keys"]):
        stored, wanted = (" x ".join(map(str, shape)) for shape in shapes)
        raise UserError(
            f"{source.base}: {name} is {stored} in its weight files and {wanted} by its config.json; bring the files that "
            "belong together"
        )
    known = {re.sub(r"\d+", "*", name) for name in names}
    for name in sorted(report["unexpected_keys"]):
        # An extra layer, not a head.
        if re.sub(r"\d+", "*", name.removeprefix(f"{model.base_model_prefix}.")) in known:
            raise UserError(
                f"{source.base}: its weight files hold {name}, which its config.json has no place for; bring the files "
                "that belong together"
            )
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
