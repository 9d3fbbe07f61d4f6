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
        "training files whose records get negatives, in any format that training reads", files=True
    )
    columns: list[str] = setting(
        "mapping of our keys to those of the training files, as in training", default_factory=list
    )
    corpus_files: list[str] = setting(
        "documents that training records refer to by id, as in training", default_factory=list, files=True
    )
    output_file: str = setting("JSONL file for the records, in order, with neg_doc, pos_score and neg_scores")
    work_dir: str | None = setting(
        "folder for work in progress, visible to all nodes, removed at the end (default: output_file + .work)",
        default=None,
    )
    method: str = setting(
        "how candidates are found: by the model's vectors (model) or by BM25 (bm25)", default="model", choices=METHODS
    )
    embeddings: str | None = setting(
        "folder OUT/consumed_samplesX with vectors for the records' query_id and doc_id, instead of a model",
        default=None,
    )
    doc_files: list[str] = setting(
        "files of the documents to choose from (default: the pos_doc of all training records)",
        default_factory=list,
        files=True,
    )
    include_neg_docs: bool = setting("also choose from the neg_doc of the training records", default=False)
    num_negatives: int = setting("negatives mined per record", default=4, above=0)
    range_min: int = setting(
        "number of top candidates to skip, after the margin and score rules", default=0, at_least=0
    )
    range_max: int | None = setting(
        "candidates per query: its highest-scoring documents except its positives (default: range_min + 10 "
        "num_negatives)",
        default=None,
    )
    absolute_margin: float | None = setting(
        "a negative must score at least this much below the positive, in units of the score", default=None, at_least=0
    )
    relative_margin: float | None = setting(
        "a negative must score below the positive by at least this fraction of the positive's absolute score; 0.05 is "
        "NV-Retriever's TopK-PercPos with 95 percent (default: no margin)",
        default=None,
        at_least=0,
    )
    max_score: float | None = setting("highest score of a negative", default=None)
    min_score: float | None = setting("lowest score of a negative", default=None)
    match_positives: str = setting(
        "when two texts count as the same document: normalized (equal up to case, white space and Unicode "
        "normalization) or exact",
        default="normalized",
        choices=("normalized", "exact"),
    )
    sampling: str = setting(
        "which of the remaining candidates are taken: top (the best) or random",
        default="top",
        choices=("top", "random"),
    )
    seed: int = setting("seed of --sampling random", default=42)
    keep_existing: bool = setting(
        "append the mined negatives to a record's own neg_doc instead of replacing it", default=False
    )
    drop_without_negatives: bool = setting("drop records that end up without a negative", default=False)
    cross_encoder: str | None = setting(
        "cross-encoder that rescores positives and candidates: a run of recipes/train_reranker.py, or the folder or hub "
        "name of a sequence classifier with 1 or 2 labels",
        default=None,
    )
    cross_encoder_max_length: int | None = setting(
        "maximum pair length for the cross-encoder in tokens (default: as in its training, else what it supports, at most "
        "512)",
        default=None,
        above=0,
    )
    cross_encoder_bf16: bool = setting(
        "run the cross-encoder in bfloat16, which gives scores of about 3 digits", default=False
    )
    cross_encoder_scores: str = setting(
        "logit (with 2 labels: the second minus the first) or probability (its sigmoid)",
        default="logit",
        choices=("logit", "probability"),
    )
    bm25_k1: float = setting("BM25's k1: saturation of term frequency", default=1.5, at_least=0)
    bm25_b: float = setting("BM25's b: amount of length normalization", default=0.75, at_least=0, at_most=1)
    deepspeed: str | None = setting(
        "DeepSpeed JSON for encoding (default: every rank holds the whole model)", default=None
    )
    bf16: bool = setting("bfloat16 weights and activations of the model; false computes in float32", default=True)
    micro_batch_tokens: int = setting(
        "padded tokens per forward pass of one rank; determines memory use", default=16384, above=0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.range_max is not None and self.range_max - self.range_min < self.num_negatives:
            raise UserError(
                f"--range_max {self.range_max}: with --range_min {self.range_min} this leaves too few candidates for "
                f"--num_negatives {self.num_negatives}; raise it to at least {self.range_min + self.num_negatives}"
            )
        if self.method == "bm25" and self.embeddings is not None:
            raise UserError("--method bm25: uses no vectors; remove --embeddings, or choose --method model")
        if self.include_neg_docs and self.embeddings is not None:
            raise UserError(
                "--include_neg_docs true: a neg_doc has no id by which its vector could be found in --embeddings"
            )
        if Path(self.output_file).is_dir():
            raise UserError(f"--output_file {self.output_file}: is a folder; give a file name")

    @property
    def num_candidates(self) -> int:
        """Documents in a query's pool."""
        return self.range_min + 10 * self.num_negatives if self.range_max is None else self.range_max

    def check_model(self, model: ModelArguments) -> None:
        """Raise UserError if the model is missing, or given together with --embeddings or --method bm25."""
        if self.method == "model" and (self.embeddings is None) == (not model.model_name_or_path):
            raise UserError("--method model: give either --model_name_or_path or --embeddings")
        if self.method == "bm25" and model.model_name_or_path:
            raise UserError("--method bm25: uses no model; remove --model_name_or_path, or choose --method model")
