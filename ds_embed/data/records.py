"""Checking records: what a file's objects hold, as small checked tuples.

Every complaint about data names the file and the line.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from ds_embed.data.json_files import BadRecord, read_json_objects, type_name


class TrainingRecord(NamedTuple):
    """One training example; `neg_docs` may be empty, the ids and a teacher's scores may be None."""

    query: str
    pos_doc: str
    neg_docs: tuple[str, ...]
    query_id: str | None
    doc_id: str | None
    pos_score: float | None
    neg_scores: tuple[float, ...] | None  # of each of neg_docs


class QueryRecord(NamedTuple):
    """One query to encode; `doc_id` names its right document and may be None."""

    query: str
    query_id: str
    doc_id: str | None


class DocumentRecord(NamedTuple):
    """One document to encode; `pos_doc` may be empty."""

    pos_doc: str
    doc_id: str


def parse_training_record(where: str, record: dict, *, num_negatives: int | None = None) -> TrainingRecord:
    """Check one training record; `where` is its location, for errors.

    `num_negatives` keeps the first so many negatives (None keeps all, fewer is not an error here).
    All negatives are checked, kept or not, so that whether a file is valid depends on no setting.
    Keys that we do not know are ignored. BadRecord (a UserError) names the place, the key and what was found.
    """
    query = _text(where, record, "query")
    pos_doc = _text(where, record, "pos_doc")
    negatives = record.get("neg_doc", ())
    if type(negatives) is str:
        negatives = (negatives,)
    elif type(negatives) is not list and negatives != ():
        _refuse(where, "neg_doc", negatives, "a string or a list of strings (or leave the key out)")
    for index, negative in enumerate(negatives):
        if type(negative) is not str:
            _refuse(where, f"neg_doc[{index}]", negative, "a string")
        if not negative or negative.isspace():
            raise BadRecord(where, f"neg_doc[{index}] is blank; remove it or give it text")
        if negative == pos_doc:
            raise BadRecord(where, f"neg_doc[{index}] is the text of pos_doc; remove it, it is no negative")
    pos_score, neg_scores = _teacher_scores(where, record, len(negatives))
    return TrainingRecord(
        query,
        pos_doc,
        tuple(negatives if num_negatives is None else negatives[:num_negatives]),
        _optional_id(where, record, "query_id"),
        _optional_id(where, record, "doc_id"),
        pos_score,
        neg_scores if neg_scores is None or num_negatives is None else neg_scores[:num_negatives],
    )


def parse_query_record(where: str, record: dict) -> QueryRecord:
    """Check one record of a queries file: query (not blank), query_id, and doc_id if it is there."""
    return QueryRecord(
        _text(where, record, "query"), _required_id(where, record, "query_id"), _optional_id(where, record, "doc_id")
    )


def parse_document_record(where: str, record: dict) -> DocumentRecord:
    """Check one record of a documents file: pos_doc (may be empty: corpora hold such) and doc_id."""
    return DocumentRecord(_text(where, record, "pos_doc", may_be_blank=True), _required_id(where, record, "doc_id"))


def read_document_texts(paths: Sequence[str | os.PathLike], wanted: set[str]) -> dict[str, str]:
    """The texts of the documents whose ids are in `wanted`, by id; the others are only passed over."""
    texts = {}
    for path in paths:
        for where, record in read_json_objects(path):
            document = parse_document_record(where, record)
            if document.doc_id in wanted:
                texts[document.doc_id] = document.pos_doc
    return texts


def read_query_texts(paths: Sequence[str | os.PathLike], wanted: set[str]) -> dict[str, str]:
    """The texts of the queries whose ids are in `wanted`, by id; the others are only passed over."""
    queries = (parse_query_record(where, record) for path in paths for where, record in read_json_objects(path))
    return {query.query_id: query.query for query in queries if query.query_id in wanted}


def _teacher_scores(where: str, record: dict, num_negatives: int) -> tuple[float | None, tuple[float, ...] | None]:
    """pos_score and neg_scores of a record; either may be missing."""
    pos_score = record.get("pos_score")
    if pos_score is not None and not _is_finite_number(pos_score):
        _refuse(where, "pos_score", pos_score, "a finite number (or leave the key out)")
    neg_scores = record.get("neg_scores")
    if neg_scores is None:
        return pos_score, None
    if type(neg_scores) is not list:
        _refuse(where, "neg_scores", neg_scores, "a list of numbers, one for each neg_doc")
    for index, score in enumerate(neg_scores):
        if not _is_finite_number(score):
            _refuse(where, f"neg_scores[{index}]", score, "a finite number")
    if len(neg_scores) != num_negatives:
        raise BadRecord(
            where, f"neg_scores has {len(neg_scores)} numbers and neg_doc {num_negatives} texts; give one for each"
        )
    return pos_score, tuple(neg_scores)


def _is_finite_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _text(where: str, record: dict, key: str, may_be_blank: bool = False) -> str:
    value = record.get(key)
    if type(value) is not str:
        if key not in record:
            _refuse_missing(where, key, record)
        _refuse(where, key, value, "a string")
    if not may_be_blank and (not value or value.isspace()):
        raise BadRecord(where, f"{key} is blank; remove the record or give it text")
    return value


def _required_id(where: str, record: dict, key: str) -> str:
    value = _optional_id(where, record, key)
    if value is None:
        _refuse_missing(where, key, record)
    return value


def _optional_id(where: str, record: dict, key: str) -> str | None:
    if key not in record:
        return None
    value = record[key]
    if type(value) is not str:
        cure = "a string in quotes" if type(value) in (int, float) else "a string (or leave the key out)"
        _refuse(where, key, value, cure)
    # Ids are written one a line, and readers disagree on which characters end a line: allow none of them.
    if value.splitlines() != [value]:
        problem = "is empty" if not value else "holds a line break"
        raise BadRecord(where, f"{key} {problem}, want a name on one line")
    return value


def _refuse(where: str, key: str, value: Any, wanted: str) -> NoReturn:
    raise BadRecord(where, f"{key} is {type_name(value)}, want {wanted}")


def _refuse_missing(where: str, key: str, record: dict) -> NoReturn:
    shown = ", ".join(repr(name) for name in list(record)[:8])
    shown = f"{shown}, ..." if len(record) > 8 else shown or "none"
    raise BadRecord(where, f"{key} is missing, want a string; the keys here are {shown}")
