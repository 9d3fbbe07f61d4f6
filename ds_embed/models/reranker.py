"""Rerankers: a transformers sequence classifier with one label, which reads query and document together.

Encoders have their own head; a decoder's is a linear layer on its last token, which can start as the difference of the
logits of two words such as yes and no. The trained model is transformers' own, including the forward pass, so RUN/model
can be loaded by every library that loads such classifiers; its tokenizer applies the template to pairs by itself.

Shapes: b pairs, S tokens (right-padded).
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ds_embed.artifact.identity import identify_large, identify_weights
from ds_embed.data.pairs import PairFormat
from ds_embed.data.tokenize import TextFormat
from ds_embed.models.card import CARD_NAME
from ds_embed.models.checkpoint import STATE, checkpoint_in
from ds_embed.models.cpu import use_kernels
from ds_embed.models.kinds import count_positions
from ds_embed.models.loading import (
    ADAPTER_CONFIG,
    ModelSource,
    check_checkpoint,
    check_weights,
    checkpoint_source,
    load_config,
    load_tokenizer,
    locate,
    put_checkpoint_in,
    without_foreign_code,
    without_reports,
)
from ds_embed.models.lora import add_lora
from ds_embed.models.pooling import token_mask
from ds_embed.models.sentence_transformers import ModelFiles, read_pair_files
from ds_embed.models.tokenizer import fast_tokenizer, plain_backend, save_tokenizer
from ds_embed.settings import LoraArguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import listed

DEFAULT_TEMPLATE = "query: {query}\ndocument: {document}\nrelevant:"
_DEFAULT_MAX_LENGTH = 512


@dataclass(frozen=True)
class RerankerCard:
    """Everything but the weights that determines a pair's score, for resuming; scoring only needs the tokenizer."""

    base_model: str
    pair_format: PairFormat
    template: str | None  # None: as the tokenizer joins two texts
    consumed_samples: int = 0

    def text_formats(self) -> tuple[TextFormat, TextFormat]:
        """Formats of queries and documents in a store."""
        return self.pair_format.text_formats()

    def describe(self, tokenizer: Any) -> list[str]:
        """Lines that describe how pairs are converted to tokens."""
        form = self.pair_format
        head, middle, tail = (tokenizer.decode(ids) for ids in (form.head, form.middle, form.tail))
        shown = json.dumps(f"{head}<query>{middle}<document>{tail}", ensure_ascii=False)
        return [f"pairs          {shown}, at most {form.max_length:,} tokens"]

    @property
    def content(self) -> dict[str, Any]:
        return asdict(self)


def is_reranker(path: str | Path) -> bool:
    """Whether the folder, or model/ in it, is a reranker's, or a checkpoint of its training."""
    cards = (Path(path).expanduser() / place for place in (CARD_NAME, f"model/{CARD_NAME}", STATE))
    return any(card.is_file() and '"pair_format"' in card.read_text("utf-8") for card in cards)


def find_reranker(name: str, revision: str | None = None, flag: str = "model_name_or_path") -> ModelSource:
    """Find the model of a folder, a reranker's run, or a hub name. UserError naming the flag."""
    if checkpoint_in(flag, name, None) is not None:
        raise UserError(f"--{flag} {name}: is a checkpoint; make a model of it first, by ds-embed export --run {name}")
    files = locate(flag, name, revision)
    if files.find(ADAPTER_CONFIG) is not None:
        raise UserError(
            f"--{flag} {name}: is an adapter; merge it into its base first: a run of ds_embed by ds-embed export --format "
            "merged, another by PEFT's merge_and_unload"
        )
    return ModelSource(files.name, None, files.name, None, files.revision)


def identify_reranker(name: str, flag: str) -> str:
    """The content of all that determines its scores: weights, configs, tokenizer, and what says how it reads pairs."""
    base = find_reranker(name, flag=flag).base
    texts = [path for path in Path(base).glob("*") if path.suffix in (".json", ".jinja", ".txt", ".model")]
    return f"{identify_weights(base)}, {identify_large(texts)}"


def choose_pairs(
    source: ModelSource, template: str | None, tokenizer: Any, max_length: int | None, model: Any, prefix: str = ""
) -> RerankerCard:
    """How to tokenize pairs: by the template, else as the tokenizer joins two texts, else by the default template.

    `model`, which needs no weights, gives the number of positions. UserError for an unusable length or template, whose
    flags begin with `prefix`.
    """
    longest = count_positions(model)
    length = max_length or default_max_length(source, tokenizer, longest)
    if longest is not None and length > longest:
        raise UserError(f"--{prefix}max_length {length}: {source.base} has positions for {longest} tokens; lower it")
    is_classifier = any(kind.endswith("ForSequenceClassification") for kind in model.config.architectures or [])
    if template is None and is_classifier and not is_ours(source):
        own = read_pair_files(ModelFiles(source.base, source.revision), model.config, tokenizer.chat_template)
        if own.prompt or own.chat:
            what = f"the prompt {own.prompt!r}" if own.prompt else "its tokenizer's chat template"
            raise UserError(
                f"--{prefix}template: {source.base} reads pairs with {what}, which can't be trained further; give the text "
                "around query and document that it is to be trained with"
            )
    form = PairFormat.of(tokenizer, length)
    if template is None and not form.middle:
        template = DEFAULT_TEMPLATE
    if template is not None:
        form = form.with_template(tokenizer, template)
    pad = padding_token(tokenizer)
    if form.tail and form.tail[-1] == pad and not form.has_types and hasattr(model, "score"):
        raise UserError(
            f"--{prefix}template: a pair would end with token {pad}, the padding token, before which transformers' decoders read "
            "the score; let the template end with a text"
        )
    if form.num_around + 2 > length:
        raise UserError(
            f"--{prefix}max_length {length}: leaves no room beside the {form.num_around} tokens around a pair"
        )
    return RerankerCard(source.base, form, template)


