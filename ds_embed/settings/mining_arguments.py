"""Mining hard negatives: where candidates come from, and which of them become negatives."""

import math
from dataclasses import dataclass
from pathlib import Path

from ds_embed.settings.checks import above_zero, at_least, existing_files, one_of
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import setting
from ds_embed.settings.model_arguments import ModelArguments

METHODS = ("model", "bm25")


@dataclass
class MiningModelArguments(ModelArguments):
    """BM25, and vectors that were written before, need no model."""

    model_name_or_path: str | None = setting("run or model that encodes queries and documents", default=None)


@dataclass(kw_only=True)
class MiningArguments:
    train_files: list[str] = setting("training files whose records get negatives, in every form that training reads")
    columns: list[str] = setting(
        "which key or column of the training files holds what, as in training", default_factory=list
    )
    corpus_files: list[str] = setting(
        "documents that training records name by id, as in training", default_factory=list
    )
    output_file: str = setting("JSONL file that gets the records, in order, with neg_doc, pos_score and neg_scores")
    work_dir: str | None = setting(
        "folder of the work in progress, seen by all nodes, removed at the end (default: output_file + .work)",
        default=None,
    )
    method: str = setting("candidates by the model's vectors (model) or by shared words (bm25)", default="model")
    embeddings: str | None = setting(
        "folder OUT/consumed_samplesX with vectors of the records' query_id and doc_id, in place of a model",
        default=None,
    )
    doc_files: list[str] = setting(
        "files of the documents to choose from (default: the pos_doc of all training records)", default_factory=list
    )
    include_neg_docs: bool = setting("choose from the neg_doc of the training records too", default=False)
    num_negatives: int = setting("negatives mined for a record", default=4)
    range_min: int = setting("of the candidates that the rules leave, so many of the best are skipped", default=0)
    range_max: int | None = setting(
        "candidates of a query, its best documents that are not its positives (default: range_min + 10 num_negatives)",
        default=None,
    )
    absolute_margin: float | None = setting(
        "a negative's score is at most the positive's less this, in units of the score", default=None
    )
    relative_margin: float | None = setting(
        "a negative's score is at most the positive's less this share of its size; 0.05 is NV-Retriever's "
        "TopK-PercPos with 95 percent (default: no margin)",
        default=None,
    )
    max_score: float | None = setting("highest score of a negative", default=None)
    min_score: float | None = setting("lowest score of a negative", default=None)
    match_positives: str = setting(
        "texts that are one document: normalized (equal but for case, white space and Unicode form) or exact",
        default="normalized",
    )
    sampling: str = setting("which of the candidates left are taken: top (the best) or random", default="top")
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
    )
    cross_encoder_bf16: bool = setting(
        "compute the cross-encoder in bfloat16, whose scores have 3 digits", default=False
    )
    cross_encoder_scores: str = setting(
        "logit (with 2 labels: the second less the first) or probability (its sigmoid)", default="logit"
    )
    bm25_k1: float = setting("BM25's saturation of repeated words", default=1.5)
    bm25_b: float = setting("BM25's share of length normalisation, in [0, 1]", default=0.75)
    deepspeed: str | None = setting("path of a DeepSpeed JSON for encoding (default: each rank holds it)", default=None)
    bf16: bool = setting("bfloat16 weights and activations of the model; false computes in float32", default=True)
    micro_batch_tokens: int = setting("padded tokens per forward pass of one rank: sets the memory", default=16384)

    def __post_init__(self):
        existing_files("train_files", self.train_files)
        for name in ("doc_files", "corpus_files"):
            if getattr(self, name):
                existing_files(name, getattr(self, name))
        one_of(self, "method", METHODS)
        one_of(self, "sampling", ("top", "random"))
        one_of(self, "match_positives", ("normalized", "exact"))
        one_of(self, "cross_encoder_scores", ("logit", "probability"))
        above_zero(self, "num_negatives", "cross_encoder_max_length", "micro_batch_tokens")
        at_least(self, 0, "range_min", "absolute_margin", "relative_margin", "bm25_k1", "bm25_b")
        if self.bm25_b > 1:
            raise UserError(f"--bm25_b {self.bm25_b}: must be in [0, 1]")
        for name in ("absolute_margin", "relative_margin", "max_score", "min_score"):
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name} {getattr(self, name)}: must be a number")
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

    def check_model(self, model: MiningModelArguments) -> None:
        """UserError when the model is missing, or given beside what takes its place."""
        if self.method == "model" and (self.embeddings is None) == (model.model_name_or_path is None):
            raise UserError("--method model: give one of --model_name_or_path and --embeddings")
        if self.method == "bm25" and model.model_name_or_path is not None:
            raise UserError("--method bm25: uses no model; leave --model_name_or_path out, or choose --method model")
