"""Checked records: what training, query and document files hold, as small tuples.

Every complaint about data names the file and the line. `null` is the same as leaving an optional key out; an id may
be a number, and 12, 12.0 and "12" are one id (a column with gaps turns whole numbers into 12.0 on its way).
"""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from ds_embed.data.files import BadRecord, read_records, type_name


class TrainingRecord(NamedTuple):
    """One training example; `neg_docs` may be empty, the ids and a teacher's scores may be None."""

    query: str
    pos_doc: str
    neg_docs: tuple[str, ...]
    query_id: str | None
    doc_id: str | None
    pos_score: float | None
    neg_scores: tuple[float, ...] | None  # of each of neg_docs
    label: str | None = None  # of a labelled text, which is query and pos_doc in one
    prompt: str | None = None  # the record's own, with which `query` starts, in place of the query prefix

    def as_json(self) -> dict[str, Any]:
        """The record in our own form, without the keys that have no value."""
        values = _without_prompt(self._asdict())
        values["neg_doc"] = list(values.pop("neg_docs")) or None
        values["neg_scores"] = list(self.neg_scores) if self.neg_docs and self.neg_scores else None
        return {key: value for key, value in values.items() if value is not None}


class QueryRecord(NamedTuple):
    """One query to encode; `doc_ids` name its right documents, where the file does."""

    query: str
    query_id: str
    doc_ids: tuple[str, ...]
    prompt: str | None = None  # as in a TrainingRecord

    def as_json(self) -> dict[str, Any]:
        values = _without_prompt(self._asdict())
        doc_ids = list(values.pop("doc_ids"))
        values["doc_id"] = doc_ids if len(doc_ids) > 1 else next(iter(doc_ids), None)
        return {key: value for key, value in values.items() if value is not None}


class DocumentRecord(NamedTuple):
    """One document to encode; `pos_doc` may be empty."""

    pos_doc: str
    doc_id: str

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


_FIRST_INEXACT = (
    2**53
)  # from here on floats, and numbers that JSON parsers turn into floats, stand for several integers
# The keys of queries and documents: ours first, then those of BEIR, Tevatron, Automodel and others.
_QUERY_KEYS = ("query", "text", "query_text", "question")
_QUERY_ID_KEYS = ("query_id", "_id", "qid", "question_id", "id")
_DOC_KEYS = ("pos_doc", "text")
PROMPT_KEYS = ("prompt", "instruction")
_DOC_ID_KEYS = ("doc_id", "_id", "docid", "id")
QUERY_KEYS, DOCUMENT_KEYS = (*_QUERY_KEYS, *_QUERY_ID_KEYS), (*_DOC_KEYS, *_DOC_ID_KEYS)


def parse_query_record(where: str, record: dict) -> QueryRecord:
    """Check one record of a queries file: query (not blank), query_id, and doc_id (one or a list) and prompt, if there.

    Or, in the names of others: text or question, and _id, qid, question_id or id. BadRecord names the place.
    """
    doc_ids = record.get("doc_id")
    doc_ids = doc_ids if type(doc_ids) is list else [doc_ids]
    prompt = prompt_of(where, record)
    return QueryRecord(
        (prompt or "") + text_of(where, present(record, _QUERY_KEYS), record),
        _required_id(where, record, _QUERY_ID_KEYS),
        tuple(id_of(where, "doc_id", value) for value in doc_ids if value is not None),
        prompt,
    )


def prompt_of(where: str, record: dict) -> str | None:
    """What the record puts in front of its query, as it is, in place of the query prefix; an empty one is none."""
    given = [key for key in PROMPT_KEYS if record.get(key) not in (None, "")]
    if not given:
        return None
    if len(given) > 1:
        raise BadRecord(where, f"{' and '.join(given)} could both be in front of the query; leave one of them out")
    return text_of(where, given[0], record)


def _without_prompt(values: dict[str, Any]) -> dict[str, Any]:
    """A record's fields, the query without its prompt, which stands beside it."""
    return values | {"query": values["query"][len(values["prompt"] or "") :]}


def keys_of_query(record: dict) -> set[str]:
    """The keys that parse_query_record reads."""
    return {present(record, _QUERY_KEYS), present(record, _QUERY_ID_KEYS), "doc_id", *PROMPT_KEYS}


def keys_of_document(record: dict) -> set[str]:
    """The keys that parse_document_record reads."""
    key = present(record, _DOC_KEYS)
    return {key, present(record, _DOC_ID_KEYS)} | ({"title"} if key == "text" else set())