def is_ours(source: ModelSource) -> bool:
    """Whether a run of ours wrote the reranker: its card says how it was trained."""
    return ModelFiles(source.base, source.revision).find(CARD_NAME) is not None


def default_max_length(source: ModelSource, tokenizer: Any, longest: int | None) -> int:
    """Tokens of the longest pair: as the run was trained, else as tokenizer and positions allow, but at most 512."""
    if is_ours(source):
        return tokenizer.model_max_length
    return min(filter(None, (tokenizer.model_max_length, _DEFAULT_MAX_LENGTH, longest)))


def padding_token(tokenizer: Any) -> int:
    """The token that pairs are padded with. UserError if there is none."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id):
        if token is not None:
            return token
    raise UserError("the tokenizer has no pad_token, which batches of pairs need; name one in tokenizer_config.json")


class PairScorer(nn.Module):
    """The classifier in the form that DeepSpeed trains: token ids in, scores out."""

    model: Any
    is_packed = False  # pairs are padded

    def __init__(self, model: nn.Module, has_types: bool):
        super().__init__()
        self.model = model
        self.has_types = has_types

    def forward(
        self, input_ids: Tensor, lengths: Tensor, has_padding: bool = True, first_lengths: Tensor | None = None
    ) -> Tensor:
        """Scores (b, 1) in float32 of token ids (b, S); first_lengths (b,): number of tokens before the document."""
        seen = token_mask(lengths, input_ids.shape[1])
        ids = input_ids.masked_fill(~seen, self.model.config.pad_token_id)  # decoders use it to find the last token
        types = {}
        if self.has_types:
            assert first_lengths is not None
            types = {"token_type_ids": (seen & ~token_mask(first_lengths, ids.shape[1])).long()}
        return self.model(input_ids=ids, attention_mask=seen.long(), **types).logits.float()


def empty_classifier(config: Any, trust_remote_code: bool) -> nn.Module:
    """The classifier of a config, without weights. UserError if transformers has none."""
    from transformers import AutoModelForSequenceClassification

    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(f"{config.name_or_path}: has no classifier's head: {str(error).splitlines()[0]}") from None


def configure(config: Any, tokenizer: Any, name: str) -> Any:
    """The config of the reranker made from a model. UserError for a classifier with several labels."""
    is_classifier = any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise UserError(f"--model_name_or_path {name}: is a classifier of {config.num_labels} labels; a reranker has 1")
    config.num_labels = 1
    config.pad_token_id = padding_token(tokenizer)
    config.use_cache = False
    # Without this, sentence-transformers' CrossEncoder would apply a sigmoid.
    config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
    return config


def load_scorer(
    source: ModelSource,
    config: Any,
    card: RerankerCard,
    *,
    bf16: bool,
    kernel: str | None,
    trust_remote_code: bool,
    seed: int,
) -> tuple[PairScorer, list[str]]:
    """Load the model. Head weights missing from its files are drawn from the seed, and their names are returned.

    UserError for any other missing weight.
    """
    from transformers import AutoModelForSequenceClassification

    use_kernels()
    torch.manual_seed(seed)
    with without_foreign_code(source.base, kernel), without_reports():
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source.base,
            revision=source.revision,
            config=config,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            attn_implementation=kernel,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_weights(source.base, model, report)
    model._weight_conversions = []  # name conversions needed only for reading
    return PairScorer(model, card.pair_format.has_types), sorted(report["missing_keys"])


def head_of_words(
    source: ModelSource, tokenizer: Any, words: list[str], card: RerankerCard, trust_remote_code: bool
) -> np.ndarray:
    """The row (D,) whose product with a decoder's last state is the first word's logit minus the second's.

    A word is the token that follows the template: " yes" if that is a single token, else "yes", else UserError.
    """
    from transformers import AutoModelForCausalLM

    tokens = []
    for word in words:
        spellings = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word)]
        one = [ids[0] for ids in spellings if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
        if not one:
            raise UserError(f"--yes_no {listed(words)}: '{word}' is not one token of {source.tokenizer}; take another")
        tokens.append(one[0] if not (card.template or "").endswith(("\n", " ")) else one[-1])
    with without_foreign_code(source.base), without_reports():
        where = {"revision": source.revision, "trust_remote_code": trust_remote_code}
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.base, output_loading_info=True, **where)
    model, report = loaded
    if model.get_output_embeddings() is None:
        raise UserError(f"--yes_no {listed(words)}: {source.base} is no decoder, so words have no logits")
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"--yes_no {listed(words)}: {source.base} has no weights {missing}, so words have no logits")
    yes, no = model.get_output_embeddings().weight.detach().float()[tokens]
    return (yes - no).numpy()


def put_head(scorer: PairScorer, row: np.ndarray) -> None:
    """Set a decoder's head to the row (D,), in place, also under ZeRO-3. Every rank must call it."""
    from deepspeed import zero

    weight = scorer.model.score.weight
    with (
        zero.GatheredParameters([weight], modifier_rank=0) if hasattr(weight, "ds_id") else nullcontext(),
        torch.no_grad(),
    ):
        if weight.numel():
            weight.copy_(torch.from_numpy(row)[None])


