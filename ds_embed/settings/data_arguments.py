"""Texts: how they become tokens, and the training files."""

import json
import re
from dataclasses import dataclass

from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, listed, optional, setting, several

DEFAULT_MAX_LENGTH = 512
DEFAULT_QUERY_PREFIX = "query: "
DEFAULT_DOC_PREFIX = "passage: "
TEXT_PLACE = "{text}"
_LIST = re.compile(r"""\s*\[\s*(?:["'].*)?\]\s*""", re.DOTALL)  # not a prefix such as "[QUERY] "
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass
class TextArguments(Settings):
    """How a text becomes tokens; the same fields are stored beside a trained model."""

    max_length: int | None = optional(
        "maximum length of a text in tokens, including special tokens; longer texts are truncated "
        f"(default: from the model's own files, else {DEFAULT_MAX_LENGTH})",
        above=0,
    )
    query_max_length: int | None = optional("maximum query length in tokens (default: max_length)", above=0)
    doc_max_length: int | None = optional("maximum document length in tokens (default: max_length)", above=0)
    query_prefix: str | None = optional(
        f"text put in front of every query, such as an instruction; the query replaces {TEXT_PLACE} if it contains one; "
        rf"\n is a line break (default: from the model's own files, else '{DEFAULT_QUERY_PREFIX}')"
    )
    doc_prefix: str | None = optional(
        "text put in front of every document, like query_prefix "
        f"(default: from the model's own files, else '{DEFAULT_DOC_PREFIX}')"
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("query_prefix", "doc_prefix"):
            prefix = getattr(self, name)
            if prefix is not None and prefixes_of(name, prefix) != [unescape(prefix)]:
                raise UserError(f"--{name} {prefix}: takes one prefix; --query_prefixes draws from a list")


def check_prefix(name: str, prefix: str) -> None:
    """Raise UserError if a prefix has more than one placeholder, or one other than {text}."""
    places = re.findall(r"\{\w*\}", prefix)
    if places not in ([], [TEXT_PLACE]):
        raise UserError(f"--{name} '{prefix}': only {TEXT_PLACE} can stand in it, once; found {' '.join(places)}")


def check_one_for_each(name: str, values: list, train_files: list[str]) -> None:
    """UserError unless the list is empty or has a value for each file."""
    if values and len(values) != len(train_files):
        raise UserError(
            f"--{name} {listed(values)}: has {len(values)} values, but --train_files has {len(train_files)} files"
        )


def unescape(prefix: str) -> str:
    r"""Replace the escapes \n, \t and \\ in a prefix that was given as a flag or in YAML."""
    return re.sub(r"\\([nt\\])", lambda match: _ESCAPES[match[1]], prefix)


def prefixes_of(name: str, entry: str) -> list[str]:
    """What an entry of a setting stands for: one prefix, or those of a JSON list, of which each query draws one.

    UserError if the list is not one of strings, or if a prefix has a wrong placeholder.
    """
    prefixes = [entry]
    if _LIST.fullmatch(entry):
        try:
            prefixes = json.loads(entry)
        except ValueError as error:
            raise UserError(f"--{name} {entry}: looks like a list and is no JSON ({error})") from None
    if not prefixes or not all(isinstance(one, str) for one in prefixes):
        raise UserError(f"--{name} {entry}: a list of prefixes must hold strings, at least one")
    for prefix in prefixes:
        check_prefix(name, prefix)
    return [unescape(prefix) for prefix in prefixes]


@dataclass(kw_only=True)
class DataArguments(TextArguments):
    train_files: list[str] = setting(
        "training records: files (JSON, JSONL, CSV, TSV, Parquet, compressed or not), folders of them, glob patterns, "
        "URLs, or data sets as NAME:SPLIT or NAME:CONFIG:SPLIT; docs/data_formats.md lists the formats. In YAML, an entry can also be a mapping of path with "
        "weight, negatives, hard_negatives, temperature, query_prefix, doc_prefix, query_max_length or doc_max_length",
        files=True,
    )
    columns: list[str] = several(
        "mapping of our keys to the keys or columns of the training and held-out records, such as query=question "
        "neg_doc=worse,worst; in_order takes the columns of a table as query, positive, negatives; one mapping "
        "for all files together (default: the format of each file is detected from its keys)"
    )
    corpus_files: list[str] = several(
        "documents that training records refer to by id, as in Tevatron's positive_document_ids", files=True
    )
    positives: str = setting(
        "use of records with several positives: all (each positive is a sample) or random (one is drawn in every pass)",
        "all",
        choices=("all", "random"),
    )
    sampling_probabilities: list[float] = several(
        "relative share of the samples drawn from each of train_files; a pass then has as many samples as there are "
        "records in total (default: every record once per pass)",
        above=0,
    )
    query_prefixes: list[str] = several(
        "one query_prefix per train_files entry, if they need different instructions; query_prefix is then the one "
        "stored with the trained model for later queries. An entry can be a JSON list, of which each query draws one"
    )
    doc_prefixes: list[str] = several("one doc_prefix per train_files entry, like query_prefixes")
    query_max_length_per_file: list[int] = several(
        "query_max_length of each of train_files, in tokens; query_max_length is then the one stored with the trained model",
        above=0,
    )
    doc_max_length_per_file: list[int] = several("doc_max_length of each of train_files, in tokens", above=0)
    batching: str = setting(
        "mixed (a global batch has samples of all files), homogeneous (of one file) or clustered (mixed, with records "
        "that share documents in the same batch, so that fewer texts are encoded)",
        "mixed",
        choices=("mixed", "homogeneous", "clustered"),
    )
    hard_negatives: int = setting(
        "hard negatives (neg_doc) per query; a query without any is scored only against the documents of the batch",
        0,
        at_least=0,
    )
    hard_negatives_per_file: list[int] = several("hard_negatives of each of train_files, where they differ", at_least=0)
    hard_negatives_sampling: str = setting(
        "which of a record's negatives are used: the first ones, or a random choice in every pass",
        "first",
        choices=("first", "random"),
    )
    skip_bad_records: bool = setting(
        "skip invalid training records and count them by reason, instead of stopping at the first one", False
    )
    cache_dir: str = setting("folder for tokens, visible to all nodes and reused by later runs", "~/.cache/ds_embed")

    def __post_init__(self):
        super().__post_init__()
        if self.batching == "clustered" and self.positives == "random":
            raise UserError(
                "--batching clustered: needs fixed positives, but --positives random draws a new one in every pass; set "
                "--positives all or --batching mixed"
            )
        lengths = ("query_max_length_per_file", "doc_max_length_per_file")
        for name in ("sampling_probabilities", "hard_negatives_per_file", "query_prefixes", "doc_prefixes", *lengths):
            check_one_for_each(name, getattr(self, name), self.train_files)
        for name, single in (("query_prefixes", "query_prefix"), ("doc_prefixes", "doc_prefix")):
            drawn = [prefix for prefix in getattr(self, name) if len(prefixes_of(name, prefix)) > 1]
            if drawn and name == "doc_prefixes":
                raise UserError(f"--{name} {drawn[0]}: only --query_prefixes draws from a list; give one prefix")
            if getattr(self, name) and getattr(self, single) is None:
                what = "the prefix that the trained model uses for later texts by default"
                raise UserError(f"--{name}: also set --{single}, {what}")
