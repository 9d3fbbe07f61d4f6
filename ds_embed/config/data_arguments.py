"""Texts: how they become tokens, and the training files."""

from dataclasses import dataclass

from ds_embed.config.checks import above_zero, at_least, existing_files, one_of
from ds_embed.config.fields import listed, setting

DEFAULT_MAX_LENGTH = 512
DEFAULT_QUERY_PREFIX = "query: "
DEFAULT_DOC_PREFIX = "passage: "


@dataclass
class TextArguments:
    """How a text becomes tokens; the same fields are stored beside a trained model."""

    max_length: int | None = setting(
        "longest text in tokens, special tokens included; the rest is cut off "
        f"(default: the trained model's, else {DEFAULT_MAX_LENGTH})",
        default=None,
    )
    query_max_length: int | None = setting("longest query in tokens (default: max_length)", default=None)
    doc_max_length: int | None = setting("longest document in tokens (default: max_length)", default=None)
    query_prefix: str | None = setting(
        f"text put in front of every query (default: the trained model's, else '{DEFAULT_QUERY_PREFIX}')", default=None
    )
    doc_prefix: str | None = setting(
        f"text put in front of every document (default: the trained model's, else '{DEFAULT_DOC_PREFIX}')", default=None
    )

    def __post_init__(self):
        above_zero(self, "max_length", "query_max_length", "doc_max_length")


@dataclass
class DataArguments(TextArguments):
    train_files: list[str] = setting("JSON or JSONL training files", default_factory=list)
    sampling_probabilities: list[float] = setting(
        "share of the samples that comes from each of train_files, in any unit; a pass is then as many samples as "
        "there are records in all (default: every record once per pass)",
        default_factory=list,
    )
    batching: str = setting(
        "mixed (a global batch holds samples of all files) or homogeneous (of one file)", default="mixed"
    )
    hard_negatives: int = setting("hard negatives (neg_doc) used per query", default=0)
    hard_negatives_sampling: str = setting(
        "which of a record's negatives are used: first (the first ones) or random (others in every pass)",
        default="first",
    )
    skip_bad_records: bool = setting(
        "leave out training records that can't be used, counted by reason, in place of stopping at the first",
        default=False,
    )
    cache_dir: str = setting(
        "folder for prepared tokens, seen by all nodes and reused by later runs", default="~/.cache/ds_embed"
    )

    def __post_init__(self):
        super().__post_init__()
        existing_files("train_files", self.train_files)
        at_least(self, 0, "hard_negatives")
        one_of(self, "batching", ("mixed", "homogeneous"))
        one_of(self, "hard_negatives_sampling", ("first", "random"))
        shares, shown = self.sampling_probabilities, listed(self.sampling_probabilities)
        if shares and len(shares) != len(self.train_files):
            raise ValueError(
                f"--sampling_probabilities {shown}: there are {len(shares)}, and --train_files has "
                f"{len(self.train_files)} files"
            )
        if any(not 0 < share < float("inf") for share in shares):
            raise ValueError(f"--sampling_probabilities {shown}: each must be greater than 0; leave a file out instead")
