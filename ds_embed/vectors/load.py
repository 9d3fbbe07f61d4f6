"""The encoder of a job that encodes: frozen, as its card says, with the adapter beside the base or merged into it."""

from typing import Any

import torch

from ds_embed.data.tokenize import TextTokenizer
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.encoder import TextEncoder
from ds_embed.models.loading import ModelSource, load_encoder
from ds_embed.settings import ModelArguments
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


def load_frozen(source: ModelSource, card: EmbeddingCard, model: ModelArguments, *, bf16: bool) -> TextEncoder:
    """As load_encoder, with vectors as the card says."""
    encoder = load_encoder(
        source,
        pooling=card.pooling,
        bidirectional=card.bidirectional,
        bf16=bf16,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        head=card.head,
    )
    return encoder.eval().requires_grad_(False)


def load_merged(
    source: ModelSource,
    card: EmbeddingCard,
    tokenizer: Any,
    model: ModelArguments,
    *,
    bf16: bool,
    device: torch.device | str,
) -> tuple[TextEncoder, float]:
    """The encoder, frozen, with the adapter merged into the base in float32 and then rounded to bfloat16 if asked.

    And the smallest cosine of a few texts' vectors to those of base and adapter side by side in float32.
    """
    encoder = load_frozen(source, card, model, bf16=False).to(device)
    texts = TextTokenizer(tokenizer, card.text_formats()[0])
    tokens = texts.encode(_TEXTS)
    before = encode_tokens(encoder, tokens, texts.prompt_length)
    encoder.backbone = encoder.backbone.merge_and_unload(safe_merge=True)
    if bf16:
        for parameter in encoder.parameters():  # buffers, such as rotary frequencies, stay as exact as they are
            parameter.data = parameter.data.bfloat16()
    after = encode_tokens(encoder, tokens, texts.prompt_length)
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double()).min().item()
    return encoder, cosine
