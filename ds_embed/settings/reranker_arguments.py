"""Training a reranker: settings that differ from training an embedder. Those that don't apply are constants."""

from dataclasses import dataclass
from typing import ClassVar

from ds_embed.settings.data_arguments import DataArguments, unescape
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, constants_of, optional, same_as, setting, several
from ds_embed.settings.model_arguments import LoraArguments, ModelArguments
from ds_embed.settings.run_arguments import OptimizerArguments, RunArguments
from ds_embed.settings.step_arguments import StepArguments
from ds_embed.settings.validation_arguments import ValidationArguments

LOSSES = ("listwise", "bce", "kl")


@constants_of(ModelArguments)
@dataclass(kw_only=True)
class RerankerModelArguments(Settings):
    model_name_or_path: str = setting("model folder or hub name: an encoder, decoder, reranker, or reranker's run")
    model_revision: str | None = same_as(ModelArguments, "model_revision")
    template: str | None = optional(
        r"text around query and document, such as 'query: {query}\ndocument: {document}\nrelevant:'; \n is a line break "
        "(default: the tokenizer's own way of joining two texts; if it puts nothing between them, as with most decoders, "
        "the example above)"
    )
    yes_no: list[str] = several(
        "two words, such as yes no; a decoder's new head is initialized to the difference of their logits after the "
        "template"
    )
    attn_implementation: str | None = same_as(ModelArguments, "attn_implementation")
    trust_remote_code: bool = same_as(ModelArguments, "trust_remote_code")

    def __post_init__(self):
        super().__post_init__()
        if self.attn_implementation == "varlen":
            raise UserError("--attn_implementation varlen: not for rerankers, whose pairs are padded; leave it out")
        if self.template is not None:
            self.template = unescape(self.template)
        if self.yes_no and len(self.yes_no) != 2:
            raise UserError(
                f"--yes_no {' '.join(self.yes_no)}: give exactly two words, first the one that means relevant"
            )


@dataclass(kw_only=True)
class RerankerLoraArguments(LoraArguments):
    # Runs are merged when they are saved.
    new_lora: ClassVar[bool] = False  # type: ignore[misc]

    def __post_init__(self):
        super().__post_init__()
        if self.lora_variant in ("dora", "pissa"):
            raise UserError(f"--lora_variant {self.lora_variant}: rerankers support lora and rslora only")


@constants_of(DataArguments)
@dataclass(kw_only=True)
class RerankerDataArguments(Settings):
    train_files: list[str] = same_as(DataArguments, "train_files")
    columns: list[str] = same_as(DataArguments, "columns")
    corpus_files: list[str] = same_as(DataArguments, "corpus_files")
    max_length: int | None = optional(
        "maximum length of a pair in tokens, including template and special tokens; the longer of the two texts is "
        "truncated (default: from the tokenizer, at most 512)",
        above=0,
    )
    hard_negatives: int = setting(
        "hard negatives (neg_doc) in each query's group; some are repeated if a record has fewer", 7, at_least=1
    )
    hard_negatives_sampling: str = same_as(DataArguments, "hard_negatives_sampling")
    skip_bad_records: bool = same_as(DataArguments, "skip_bad_records")
    cache_dir: str = same_as(DataArguments, "cache_dir")


@constants_of(StepArguments)
@dataclass(kw_only=True)
class RerankerStepArguments(Settings):
    global_batch_size: int = same_as(StepArguments, "global_batch_size")
    micro_batch_tokens: int = same_as(StepArguments, "micro_batch_tokens")
    loss: str = setting(
        "listwise (softmax over each query's group), bce (binary cross-entropy on each pair) or kl (KL divergence from a "
        "teacher's pos_score and neg_scores)",
        "listwise",
        choices=LOSSES,
    )
    distillation_temperature: float = same_as(StepArguments, "distillation_temperature", needs="loss kl")
    grad_cache: bool = same_as(StepArguments, "grad_cache")
    gradient_checkpointing: bool = same_as(StepArguments, "gradient_checkpointing")
    negatives: ClassVar[str] = "pair"  # a query's documents are its own
    temperature: ClassVar[float] = 1.0


@dataclass(kw_only=True)
class RerankerValidationArguments(ValidationArguments):
    best_metric: str | None = optional(
        "metric that selects the best checkpoint: nDCG@10 or RR@10 after reranking each held-out record's own documents, "
        "val_loss (lower is better) or val_accuracy (default: nDCG@10)",
        needs="val_files",
    )
    val_query_files: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc, assignment]
    val_doc_files: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc, assignment]
    val_sets: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc, assignment]
    val_metrics: ClassVar[tuple[str, ...]] = ()  # type: ignore[misc, assignment]
    ignore_identical_ids: ClassVar[bool] = False  # type: ignore[misc]
    val_save_embeddings: ClassVar[bool] = False  # type: ignore[misc]


RERANKER_ARGUMENTS = (
    RerankerModelArguments,
    RerankerLoraArguments,
    RerankerDataArguments,
    RerankerStepArguments,
    OptimizerArguments,
    RunArguments,
    RerankerValidationArguments,
)
RERANKER_DEFAULTS = {"learning_rate": 2e-5, "global_batch_size": 32}
