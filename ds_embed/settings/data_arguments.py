"""Texts: how they become tokens, and the training files."""

import re
from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, listed, setting

DEFAULT_MAX_LENGTH = 512
DEFAULT_QUERY_PREFIX = "query: "
DEFAULT_DOC_PREFIX = "passage: "
TEXT_PLACE = "{text}"
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass
class TextArguments(Settings):
    """How a text becomes tokens; the same fields are stored beside a trained model."""

    max_length: int | None = setting(
        "longest text in tokens, special tokens included; the rest is cut off "
        f"(default: as the model's own files say, else {DEFAULT_MAX_LENGTH})",
        default=None,
        above=0,
    )
    query_max_length: int | None = setting("longest query in tokens (default: max_length)", default=None, above=0)
    doc_max_length: int | None = setting("longest document in tokens (default: max_length)", default=None, above=0)
    query_prefix: str | None = setting(
        f"text put in front of every query, such as an instruction; with {TEXT_PLACE} in it, the query stands there; "
        rf"\n is a new line (default: as the model's own files say, else '{DEFAULT_QUERY_PREFIX}')",
        default=None,
    )
    doc_prefix: str | None = setting(
        "text put in front of every document, as query_prefix "
        f"(default: as the model's own files say, else '{DEFAULT_DOC_PREFIX}')",
        default=None,
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("query_prefix", "doc_prefix"):
            if getattr(self, name) is not None:
                check_prefix(name, getattr(self, name))


def check_prefix(name: str, prefix: str) -> None:
    """UserError unless the text has at most one place in a prefix, and nothing else has one."""
    places = re.findall(r"\{\w*\}", prefix)
    if places not in ([], [TEXT_PLACE]):
        raise UserError(f"--{name} '{prefix}': only {TEXT_PLACE} can stand in it, once; found {' '.join(places)}")


def unescape(prefix: str) -> str:
    r"""What a prefix given as a flag or in YAML stands for: \n, \t and \\ written out."""
    return re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], prefix)


@dataclass(kw_only=True)
class DataArguments(TextArguments):
    train_files: list[str] = setting(
        "training records: files (JSON, JSONL, CSV, TSV, Parquet, packed or not), folders of such, patterns, URLs, "
        "data sets as NAME:SPLIT or NAME:CONFIG:SPLIT; docs/data_formats.md has the forms",
        files=True,
    )
    columns: list[str] = setting(
        "which key or column holds what in the training and held-out records, such as query=question "
        "neg_doc=worse,worst; in_order takes the columns of tables as query, positive, negatives (default: the form "
        "is told by the keys)",
        default_factory=list,
    )
    corpus_files: list[str] = setting(
        "documents that training records name by id, as Tevatron's positive_document_ids do",
        default_factory=list,
        files=True,
    )
    positives: str = setting(
        "of a record with several positives: all (each is a sample) or random (one of them is drawn in every pass)",
        default="all",
        choices=("all", "random"),
    )
    sampling_probabilities: list[float] = setting(
        "share of the samples that comes from each of train_files, in any unit; a pass is then as many samples as "
        "there are records in all (default: every record once per pass)",
        default_factory=list,
        above=0,
    )
    query_prefixes: list[str] = setting(
        "query_prefix of each of train_files, where they need different instructions; query_prefix is then the one "
        "that the trained model gets for later queries",
        default_factory=list,
    )
    doc_prefixes: list[str] = setting("the same for documents, with doc_prefix", default_factory=list)
    batching: str = setting(
        "mixed (a global batch holds samples of all files), homogeneous (of one file) or clustered (mixed, and records that "
        "share documents stand together, so that there are fewer texts to encode)",
        default="mixed",
        choices=("mixed", "homogeneous", "clustered"),
    )
    hard_negatives: int = setting(
        "hard negatives (neg_doc) used per query; those of records that have none are the batch's documents alone",
        default=0,
        at_least=0,
    )
    hard_negatives_sampling: str = setting(
        "which of a record's negatives are used: first (the first ones) or random (others in every pass)",
        default="first",
        choices=("first", "random"),
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
        if self.batching == "clustered" and self.positives == "random":
            raise UserError(
                "--batching clustered: goes by each record's positive document, and --positives random draws one; set "
                "--positives all or --batching mixed"
            )
        shares, shown = self.sampling_probabilities, listed(self.sampling_probabilities)
        if shares and len(shares) != len(self.train_files):
            raise UserError(
                f"--sampling_probabilities {shown}: there are {len(shares)}, and --train_files has "
                f"{len(self.train_files)} files"
            )
        for name, single in (("query_prefixes", "query_prefix"), ("doc_prefixes", "doc_prefix")):
            self._check_prefixes(name, single)

    def _check_prefixes(self, name: str, single: str) -> None:
        prefixes = getattr(self, name)
        if not prefixes:
            return
        if len(prefixes) != len(self.train_files):
            raise UserError(f"--{name}: there are {len(prefixes)}, and --train_files has {len(self.train_files)} files")
        for prefix in prefixes:
            check_prefix(name, prefix)
        if getattr(self, single) is None:
            raise UserError(
                f"--{name}: give --{single} too, the one that the trained model puts in front of later texts "
                "unless told otherwise"
            )
