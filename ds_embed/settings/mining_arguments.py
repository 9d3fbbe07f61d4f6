"""Mining hard negatives: where candidates come from, and which of them become negatives."""

from dataclasses import dataclass
from pathlib import Path

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, setting
from ds_embed.settings.model_arguments import ModelArguments

METHODS = ("model", "bm25")


# BM25, and vectors that were written before, need no model.
MINING_DEFAULTS = {"model_name_or_path": ""}


@dataclass(kw_only=True)
class MiningArguments(Settings):
    train_files: list[str] = setting(
        "training files whose records get negatives, in every form that training reads", files=True
    )
    columns: list[str] = setting(
        "which key or column of the training files holds what, as in training", default_factory=list
    )
    corpus_files: list[str] = setting(
        "documents that training records name by id, as in training", default_factory=list, files=True
    )
    output_file: str = setting("JSONL file that gets the records, in order, with neg_doc, pos_score and neg_scores")
    work_dir: str | None = setting(
        "folder of the work in progress, seen by all nodes, removed at the end (default: output_file + .work)",
        default=None,
    )
    method: str = setting(
        "candidates by the model's vectors (model) or by shared words (bm25)", default="model", choices=METHODS
    )
    embeddings: str | None = setting(
        "folder OUT/consumed_samplesX with vectors of the records' query_id and doc_id, in place of a model",
        default=None,
    )
    doc_files: list[str] = setting(
        "files of the documents to choose from (default: the pos_doc of all training records)",
        default_factory=list,
        files=True,
    )
    include_neg_docs: bool = setting("choose from the neg_doc of the training records too", default=False)
    num_negatives: int = setting("negatives mined for a record", default=4, above=0)
    range_min: int = setting(
        "of the candidates that the rules leave, so many of the best are skipped", default=0, at_least=0
    )
    range_max: int | None = setting(
        "candidates of a query, its best documents that are not its positives (default: range_min + 10 num_negatives)",
        default=None,
    )
    absolute_margin: float | None = setting(
        "a negative's score is at most the positive's less this, in units of the score", default=None, at_least=0
    )
    relative_margin: float | None = setting(
        "a negative's score is at most the positive's less this share of its size; 0.05 is NV-Retriever's "
        "TopK-PercPos with 95 percent (default: no margin)",
        default=None,
        at_least=0,
    )
    max_score: float | None = setting("highest score of a negative", default=None)
    min_score: float | None = setting("lowest score of a negative", default=None)
    match_positives: str = setting(
        "texts that are one document: normalized (equal but for case, white space and Unicode form) or exact",
        default="normalized",
        choices=("normalized", "exact"),
    )
    sampling: str = setting(
        "which of the candidates left are taken: top (the best) or random", default="top", choices=("top", "random")
    )
    seed: int = setting("seed of --sampling random", default=42)
    keep_existing: bool = setting(
        "put the mined negatives behind a record's own neg_doc, not in its place", default=False
    )
    drop_without_negatives: bool = setting("leave out records that have no negative in the end", default=False)
    cross_encoder: str | None = setting(
        "run of recipes/train_reranker.py, or folder or hub name of a sequence classifier with 1 or 2 labels, that scores "
        "positives and candidates anew",
        default=None,
    )
    cross_encoder_max_length: int | None = setting(
        "longest pair for the cross-encoder in tokens (default: as its run was trained, else what it allows, at most 512)",
        default=None,
        above=0,
    )
    cross_encoder_bf16: bool = setting(
        "compute the cross-encoder in bfloat16, whose scores have 3 digits", default=False
    )
    cross_encoder_scores: str = setting(
        "logit (with 2 labels: the second less the first) or probability (its sigmoid)",
        default="logit",
        choices=("logit", "probability"),
    )
    bm25_k1: float = setting("BM25's saturation of repeated words", default=1.5, at_least=0)
    bm25_b: float = setting("BM25's share of length normalisation", default=0.75, at_least=0, at_most=1)
    deepspeed: str | None = setting("path of a DeepSpeed JSON for encoding (default: each rank holds it)", default=None)
    bf16: bool = setting("bfloat16 weights and activations of the model; false computes in float32", default=True)
    micro_batch_tokens: int = setting(
        "padded tokens per forward pass of one rank: sets the memory", default=16384, above=0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.range_max is not None and self.range_max - self.range_min < self.num_negatives:
            raise UserError(
                f"--range_max {self.range_max}: less --range_min {self.range_min} it leaves too few candidates for "
                f"--num_negatives {self.num_negatives}; raise it to at least {self.range_min + self.num_negatives}"
            )
        if self.method == "bm25" and self.embeddings is not None:
            raise UserError("--method bm25: uses no vectors; leave --embeddings out, or choose --method model")
        if self.include_neg_docs and self.embeddings is not None:
            raise UserError("--include_neg_docs true: a neg_doc has no id to find its vector in --embeddings by")
        if Path(self.output_file).is_dir():
            raise UserError(f"--output_file {self.output_file}: is a folder; give a file name")

    @property
    def num_candidates(self) -> int:
        """Documents in a query's pool."""
        return self.range_min + 10 * self.num_negatives if self.range_max is None else self.range_max

    def check_model(self, model: ModelArguments) -> None:
        """UserError when the model is missing, or given beside what takes its place."""
        if self.method == "model" and (self.embeddings is None) == (not model.model_name_or_path):
            raise UserError("--method model: give one of --model_name_or_path and --embeddings")
        if self.method == "bm25" and model.model_name_or_path:
            raise UserError("--method bm25: uses no model; leave --model_name_or_path out, or choose --method model")
