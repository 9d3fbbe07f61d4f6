"""What a model folder says about how to use it: `ds_embed.json` beside the weights."""

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from ds_embed.data.tokenize import TextFormat
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.data_arguments import DEFAULT_DOC_PREFIX, DEFAULT_MAX_LENGTH, DEFAULT_QUERY_PREFIX, unescape
from ds_embed.settings.errors import UserError

CARD_NAME = "ds_embed.json"


@dataclass(frozen=True)
class EmbeddingCard:
    """Everything that decides a text's vector apart from the weights, so that no flag needs repeating."""

    pooling: str
    query_prefix: str
    doc_prefix: str
    query_max_length: int  # tokens
    doc_max_length: int  # tokens
    append_eos: bool
    base_model: str  # folder or hub name that an adapter belongs to
    consumed_samples: int  # samples the model was trained on; 0 for a base model
    temperature: float | None = None  # of the loss at the end of training; None for a base model
    bidirectional: bool = False  # whether a decoder's tokens see the whole text; encoders' always do

    @classmethod
    def choose(
        cls,
        text: TextArguments,
        model: ModelArguments,
        *,
        decoder: bool,
        bidirectional: bool,
        base: str,
        known: "EmbeddingCard | None",
        longest: int | None,
    ) -> "EmbeddingCard":
        """The card of a model: what the flags say, else what its own card `known` says, else our defaults.

        bidirectional: whether the model is so by itself. longest: tokens that it has positions for, None
        where nothing limits them. UserError when a length exceeds it, or for a pooling that sees one token.
        """

        def first(*choices):
            return next(choice for choice in choices if choice is not None)

        def of_known(name):
            return None if known is None else getattr(known, name)

        def prefix(name, default):
            flag = getattr(text, name)
            return first(of_known(name), default) if flag is None else unescape(flag)

        default_length = min(DEFAULT_MAX_LENGTH, longest or DEFAULT_MAX_LENGTH)
        lengths = {
            name: first(getattr(text, name), text.max_length, of_known(name), default_length)
            for name in ("query_max_length", "doc_max_length")
        }
        for name, length in lengths.items():
            if longest is not None and length > longest:
                flag = "max_length" if getattr(text, name) is None else name
                raise UserError(
                    f"--{flag} {length}: {base} has positions for {longest} tokens; set it to at most {longest}"
                )
        pooling = first(model.pooling, of_known("pooling"), "last" if decoder else "mean")
        bidirectional = bidirectional or first(model.bidirectional, of_known("bidirectional"), False)
        if pooling == "cls" and not bidirectional:
            raise UserError(
                f"--pooling cls: the first token of {base}, a causal decoder, sees none of the text behind it; "
                "choose last, mean or weighted_mean, or set --bidirectional true"
            )
        return cls(
            pooling=pooling,
            query_prefix=prefix("query_prefix", DEFAULT_QUERY_PREFIX),
            doc_prefix=prefix("doc_prefix", DEFAULT_DOC_PREFIX),
            **lengths,
            append_eos=decoder,
            base_model=base,
            consumed_samples=first(of_known("consumed_samples"), 0),
            temperature=of_known("temperature"),
            bidirectional=bidirectional,
        )

    def text_formats(self) -> tuple[TextFormat, TextFormat]:
        """How queries and how documents become tokens."""
        return (
            TextFormat(self.query_prefix, self.query_max_length, self.append_eos),
            TextFormat(self.doc_prefix, self.doc_max_length, self.append_eos),
        )

    def save(self, folder: Path) -> None:
        (folder / CARD_NAME).write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> "EmbeddingCard | None":
        """The card in `folder`, or None where there is none. UserError when it can't be understood."""
        path = folder / CARD_NAME
        if not path.exists():
            return None
        content = json.loads(path.read_text("utf-8"))
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if not needed <= set(content) <= known:
            odd = ", ".join(sorted(set(content) - known | needed - set(content)))
            raise UserError(f"{path}: missing or unknown keys ({odd}): written by another version of ds_embed?")
        return cls(**content)
