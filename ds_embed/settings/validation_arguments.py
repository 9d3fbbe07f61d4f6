"""Validation during training, selection of the best checkpoints, and early stopping."""

import os
import re
from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, optional, setting, several

_TEST_SETS = "val_query_files|val_sets"
_ANYTHING = f"val_files|{_TEST_SETS}"


@dataclass
class ValidationArguments(Settings):
    """Without val_*_files and val_sets, no validation runs. All of these settings may change when a run is resumed."""

    val_files: list[str] = several(
        "held-out records in the format of train_files, for val_loss and val_accuracy (accuracy within the batch); for "
        "scored pairs (pair_loss), val_spearman: the rank correlation of cosine and score, averaged over the files",
        files=True,
    )
    val_query_files: list[str] = several(
        "held-out queries (query, query_id, and doc_id of the relevant document) for retrieval over all of val_doc_files",
        files=True,
    )
    val_doc_files: list[str] = several("documents (pos_doc, doc_id) that val_query_files are searched in", files=True)
    val_sets: list[str] = several(
        "additional test sets as NAME=FOLDER, with queries.jsonl and docs.jsonl in FOLDER (as convert --output_format "
        "test writes them); their measures are named NAME/nDCG@10, and mean/nDCG@10 is the mean over all sets"
    )
    val_metrics: list[str] = several(
        "measures, named as in ir-measures (default: nDCG@10 RR@10 R@1 R@10 R@100)", needs=_TEST_SETS
    )
    val_check_interval: int = setting(
        "optimizer steps between validations; 0 validates only after the last step, which is always validated",
        0,
        at_least=0,
        needs=_ANYTHING,
    )
    val_each_epoch: bool = setting(
        "also validate at the end of each pass over the training data", False, needs=_ANYTHING
    )
    val_before_training: bool = setting(
        "also validate before the first step; it never counts as the best", False, needs=_ANYTHING
    )
    ignore_identical_ids: bool = setting(
        "ignore the document that has the same id as the query, for queries that are also documents (ArguAna, Quora)",
        False,
        needs=_TEST_SETS,
    )
    val_save_embeddings: bool = setting(
        "keep the vectors of every validation in output_dir/validation/consumed_samplesX/, as generate writes them",
        False,
        needs=_TEST_SETS,
    )
    best_metric: str | None = optional(
        "metric that selects the best checkpoint: val_loss (lower is better), val_accuracy, val_spearman or one of "
        "val_metrics (default: the first of val_metrics on the first test set, or val_loss without a test set)",
        needs=_ANYTHING,
    )
    save_top_k: int = setting(
        "number of best checkpoints to save and keep, in addition to the newest save_total_limit ones; 0 keeps none",
        1,
        at_least=0,
        needs=_ANYTHING,
    )
    load_best_at_end: bool = setting(
        "write the best checkpoint to output_dir/model instead of the last step", False, needs=_ANYTHING
    )
    early_stopping_patience: int = setting(
        "end training after this many consecutive validations without an improvement of best_metric; 0 disables this",
        0,
        at_least=0,
        needs="val_check_interval|val_each_epoch",
    )
    early_stopping_min_delta: float = setting(
        "early stopping counts a change of best_metric as an improvement only if it exceeds this (in the metric's unit)",
        0.0,
        at_least=0,
        needs="early_stopping_patience",
    )

    @property
    def is_on(self) -> bool:
        return bool(self.val_files or self.test_sets())

    def test_sets(self) -> dict[str, tuple[list[str], list[str]]]:
        """{name: (query files, document files)}; the name of val_query_files is ""."""
        sets = {"": (self.val_query_files, self.val_doc_files)} if self.val_query_files else {}
        for entry in self.val_sets:
            name, _, folder = entry.partition("=")
            if not (re.fullmatch(r"[\w.-]*\w[\w.-]*", name) and folder) or name in (*sets, "mean"):
                raise UserError(
                    f"--val_sets {entry}: expected NAME=FOLDER with unique names; the name mean is reserved"
                )
            files = [[os.path.join(folder, f"{kind}.jsonl")] for kind in ("queries", "docs")]
            for (path,) in files:
                if not os.path.isfile(path):
                    raise UserError(f"--val_sets {entry}: {path}: no such file")
            sets[name] = files[0], files[1]
        return sets

    def __post_init__(self):
        super().__post_init__()
        for name, other in (("val_query_files", "val_doc_files"), ("val_doc_files", "val_query_files")):
            if getattr(self, name) and not getattr(self, other):
                raise UserError(f"--{name}: retrieval needs queries and documents; give --{other} too")
        self.test_sets()
        if self.load_best_at_end and not self.save_top_k:
            raise UserError("--load_best_at_end true: has no effect without --save_top_k 1 or more; add that")