def add_lora_behind_head(scorer: PairScorer, lora: LoraArguments, *, seed: int, dtype: torch.dtype) -> None:
    """Add LoRA matrices to the model inside the classifier, in place; its head is trained in full."""
    prefix = scorer.model.base_model_prefix
    holder: Any = nn.Module()
    holder.backbone = getattr(scorer.model, prefix)
    add_lora(holder, lora, seed=seed, dtype=dtype)
    setattr(scorer.model, prefix, holder.backbone)


def save_reranker(
    scorer: PairScorer, weights: dict[str, Tensor], tokenizer: Any, card: RerankerCard, folder: Path
) -> None:
    """Write a folder that AutoModelForSequenceClassification and CrossEncoder can load; LoRA matrices are merged.

    weights: all weights of the scorer, by name.
    """
    model, prefix = scorer.model, scorer.model.base_model_prefix
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}  # PairScorer's prefix
    inner = getattr(model, prefix)
    if hasattr(inner, "peft_config"):
        weights = _merged(weights, inner, f"{prefix}.")
        setattr(model, prefix, inner.get_base_model())
    model.save_pretrained(folder, state_dict=weights)
    setattr(model, prefix, inner)
    save_tokenizer(pair_tokenizer(tokenizer, card), folder)
    (folder / CARD_NAME).write_text(json.dumps(card.content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_checkpoint(path: Path, folder: Path, trust_remote_code: bool) -> None:
    """Write the model of a checkpoint of a reranker's run, in float32, as the run writes its last one."""
    source, content = checkpoint_source(path, "run")
    parts: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in content["pair_format"].items()}
    card = RerankerCard(**content | {"pair_format": PairFormat(**parts)})
    tokenizer, config = load_tokenizer(source, trust_remote_code), load_config(source, trust_remote_code)
    check_checkpoint(source, getattr(config, "_commit_hash", None))
    config = configure(config, tokenizer, source.base)
    scorer, _ = load_scorer(source, config, card, bf16=False, kernel=None, trust_remote_code=trust_remote_code, seed=0)
    assert source.lora is not None
    if source.lora.lora_rank:
        add_lora_behind_head(scorer, source.lora, seed=0, dtype=torch.float32)
    put_checkpoint_in(scorer, source)
    save_reranker(scorer, scorer.state_dict(), tokenizer, card, folder)


def _merged(weights: dict[str, Tensor], peft: Any, inner: str) -> dict[str, Tensor]:
    """The weights under the plain model's names, with LoRA matrices merged in float32: W + s B A."""
    scalings = {name: getattr(module, "scaling", None) for name, module in peft.named_modules()}
    scales = {name: scaling["default"] for name, scaling in scalings.items() if isinstance(scaling, dict)}
    own, merged = f"{inner}base_model.model.", {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        plain = name.replace(own, inner).replace(".base_layer.", ".")
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            scale = scales[stem.removeprefix(inner)]
            up, down = (weights[f"{stem}.lora_{side}.default.weight"].float() for side in "BA")
            weight = (weight.float() + scale * (up @ down)).to(weight.dtype)
        merged[plain] = weight
    return merged


def pair_tokenizer(tokenizer: Any, card: RerankerCard) -> Any:
    """A tokenizer whose plain call with two texts does what `card` says, including template and length."""
    from tokenizers import processors

    form, backend = card.pair_format, plain_backend(tokenizer)
    inputs = list(tokenizer.model_input_names)
    if card.template is not None:
        inputs = ["input_ids", "attention_mask"]
        named = {f"<{name}>": getattr(form, name) for name in ("head", "middle", "tail") if getattr(form, name)}
        tokens = {name: [backend.id_to_token(i) for i in ids] for name, ids in named.items()}
        special = [{"id": name, "ids": list(ids), "tokens": tokens[name]} for name, ids in named.items()]
        order = ["<head>", "$A", "<middle>", "$B", "<tail>"]
        pair = [part for part in order if part.startswith("$") or part in named]
        backend.post_processor = processors.TemplateProcessing(single="$A", pair=pair, special_tokens=special)
    pad = backend.id_to_token(padding_token(tokenizer))
    return fast_tokenizer(backend, tokenizer, form.max_length, pad, model_input_names=inputs)