def parse_document_record(where: str, record: dict, *, join_titles: bool = True) -> DocumentRecord:
    """Check one record of a documents file: pos_doc (may be empty: corpora hold such) and doc_id.

    Or, in the names of others: text, behind the title where there is one, and _id, docid or id.
    """
    key = present(record, _DOC_KEYS)
    text = text_of(where, key, record, may_be_blank=True)
    if key == "text" and join_titles:
        text = join_title(where, record.get("title"), text)
    return DocumentRecord(text, _required_id(where, record, _DOC_ID_KEYS))


def join_title(where: str, title: Any, text: str) -> str:
    """The text that BEIR's and Tevatron's encoders see: the title, a space, the text; the text alone without one."""
    if type(title) not in (str, type(None)):
        refuse(where, "title", title, "a string (or leave the key out)")
    return f"{title} {text}".strip() if title else text


def read_queries(entries: Iterable[str | os.PathLike]) -> Iterator[tuple[str, QueryRecord]]:
    """(place, query) of each record of these files."""
    return ((where, parse_query_record(where, record)) for where, record in read_records(entries))


def read_documents(entries: Iterable[str | os.PathLike]) -> Iterator[tuple[str, DocumentRecord]]:
    """(place, document) of each record of these files."""
    return ((where, parse_document_record(where, record)) for where, record in read_records(entries))


def read_document_texts(paths: Sequence[str | os.PathLike], wanted: set[str]) -> dict[str, str]:
    """The texts of the documents whose ids are in `wanted`, by id; the others are only passed over."""
    return _wanted(((where, "doc_id", one.doc_id, one.pos_doc) for where, one in read_documents(paths)), wanted)


def read_query_texts(paths: Sequence[str | os.PathLike], wanted: set[str]) -> dict[str, str]:
    """The texts of the queries whose ids are in `wanted`, by id; the others are only passed over."""
    return _wanted(((where, "query_id", one.query_id, one.query) for where, one in read_queries(paths)), wanted)


def _wanted(records: Iterable[tuple[str, str, str, str]], wanted: set[str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for where, name, id_, text in records:
        if id_ in wanted and texts.setdefault(id_, text) != text:
            raise BadRecord(where, f"{name} '{id_}' has another text further up; give each text an id of its own")
    return texts


def present(record: dict, keys: Sequence[str]) -> str:
    """The first of the keys that the record has a value for, else the first that it has, else the first of all."""
    for key in keys:
        if record.get(key) is not None:
            return key
    return next((key for key in keys if key in record), keys[0])


def text_of(where: str, key: str, record: dict, may_be_blank: bool = False) -> str:
    """The string under a key, which must be there."""
    value = record.get(key)
    if type(value) is not str:
        if key not in record:
            refuse_missing(where, key, record)
        refuse(where, key, value, "a string")
    if not may_be_blank and (not value or value.isspace()):
        raise BadRecord(where, f"{key} is blank; remove the record or give it text")
    return value


def id_of(where: str, key: str, value: Any) -> str | None:
    """An id as a string; None where there is none. BadRecord for what can't be one."""
    if value is None:
        return None
    if type(value) is float and value.is_integer():
        if abs(value) >= _FIRST_INEXACT:
            raise BadRecord(where, f"{key} is {value}, which is too large to be exact; write it as a string")
        value = int(value)
    if type(value) is int:
        return str(value)
    if type(value) is not str:
        cure = "a whole number or a string" if type(value) is float else "a string (or leave the key out)"
        refuse(where, key, value, cure)
    # Ids are written one a line, and readers disagree on which characters end a line: allow none of them.
    if value.splitlines() != [value]:
        problem = "is empty" if not value else "holds a line break"
        raise BadRecord(where, f"{key} {problem}, expected a name on one line")
    return value


def _required_id(where: str, record: dict, keys: Sequence[str]) -> str:
    key = present(record, keys)
    value = id_of(where, key, record.get(key))
    if value is None:
        cure = f"give each text an id, or name its key (--columns {keys[0]}=KEY); `convert --input_format training --output_format test` makes test files of pairs"
        refuse_missing(where, key, record, cure)
    return value


def is_finite_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def refuse(where: str, key: str, value: Any, wanted: str) -> NoReturn:
    raise BadRecord(where, f"{key} is {type_name(value)}, expected {wanted}")


def refuse_missing(where: str, key: str, record: dict, cure: str = "") -> NoReturn:
    shown = ", ".join(repr(name) for name in list(record)[:8])
    shown = f"{shown}, ..." if len(record) > 8 else shown or "none"
    raise BadRecord(where, f"{key} is missing, expected a string; the keys here are {shown}{cure and f'; {cure}'}")
