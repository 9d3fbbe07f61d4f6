"""What a run is made from, as short strings by name, so that a resumed run is the same run or reports what changed."""

from dataclasses import asdict
from typing import Any

from ds_embed.artifact.identity import identify_files, identify_tokenizer
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.loading import ModelSource
from ds_embed.models.reranker import RerankerCard
from ds_embed.settings import DataArguments, LoraArguments, OptimizerArguments, RunArguments, StepArguments

# These settings change how the work is done, or how much of it; all others affect the numbers. The settings of texts
# are taken from the card, which has their defaults filled in.
_LOGISTICS = {
    "micro_batch_tokens",
    "grad_cache",
    "gradient_checkpointing",
    "train_files",
    "guide_embeddings",
    "teacher_embeddings",
    "cache_dir",
    "max_length",
    "query_max_length",
    "doc_max_length",
    "query_prefix",
    "doc_prefix",
    "max_steps",
    "num_train_epochs",
}
_RUN_SETTINGS = ("seed", "bf16")
_CARD_SETTINGS = (
    "pooling",
    "bidirectional",
    "query_prefix",
    "doc_prefix",
    "query_max_length",
    "doc_max_length",
    "append_eos",
    "include_prompt",
    "head",
    "strip",
    "pair_format",  # of a reranker
)


def fingerprint(
    manifest: dict[str, Any],
    source: ModelSource,
    commit: str | None,
    card: EmbeddingCard | RerankerCard,
    lora: LoraArguments,
    data: DataArguments,
    step: StepArguments,
    optimizer: OptimizerArguments,
    run: RunArguments,
    vectors: dict[str, str],
) -> dict[str, str]:
    """Everything that affects the numbers of a run, by the name of its flag if it has one.

    `manifest` is the token store's; `vectors` identifies the vectors of a guide and a teacher by their flags. `commit`
    is the revision of a model from the hub.
    """
    known = {"train_files": identify_files(manifest), "tokenizer": identify_tokenizer(manifest)}
    known |= source.identify(commit)
    known |= {name: repr(getattr(card, name)) for name in _CARD_SETTINGS if hasattr(card, name)}
    for group in (lora, data, step, optimizer):
        settings = {name: value for name, value in asdict(group).items() if not name.startswith("val_")}
        known |= {name: repr(value) for name, value in settings.items() if name not in _LOGISTICS}
    return known | vectors | {name: repr(getattr(run, name)) for name in _RUN_SETTINGS}
