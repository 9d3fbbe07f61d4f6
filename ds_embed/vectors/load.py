"""The encoder of a job that encodes: frozen, as its card says, with the adapter beside the base or merged into it."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ds_embed.data.tokenize import TextTokenizer
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.encoder import TextEncoder
from ds_embed.models.fit import check_parts
from ds_embed.models.loading import ModelSource, choose_card, load_config, load_encoder, load_tokenizer
from ds_embed.models.varlen import VARLEN_KERNEL, why_not_varlen
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.vectors.encode import encode_tokens

_TEXTS = (
    "What is the capital of France?",
    "how do I sort a list of words by their length in Python",
    "Aspirin inhibits the formation of thromboxane in platelets.",
    "def area(radius):\n    return 3.14159 * radius ** 2",
    "The train to Geneva leaves at 7:45 from platform 3 and takes 2 hours and 43 minutes.",
    "naïve café, Привет, 日本語",
    "An old violin maker in Cremona, it is said, would not sell an instrument before he had played it for a year.",
    "no",
)


def identify_with_card(source: ModelSource, card: EmbeddingCard, trust_remote_code: bool) -> dict[str, str]:
    """What vectors of this model say of it in their manifest, as other_model compares it."""
    here = source.identify(getattr(load_config(source, trust_remote_code), "_commit_hash", None))
    return here | {name: repr(getattr(card, name)) for name in ("pooling", "head", "bidirectional")}


@dataclass(frozen=True)
class ModelToEncode:
    """A model that was found: how its texts become vectors, and what loads its encoder, frozen."""

    source: ModelSource
    card: EmbeddingCard
    tokenizer: Any
    arguments: ModelArguments

    @classmethod
    def of(cls, source: ModelSource, text: TextArguments, arguments: ModelArguments) -> "ModelToEncode":
        card = choose_card(source, text, arguments)
        return cls(source, card, load_tokenizer(source, arguments.trust_remote_code), arguments)

    def check(self) -> None:
        """UserError when its parts don't fit."""
        check_parts(self.source, self.card, self.tokenizer, self.arguments.trust_remote_code)

    def with_kernel(self, world: World, bf16: bool) -> tuple["ModelToEncode", str | None]:
        """The same, to be loaded with the varlen kernel if nothing speaks against that, and what does. On every rank."""
        config, asked = load_config(self.source, self.arguments.trust_remote_code), self.arguments.attn_implementation
        reason = why_not_varlen(config, asked, world, bf16=bf16, is_trained=False)
        if reason is not None:
            return self, reason
        return replace(self, arguments=replace(self.arguments, attn_implementation=VARLEN_KERNEL)), None

    def load(self, *, bf16: bool) -> TextEncoder:
        """The encoder, with an adapter beside its base."""
        asked = {name: getattr(self.arguments, name) for name in ("attn_implementation", "trust_remote_code")}
        encoder = load_encoder(self.source, **self.card.encoding, bf16=bf16, **asked)
        return encoder.eval().requires_grad_(False)

    def load_merged(self, *, bf16: bool, device: torch.device | str) -> tuple[TextEncoder, float]:
        """The encoder with the adapter merged into the base in float32 and then rounded to bfloat16 if asked.

        And the smallest cosine of a few texts' vectors to those of base and adapter side by side in float32.
        """
        encoder = self.load(bf16=False).to(device)
        texts = TextTokenizer(self.tokenizer, self.card.text_formats()[0])
        tokens = texts.encode(_TEXTS)
        before = encode_tokens(encoder, tokens, texts.prompt_length)
        encoder.backbone = encoder.backbone.merge_and_unload(safe_merge=True)
        if bf16:
            for parameter in encoder.parameters():  # buffers, such as rotary frequencies, stay as exact as they are
                parameter.data = parameter.data.bfloat16()
        after = encode_tokens(encoder, tokens, texts.prompt_length)
        return encoder, torch.nn.functional.cosine_similarity(before.double(), after.double()).min().item()


def check_merging(source: ModelSource, model: ModelArguments, stage: int = 0) -> None:
    """UserError when there is no adapter that could be merged, or the base's weights are not whole numbers here."""
    reason = None
    if not source.is_adapted:
        reason = f"{model.model_name_or_path} has no LoRA adapter; leave the flag out"
    elif source.load_in_4bit is not None:
        reason = f"would round the adapter to 4 bits with its base; leave out --load_in_4bit {source.load_in_4bit}"
    elif stage == 3:
        reason = "under ZeRO-3 no rank holds a whole weight; leave out --deepspeed, or export the merged model first"
    if reason is not None:
        raise UserError(f"--merge_adapter true: {reason}")
