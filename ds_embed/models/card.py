"""The card of a model folder, `ds_embed.json`, which says how to use the weights."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_origin

from ds_embed.data.tokenize import SpecialTokens, TextFormat
from ds_embed.models.kinds import Kind
from ds_embed.models.pooling import NORMALIZE
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.data_arguments import DEFAULT_DOC_PREFIX, DEFAULT_MAX_LENGTH, DEFAULT_QUERY_PREFIX, unescape
from ds_embed.settings.errors import UserError
from ds_embed.settings.model_arguments import POOLINGS

CARD_NAME = "ds_embed.json"
OWN_FILES = "its sentence-transformers files"
_FLAG, _DEFAULT = "flag", "default"


@dataclass(frozen=True)
class EmbeddingCard:
    """Everything except the weights that determines a text's vector, so that no flag needs repeating."""

    pooling: str  # one of POOLINGS, or several joined by +, whose vectors are concatenated
    query_prefix: str
    doc_prefix: str
    query_max_length: int  # tokens
    doc_max_length: int  # tokens
    append_eos: bool  # end texts with EOS if the tokenizer itself adds nothing after them
    base_model: str  # folder or hub name of the model that an adapter belongs to
    consumed_samples: int  # samples the model was trained on; 0 for a base model
    temperature: float | None = None  # of the loss at the end of training; None for a base model
    bidirectional: bool = False  # whether a decoder's tokens see the whole text; encoders' always do
    include_prompt: bool = True  # whether the tokens of the prefix are pooled too
    head: list[dict[str, Any]] = field(default_factory=lambda: [NORMALIZE])  # Dense and Normalize after the pooling
    strip: bool = True  # remove white space around prefix and text
    lower_case: bool = False  # if the tokenizer does not do so itself
    similarity: str = "cosine"  # as named in the model's files, for other libraries
    prompts: dict[str, str] = field(default_factory=dict)  # all but those of queries and documents, for others
    origins: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # by field; not saved

    @classmethod
    def choose(
        cls, text: TextArguments, model: ModelArguments, kind: Kind, base: str, known: Any, own: dict[str, Any]
    ) -> "EmbeddingCard":
        """The card of a model, from flags, else its card `known`, else the settings in its `own` files, else defaults.

        UserError if a length exceeds the model's positions, or for cls pooling of a causal model.
        """
        longest, decoder = kind.longest, kind.is_causal
        flags: dict[str, Any] = {"base_model": base, "pooling": model.pooling, "bidirectional": model.bidirectional}
        for name in ("query_prefix", "doc_prefix"):
            flags[name] = getattr(text, name) and unescape(getattr(text, name))
        for name in ("query_max_length", "doc_max_length"):
            flags[name] = getattr(text, name) or text.max_length
        pooling, length = "last" if decoder else "mean", min(DEFAULT_MAX_LENGTH, longest or DEFAULT_MAX_LENGTH)
        default = cls(pooling, DEFAULT_QUERY_PREFIX, DEFAULT_DOC_PREFIX, length, length, decoder, base, 0).content
        card = {} if known is None else known.content
        sources = {_FLAG: flags, CARD_NAME: card, OWN_FILES: own, _DEFAULT: default}
        origins, values = {}, dict[str, Any]()
        for name in default:
            known_to = (where for where, source in sources.items() if source.get(name) is not None)
            origins[name] = next(known_to, _DEFAULT)
            values[name] = sources[origins[name]][name]
        for name in ("query_max_length", "doc_max_length"):
            if longest is not None and values[name] > longest:
                if origins[name] == OWN_FILES:  # some also count the padding's position
                    values[name] = longest
                    continue
                flag = "max_length" if getattr(text, name) is None else name
                raise UserError(f"--{flag} {values[name]}: {base} has positions for {longest} tokens; lower it")
        if not decoder and not values["bidirectional"]:
            values["bidirectional"], origins["bidirectional"] = True, "its config.json"
        if model.normalize is not None:
            dense = [layer for layer in values["head"] if layer != NORMALIZE]
            kept = values["head"] if values["head"] and values["head"][-1] != NORMALIZE else values["head"][:-1]
            values["head"] = [*kept, NORMALIZE] if model.normalize else kept
            origins["head"] = _FLAG if not dense else f"{origins['head']}, and flag"
        if "cls" in values["pooling"].split("+") and not values["bidirectional"] and origins["pooling"] == _FLAG:
            raise UserError(
                f"--pooling cls: the first token of {base}, a causal decoder, sees none of the text behind it; "
                "choose last, mean or weighted_mean, or set --bidirectional true"
            )
        return cls(**values, origins=origins)

    @property
    def encoding(self) -> dict[str, Any]:
        """The arguments for load_encoder and build_encoder."""
        return {"pooling": self.pooling, "bidirectional": self.bidirectional, "head": self.head}

    @property
    def makes_unit_vectors(self) -> bool:
        """Whether vectors have length 1."""
        return bool(self.head) and self.head[-1] == NORMALIZE

    def dimensions(self, hidden_size: int) -> int:
        """Dimensions of the vectors of a model with `hidden_size`. UserError if parts of the model don't fit."""
        width = hidden_size * len(self.pooling.split("+"))
        for layer in self.head:
            if layer == NORMALIZE:
                continue
            if layer["in_features"] != width:
                raise UserError(
                    f"{layer['path']} takes {layer['in_features']} dimensions, and what stands before it gives {width} "
                    f"(pooling {self.pooling}, hidden size {hidden_size}): they belong to different models"
                )
            width = layer["out_features"]
        return width

    def text_formats(self) -> tuple[TextFormat, TextFormat]:
        """How queries and documents are converted to tokens."""
        rest = (self.append_eos, self.include_prompt, self.strip)
        queries = TextFormat(self.query_prefix, self.query_max_length, *rest)
        return queries, TextFormat(self.doc_prefix, self.doc_max_length, *rest)

    def describe(self, tokenizer: Any) -> list[str]:
        """Lines that describe how texts become vectors, with the origin of each setting."""

        def of(name: str) -> str:
            return self.origins.get(name, CARD_NAME)

        def side(name: str) -> str:
            prefix, length = f"{name}_prefix", f"{name}_max_length"
            shown = json.dumps(getattr(self, prefix), ensure_ascii=False)
            return f"prefix {shown} ({of(prefix)}), at most {getattr(self, length):,} tokens ({of(length)})"

        layers = [
            f"Dense {layer['in_features']} to {layer['out_features']} ({layer['activation']})"
            if layer != NORMALIZE
            else "Normalize"
            for layer in self.head
        ]
        tail = [tokenizer.convert_ids_to_tokens(i) for i in SpecialTokens.of(tokenizer, self.append_eos).tail]
        by_itself = SpecialTokens.of(tokenizer, False).tail or not tail
        lines = [
            f"pooling        {self.pooling} ({of('pooling')})"
            + ("" if self.include_prompt else f", prefix tokens excluded ({of('include_prompt')})"),
            f"after pooling  {', '.join(layers) or 'nothing'} ({of('head')})",
            f"queries        {side('query')}",
            f"documents      {side('doc')}",
            f"end token      {' '.join(tail) or 'none'} ({'tokenizer' if by_itself else of('append_eos')})",
            f"attention      {'bidirectional' if self.bidirectional else 'causal'} ({of('bidirectional')})",
        ]
        if self.prompts:
            names = ", ".join(self.prompts)
            lines.append(
                f"other prompts  {names}: kept for other libraries; to use one, pass its text as --query_prefix"
            )
        if not self.makes_unit_vectors:
            lines.append(
                "vectors        not normalized: training and validation use cosine similarity, search and evaluate use the "
                "inner product; --normalize true makes unit vectors"
            )
        return lines

    @property
    def content(self) -> dict[str, Any]:
        """The fields that are saved."""
        return {name: value for name, value in asdict(self).items() if name != "origins"}

    def save(self, folder: Path) -> None:
        (folder / CARD_NAME).write_text(json.dumps(self.content, indent=2, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path) -> "EmbeddingCard":
        """Read a card from a file. UserError if it is invalid."""
        try:
            content = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: is not JSON ({error}); bring back the file") from None
        return cls.of(content, path)

    @classmethod
    def of(cls, content: dict[str, Any], path: Path) -> "EmbeddingCard":
        """The card with `content`, which was read from the file `path`."""
        if "pair_format" in content:
            raise UserError(f"{path}: is a reranker's, which makes no vectors; ds-embed rerank takes it")
        try:
            card = cls(**content)
        except TypeError as error:
            raise UserError(f"{path}: written by another version of ds_embed? {error}") from None
        for setting in fields(cls):
            value, kind = getattr(card, setting.name), setting.type
            kinds: Any = float | int | None if setting.name == "temperature" else get_origin(kind) or kind
            if not isinstance(value, kinds):
                raise UserError(f"{path}: {setting.name} {json.dumps(value)} must be a {kind}; bring back the file")
        if not set(card.pooling.split("+")) <= set(POOLINGS):
            raise UserError(
                f"{path}: pooling {card.pooling}: choose one of {', '.join(POOLINGS)}, or several joined by +"
            )
        return card
