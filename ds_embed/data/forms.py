"""Training records in the forms of every framework: told by their keys, and turned into ours.

A form says which keys its records have and where in them query, positives and negatives stand; one function checks
and builds for all forms. A record with several positives gives a sample for each, with the same negatives.
"""

import hashlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import orjson

from ds_embed.data.files import BadRecord, Records, list_parts, stamp_of
from ds_embed.data.records import (
    DOCUMENT_KEYS,
    PROMPT_KEYS,
    QUERY_KEYS,
    TrainingRecord,
    id_of,
    is_finite_number,
    join_title,
    parse_document_record,
    present,
    prompt_of,
    refuse,
    refuse_missing,
    text_of,
)
from ds_embed.data.text_table import TextTable
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import check_column

_LISTS = ("neg_doc", "neg_scores")  # may be spread over several columns
_IDS = ("query_id", "doc_id")
COLUMN_KEYS = {
    "training": (
        "query",
        "pos_doc",
        "neg_doc",
        *_IDS,
        "pos_score",
        "neg_scores",
        "score",
        "text",
        "label",
        *PROMPT_KEYS,
    ),
    "queries": ("query", *_IDS, *PROMPT_KEYS),
    "documents": ("pos_doc", "doc_id", "title"),
    "judgments": (*_IDS, "relevance"),
    "run": (*_IDS, "score"),
}
IN_ORDER = "in_order"
_REQUIRED = ("query", "pos_doc", "relevance", "score")
_POSITIVE_COLUMNS = ("positive", "answer", "context", "passage", "document", "response")
_NEGATIVE_COLUMN = re.compile(r"negative(?:_(\d+))?|rejected_response")
# Keys whose values may be lists, and how Python and JSON write a list of texts into a cell of text.
_LIST_KEYS = {"pos", "neg", "neg_doc", "pos_scores", "neg_scores"}
_LIST_OF_TEXTS = re.compile(r"""\s*\[\s*(?:["'{\[].*)?\]\s*""", re.DOTALL)
_QUERIES = ("anchor", "query", "question")
_GRADES = ("label", "labels", "score", "scores")  # which must be 1, or a teacher's list
_NUMBERS = {"pos_scores", "neg_scores", *_GRADES}
# Columns of tables that are no texts: pandas' index, as CSV, Parquet and a CSV that was read and written again have it.
_INDEX_COLUMN = re.compile(r"|__index_level_\d+__|Unnamed: \d+")
_SENTENCE = re.compile(r".{41,}|.*\s.*[.?!]|.*[。？！]", re.DOTALL)  # what no column is named
# Records with one of these are no labelled texts, even with a text and a label.
_PAIRED = {*_QUERIES, "pos_doc", "pos", *_POSITIVE_COLUMNS, "sentence1", "text1"}
_MORE = ("query_id", "corpus_id")
_NOUNS = {"": "records", "scored": "scored pairs", "labels": "labelled texts"}
_METADATA = "merlin_metadata.json"

Lookup = Callable[[str, str, Any], str]  # (place, name of the id in errors, id) to the text of a document


class Reading(NamedTuple):
    """What the settings say about reading training files."""

    columns: tuple[str, ...] = ()  # the words of --columns
    corpus_files: tuple[str, ...] = ()  # documents that records name by id
    kinds: tuple[str, ...] = ()  # what is read beside queries with their documents: "scored" pairs, "labels" of texts


AS_IT_IS = Reading()


class Columns:
    """The mapping that --columns asks for: KEY=COLUMN words (neg_doc=COLUMN,COLUMN neg_scores=COLUMN,COLUMN), or in_order."""

    def __init__(self, words: Sequence[str], kind: str):
        """UserError for keys that records of this kind (see COLUMN_KEYS) lack."""
        self._keys = COLUMN_KEYS[kind]
        self._by_order = list(words) == [IN_ORDER] and kind == "training"
        self._columns: dict[str, list[str]] = {}
        for word in [] if self._by_order else words:
            check_column(word, self._keys)
            key, _, column = word.partition("=")
            if key in self._columns:
                raise UserError(f"--columns {word}: {key} is given twice")
            self._columns[key] = column.split(",") if key in _LISTS else [column]
        self._others = {"queries": QUERY_KEYS, "documents": DOCUMENT_KEYS}.get(kind, ())  # other names of the same
        if kind == "training" and not {"query", "pos_doc"}.isdisjoint(self._columns):
            self._keys = tuple(key for key in self._keys if key != "label")  # left aside, see _scores_in_grades
        self._has_header = False
        self._unseen = {column for columns in self._columns.values() for column in columns}
        self._shown: list[str] = []

    def open_part(self, records: Records) -> None:
        if self._by_order and not records.has_column_order:
            raise UserError(f"{records.path}: --columns {IN_ORDER}: JSON keys have no order; name them, query=COLUMN")
        self._has_header = records.has_text_cells

    def mapped(self, where: str, row: dict) -> dict:
        """The row with our keys; those that no column was named for come from the column of their own name."""
        if self._by_order:
            texts = [name for name in row if name not in _GRADES and not _INDEX_COLUMN.fullmatch(name)]
            if texts != self._shown:
                self._check_order(where, texts, row)
            names = ("query", "positive", *(f"negative_{number}" for number in range(1, len(texts) - 1)))
            return {name: row[key] for name, key in zip((*names, *_GRADES), (*texts, *_GRADES)) if key in row}
        self._unseen.difference_update(row)
        self._shown = self._shown or list(row)
        known = [key for key in (*self._keys, *self._others) if key in row and key not in self._columns]
        record = {key: row[key] for key in known}
        for key, names in self._columns.items():
            if key == "neg_doc" or len(names) > 1:
                record[key] = _cells(row, names)
            elif names[0] in row:
                record[key] = row[names[0]]
            elif key in _REQUIRED:
                shown = ", ".join(row)
                raise BadRecord(
                    where, f"--columns {key}={names[0]}: there is no '{names[0]}' here; the keys are {shown}"
                )
        if record.get("title") and "pos_doc" in record:
            record["text"] = record.pop("pos_doc")  # the key whose title is joined
        return record

    def _check_order(self, where: str, texts: list[str], row: dict) -> None:
        """UserError for columns by order that differ from those before, or whose names seem to be the first record."""
        problem, cure = "", "put a line with the names of the columns above the first record"
        if len(texts) < 2:
            problem, cure = f"expected two columns of texts or more, found {', '.join(map(repr, row))}", ""
        elif self._shown:
            problem = f"the columns are {', '.join(map(repr, texts))}, and before {', '.join(map(repr, self._shown))}"
        elif self._has_header and (sentence := next(filter(_SENTENCE.fullmatch, texts), None)):
            problem = f"the first line must hold the names of the columns, and {sentence[:60]!r} seems to be a text"
        if problem:
            raise UserError(f"{where}: --columns {IN_ORDER}: {problem}{cure and f'; {cure}'}")
        self._shown = texts

    def describe(self) -> str:
        """What was taken for what."""
        if self._by_order:
            query, positive, *negatives = map(shlex.quote, self._shown)
            taken = f"query={query} pos_doc={positive}" + (f" neg_doc={','.join(negatives)}" if negatives else "")
            return f"{taken}, by the order of the columns{', named in line 1' if self._has_header else ''}"
        return " ".join(f"{key}={','.join(names)}" for key, names in self._columns.items())

    def check_seen(self, path: str) -> None:
        """UserError when no row had a column that was named."""
        for key, names in self._columns.items():
            missing = [name for name in names if name in self._unseen]
            if missing:
                raise UserError(
                    f"{path}: --columns {key}={','.join(names)}: no record has '{missing[0]}'; the first has "
                    f"{', '.join(self._shown)}"
                )


def _cells(row: dict, columns: Iterable[str]) -> list:
    """The negatives in these columns, each a text or a list of texts; empty cells hold none."""
    negatives: list[Any] = []
    for cell in map(row.get, columns):
        negatives += cell if type(cell) is list else [] if cell is None or cell == "" else [cell]
    return negatives


@dataclass(frozen=True)
class _Form:
    """Under which keys a form's records have what ours have.

    `keys`: for each thing that a record must have, the query and the positives first, the keys that it may stand under.
    `side`: the texts of the positives or the negatives under a key, and their ids where they stand with them.
    """

    name: str
    keys: tuple[tuple[str, ...], ...]
    negatives: str | None
    side: Callable[[str, str, dict, bool, Lookup | None], tuple[list[str], list | None]]
    query: Callable[[str, str, dict], str] = text_of
    more: tuple[str, ...] = ()  # other keys that are read, or no loss
    query_id: str | None = "query_id"
    doc_ids: str | None = "doc_id"
    pos_scores: str | None = None
    neg_scores: str | None = None
    kind: str = ""  # a kind of Reading.kinds, where its records are no queries with their right documents

    def fits(self, row: dict) -> bool:
        if (self.kind == "labels" and not _PAIRED.isdisjoint(row)) or (self.kind == "scored" and row.get("neg_doc")):
            return False
        for alternatives in self.keys:  # plain loops: this runs for every record
            for key in alternatives:
                if key in row:
                    break
            else:
                return False
        return True

    def unread(self, row: dict) -> set[str]:
        """Keys that nobody reads."""
        own = (self.negatives, self.query_id, self.doc_ids, self.pos_scores, self.neg_scores)
        unread = row.keys() - {*own, *self.more, *PROMPT_KEYS[: 0 if self.kind else None]}.union(*self.keys)
        return {key for key in unread if self.side is not _columns or not _NEGATIVE_COLUMN.fullmatch(key)}

    def parse(self, where: str, row: dict, lookup: Lookup | None = None) -> list[TrainingRecord]:
        """The samples of a row that fits: one for each positive."""
        if self is _OWN and (plain := _plain(row)) is not None:
            return [plain]
        if self is _OWN and row.get("label") in (0, "0", "0.0"):
            _scores_in_grades(where, row, 1, 0)
        if self is _SCORED:
            return [_scored_pair(where, row)]
        if self is _LABELS:
            return [_labelled_text(where, row)]
        prompt = prompt_of(where, row)
        query = (prompt or "") + self.query(where, _key_in(row, self.keys[0]), row)
        positive = _key_in(row, self.keys[1])
        if positive not in row:
            refuse_missing(where, positive, row)
        texts, ids = self.side(where, positive, row, False, lookup)
        neg_docs, _ = self.side(where, self.negatives, row, True, lookup)
        if not texts:
            raise BadRecord(
                where, f"{positive} is empty, expected at least one document; remove the record or give it one"
            )
        for index, text in enumerate(neg_docs):
            if text in texts:
                problem = f"{self.negatives}[{index}] is the text of {positive}; remove it, it is no negative"
                raise BadRecord(where, problem)
        pos_scores, neg_scores = row.get(self.pos_scores), row.get(self.neg_scores)
        if self.more is _GRADES:
            pos_scores, neg_scores = _scores_in_grades(where, row, len(texts), len(neg_docs))
        scores = self._neg_scores(where, neg_scores, len(neg_docs))
        own_scores = _for_each(where, self.pos_scores, pos_scores, positive, len(texts))
        for score in own_scores:
            if score is not None and not is_finite_number(score):
                refuse(where, self.pos_scores, score, "a finite number (or leave the key out)")
        query_id, doc_ids = row.get(self.query_id), ids or row.get(self.doc_ids)
        if self.side is _columns:
            query_id, doc_ids = (None if value == "" else value for value in (query_id, doc_ids))
        query_id = id_of(where, self.query_id, query_id)
        ids = _for_each(where, self.doc_ids, doc_ids, positive, len(texts))
        return [
            TrainingRecord(
                query, text, tuple(neg_docs), query_id, id_of(where, self.doc_ids, doc_id), score, scores, None, prompt
            )
            for text, doc_id, score in zip(texts, ids, own_scores)
        ]

    def _neg_scores(self, where: str, scores: Any, number: int) -> tuple[float, ...] | None:
        if scores is None:
            return None
        if type(scores) is not list:
            refuse(where, self.neg_scores, scores, f"a list of numbers, one for each {self.negatives}")
        for index, score in enumerate(scores):
            if not is_finite_number(score):
                refuse(where, f"{self.neg_scores}[{index}]", score, "a finite number")
        if len(scores) != number:
            counts = f"{len(scores)} numbers and {self.negatives} {number} texts"
            raise BadRecord(where, f"{self.neg_scores} has {counts}; give one for each")
        return tuple(scores)


def _scores_in_grades(where: str, row: dict, num_texts: int, number: int) -> tuple[float | None, list[float] | None]:
    """A teacher's scores of the positive and of each of `number` negatives, where the grades are a list of them.

    sentence-transformers also has lists of margins, the positive's score minus each negative's: the positive then
    counts as 0, because every loss compares scores with each other only. BadRecord for other lists, and for a pair that
    is said not to be one of a query and its right document.
    """
    for key in _GRADES:
        grades = row.get(key)
        if type(grades) is not list:
            if grades in (None, 1, "1", "1.0"):
                continue
            train = f"train it with --pair_loss (and --columns score={key})"
            raise BadRecord(
                where,
                f"{key} is not 1: a graded pair is no pair of a query and its right document; "
                f"{train if not number else 'write the scores of a teacher as a list'}, keep the pairs of label 1, or name "
                f"the columns with --columns, which leaves {key} aside",
            )
        for index, score in enumerate(grades):
            if not is_finite_number(score):
                refuse(where, f"{key}[{index}]", score, "a finite number")
        names = _negative_columns(row)
        is_clear = names == [name for name in row if name in names] and None not in map(row.get, names)
        if num_texts == 1 and number and is_clear:
            if len(grades) == number + 1:
                return grades[0], grades[1:]
            if len(grades) == number:
                return 0.0, [-margin for margin in grades]
        raise BadRecord(
            where,
            f"{key} has {len(grades)} numbers beside {num_texts} positives and {number} negatives; expected a teacher's "
            "score of the positive and of each negative, or the margin of each, none of them empty and the columns in the "
            "order of their numbers; else name them: --columns query=... pos_doc=... neg_doc=... pos_score=... neg_scores=...",
        )
    return None, None


def _negative_columns(row: dict) -> list[str]:
    """The columns of negatives by their numbers."""
    matches = [match for name in row if (match := _NEGATIVE_COLUMN.fullmatch(name))]
    return [match[0] for match in sorted(matches, key=lambda match: int(match[1] or 0))]


def _key_in(row: dict, keys: tuple[str, ...]) -> str:
    """The first of the keys that has a value in the row, else the first that it has at all."""
    for key in keys:
        if row.get(key) is not None:
            return key
    return next((key for key in keys if key in row), keys[0])


def _for_each(where: str, key: str, value: Any, positive: str, number: int) -> list[Any]:
    """The value of each positive: of a list, or the one value there is of the one positive."""
    if value is None:
        return [None] * number
    values = value if type(value) is list else [value]
    if len(values) != number:
        raise BadRecord(where, f"{key} has {len(values)} values and {positive} {number} texts; give one for each")
    return values


def _plain(row: dict) -> TrainingRecord | None:
    """The record of a row of our own form that is all in order, without scores; None where a closer look is needed.

    What most rows are: three times as fast as the closer look.
    """
    query, text, negatives, query_id, doc_id = map(row.get, ("query", "pos_doc", "neg_doc", "query_id", "doc_id"))
    if any(row.get(key) is not None for key in ("pos_score", "neg_scores", "label", *PROMPT_KEYS)):
        return None
    negatives = () if negatives is None else negatives if type(negatives) is list else (negatives,)
    for value in (query, text, *negatives):
        if type(value) is not str or not value or value.isspace():
            return None
    for value in (query_id, doc_id):
        if value is not None and (type(value) is not str or value.splitlines() != [value]):
            return None
    return None if text in negatives else TrainingRecord(query, text, tuple(negatives), query_id, doc_id, None, None)


def _own(where: str, key: str, row: dict, optional: bool, _: Any) -> tuple[list[str], None]:
    return _texts(where, key, row.get(key), optional), None


def _instructed(where: str, key: str, row: dict, optional: bool, _: Any) -> tuple[list[str], None]:
    value = row.get(key)
    if type(row.get("query")) is list and type(value) is list and [type(item) for item in value] == [str, str]:
        problem = f"{key} is a list of two strings beside a query [instruction, text]"
        raise BadRecord(where, f"{problem}; write it as [[instruction, text]], a list for each text")
    if type(value) is list:
        value = [_with_instruction(where, f"{key}[{index}]", item) for index, item in enumerate(value)]
    return _texts(where, key, value, optional), None


def _with_instruction(where: str, key: str, value: Any) -> Any:
    """GritLM's [instruction, text] as one text, the instruction on a line of its own; all else as it is."""
    if type(value) is not list:
        return value
    if len(value) != 2 or not all(type(part) is str for part in value):
        raise BadRecord(where, f"{key} is a list, expected a string, or [instruction, text] as GritLM writes it")
    return "\n".join(part for part in value if part)


def _query_of_gritlm(where: str, key: str, row: dict) -> str:
    return text_of(where, key, {key: _with_instruction(where, key, row[key])})


def _passages(where: str, key: str, row: dict, *_: Any) -> tuple[list[str], list]:
    passages = row.get(key) or []
    if type(passages) is not list:
        refuse(where, key, passages, "a list of objects with docid, title and text")
    ids = [passage.get("docid") if type(passage) is dict else None for passage in passages]
    return _texts(where, key, passages, optional=True, titles=True), ids


def _of_ids(where: str, key: str, row: dict, _: bool, lookup: Lookup) -> tuple[list[str], list[str | None]]:
    listed = row.get(key)
    listed = [] if listed is None else listed if type(listed) is list else [listed]
    ids = [id_of(where, f"{key}[{i}]", v.get("id") if type(v) is dict else v) for i, v in enumerate(listed)]
    return [lookup(where, f"{key}[{index}]", name) for index, name in enumerate(ids)], ids


def _messages(where: str, key: str, row: dict, *_: Any) -> tuple[list[str], None]:
    listed = row.get(key) or []
    if type(listed) is not list or not all(type(messages) is list for messages in listed):
        raise BadRecord(where, f"{key} is no list of lists of messages; ms-swift writes [[{{role, content}}], ...]")
    return [_content(where, f"{key}[{index}]", {f"{key}[{index}]": one}) for index, one in enumerate(listed)], None


def _content(where: str, key: str, row: dict) -> str:
    messages = row[key]
    if type(messages) is not list or len(messages) != 1 or type(messages[0]) is not dict:
        number = len(messages) if type(messages) is list else "no list of"
        raise BadRecord(where, f"{key} holds {number} messages; expected one, whose content is the text to embed")
    return text_of(where, "content", messages[0])


def _columns(where: str, key: str, row: dict, optional: bool, _: Any) -> tuple[list[str], None]:
    if not optional:
        found = [name for name in _POSITIVE_COLUMNS if row.get(name) is not None]
        if len(found) > 1:
            problem = f"{found[0]} and {found[1]} could both be the right document; set --columns pos_doc={found[0]}"
            raise BadRecord(where, problem)
        name = found[0] if found else key
        return (_texts(where, name, row[name]) if type(row.get(name)) is list else [text_of(where, name, row)]), None
    return _texts(where, key, _cells(row, _negative_columns(row)), optional=True), None


def _scored_pair(where: str, row: dict) -> TrainingRecord:
    first, second = (present(row, keys) for keys in _PAIRS)
    score = row.get("score")
    if type(score) is str:  # a cell of a table of texts
        try:
            score = float(score)
        except ValueError:
            raise BadRecord(where, f"score is '{score}', expected a finite number") from None
    if not is_finite_number(score):
        refuse(where, "score", score, "a finite number: how alike the two texts are")
    return TrainingRecord(text_of(where, first, row), text_of(where, second, row), (), None, None, score, None)


def _labelled_text(where: str, row: dict) -> TrainingRecord:
    text, label = text_of(where, "text", row), id_of(where, "label", row.get("label"))
    if label is None:
        raise BadRecord(where, "label is missing, expected the name or the number of the text's class")
    return TrainingRecord(text, text, (), None, None, None, None, label)


_PAIRS = ("query", "sentence1", "text1"), ("pos_doc", "sentence2", "text2")
_SCORED = _Form("scored pairs", (*_PAIRS, ("score",)), None, _own, query_id=None, doc_ids=None, kind="scored")
_LABELS = _Form("labelled texts", (("text",), ("label",)), None, _own, query_id=None, doc_ids=None, kind="labels")
_OWN = _Form("our own", (("query",), ("pos_doc",)), "neg_doc", _own, pos_scores="pos_score", neg_scores="neg_scores")
_AUTOMODEL = replace(_OWN, name="Automodel", keys=(("question",), ("pos_doc",)), query_id="question_id", more=_MORE)
_AUTOMODEL_IDS = replace(_AUTOMODEL, keys=(("question", "query"), ("pos_doc",)), side=_of_ids, doc_ids=None)
_FLAG_EMBEDDING = _Form("FlagEmbedding", (("query",), ("pos",)), "neg", _instructed, _query_of_gritlm, doc_ids=None)
_FLAG_EMBEDDING = replace(_FLAG_EMBEDDING, pos_scores="pos_scores", neg_scores="neg_scores")
_TEVATRON = _Form("Tevatron", (("query",), ("positive_passages",)), "negative_passages", _passages, doc_ids="docid")
_TEVATRON_IDS = _Form(
    "Tevatron", (("query_text", "query"), ("positive_document_ids",)), "negative_document_ids", _of_ids, doc_ids=None
)
_MESSAGES = (("messages",), ("positive_messages",)), "negative_messages", _messages, _content, _GRADES
_COLUMNS = _Form("sentence-transformers", (_QUERIES, _POSITIVE_COLUMNS), "negative", _columns, more=_GRADES)
_FORMS = (
    _OWN,
    _AUTOMODEL,
    _FLAG_EMBEDDING,
    _TEVATRON,
    _TEVATRON_IDS,
    _Form("ms-swift", *_MESSAGES, query_id=None, doc_ids=None),
    replace(_COLUMNS, name="ms-swift", keys=(("query",), ("response",))),
    replace(_COLUMNS, name="F2LLM", keys=(("query",), ("passage",), ("negative_1",))),
    _COLUMNS,
)


def _typed(where: str, row: dict) -> dict:
    """The row of a table of texts, with the lists and the numbers that its cells stand for; BadRecord for what is neither."""
    columns = [key for key in row if key in ("pos_doc", *_POSITIVE_COLUMNS) or _NEGATIVE_COLUMN.fullmatch(key)]
    lists = [key for key in columns if _LIST_OF_TEXTS.fullmatch(row[key] or "")]
    lists += [key for key in _GRADES if (row.get(key) or "")[:1] == "["]
    for key in (row.keys() & _LIST_KEYS).union(lists):
        cells: list[Any] = []
        for cell in row[key] if type(row[key]) is list else [row[key]]:
            if type(cell) is str and (_LIST_OF_TEXTS.fullmatch(cell) or (key in _NUMBERS and cell[:1] == "[")):
                try:
                    cells += orjson.loads(cell)
                except ValueError:
                    problem = "looks like a list and is no JSON; write a column for each text, or JSON or Parquet"
                    raise BadRecord(where, f"{key} {problem}") from None
            elif cell is not None:
                cells.append(cell)
        row = row | {key: cells or None}
    for key in ("pos_score", "pos_scores", "neg_scores"):
        if (cells := row.get(key)) is None:
            continue
        numbers = []
        for cell in cells if type(cells) is list else [cells]:
            try:
                numbers.append(float(cell))
            except (TypeError, ValueError):
                raise BadRecord(
                    where, f"{key} is '{cell}', expected a finite number (or leave the cell empty)"
                ) from None
        row = row | {key: numbers[0] if key == "pos_score" else numbers}
    return row


def _texts(where: str, key: str, value: Any, optional: bool = False, titles: bool = False) -> list[str]:
    """The texts of a string, an object with a "text" (behind its "title", where `titles`), or a list of them."""
    if value is None and optional:
        return []
    is_one = type(value) in (str, dict)
    if not is_one and type(value) is not list:
        refuse(where, key, value, "a string or a list of strings" + (" (or leave the key out)" if optional else ""))
    texts, items = [], [value] if is_one else value
    for index, item in enumerate(items):
        if type(item) is str and item and not item.isspace():
            texts.append(item)
            continue
        name = key if is_one else f"{key}[{index}]"
        if type(item) is dict:
            if item.get("image"):
                raise BadRecord(where, f"{name} holds an image; only texts can be embedded")
            text = item.get("text")
            if type(text) is not str:
                refuse(where, f"{name}.text", text, "a string")
            item = join_title(where, item.get("title"), text) if titles else text
        elif type(item) is not str:
            refuse(where, name, item, "a string")
        if not item or item.isspace():
            cure = "remove it" if optional or len(items) > 1 else "remove the record"
            raise BadRecord(where, f"{name} is blank; {cure} or give it text")
        texts.append(item)
    return texts


def parse_training_record(where: str, record: dict) -> list[TrainingRecord]:
    """Check one training record in our own form; keys that we do not know are ignored. A record for each positive."""
    if not _OWN.fits(record):
        _refuse_lack(where, _OWN, record, record)
    return _OWN.parse(where, record)


def _refuse_lack(where: str, form: _Form, record: dict, row: dict) -> NoReturn:
    """Name the key that the record lacks, and those of the row that it was mapped from."""
    for other, cure in (
        (_SCORED, "they are read in the training of an embedder with --pair_loss"),
        (_LABELS, "they are read in the training of an embedder"),
    ):
        if other.fits(record):
            raise BadRecord(where, f"the keys here are those of {other.name}: {cure}")
    lacks = [keys[0] for keys in form.keys if not any(key in record for key in keys)]
    cure = f"if another key holds it: --columns {' '.join(f'{key}=KEY' for key in lacks)}" if form is _OWN else ""
    refuse_missing(where, lacks[0], row, cure)


class RecordFile(ExitStack):
    """One entry of a files setting: its parts, whose rows `parse_row` turns into records of one kind.

    While rows are parsed it is entered: what reading them has opened is closed at the end.
    """

    def __init__(
        self,
        entry: str | os.PathLike,
        parse_row: Callable[[str, dict], Any],
        columns: Columns | None = None,
        keys_read: Callable[[dict], set[str]] | None = None,
    ):
        """keys_read: which keys of a row `parse_row` reads; the others are told of."""
        super().__init__()
        self.path, self.parts = os.fspath(entry), list_parts(entry)
        self._parse_row, self._columns, self._keys_read = parse_row, columns, keys_read
        self._keys: tuple[str, ...] = ()  # of the last row
        self._unread: dict[str, None] = {}  # keys that nobody reads, in the order in which they came

    def stamps(self) -> list[dict]:
        """What changes when the file does: a dictionary for each part, and for each corpus that one names."""
        return [stamp_of(part) for part in self.parts]

    def open_part(self, records: Records) -> None:
        """The rows that follow are of this part."""
        if self._columns is not None:
            self._columns.open_part(records)

    def parse(self, where: str, row: dict) -> list:
        """The records of a row. BadRecord (a UserError) names the place, the key and what was found."""
        if self._keys_read is not None:
            self._note_unread(row, lambda row: row.keys() - self._keys_read(row))
        return [self._parse_row(where, row if self._columns is None else self._columns.mapped(where, row))]

    def _note_unread(self, row: dict, unread: Callable[[dict], set[str]]) -> None:
        if self._columns is None and (keys := tuple(row)) != self._keys:
            self._keys = keys
            self._unread |= dict.fromkeys(sorted(unread(row)))

    def end(self) -> None:
        """All rows were read: UserError when none had a column of --columns."""
        if self._columns is not None:
            self._columns.check_seen(self.path)

    def read(self, on_bad: Callable[[BadRecord], object] | None = None) -> Iterator[tuple[str, dict, list]]:
        """(place, row, its records) of every row; `on_bad` is given the bad ones, which are otherwise raised."""
        with self:
            for part in self.parts:
                records = Records(part, on_bad=on_bad)
                self.open_part(records)
                for number, row in records:
                    where = records.location(number)
                    try:
                        parsed = self.parse(where, row)
                    except BadRecord as error:
                        if on_bad is None:
                            raise
                        on_bad(error)
                        continue
                    yield where, row, parsed
            self.end()

    def describe(self) -> list[str]:
        """What was read and what was not, in lines for the user."""
        facts = self.facts()
        lines = [f"{self.path}: {facts['read']}"] if "read" in facts else []
        unread = [f"{self.path}: not read: {', '.join(facts['unread'])}"] if "unread" in facts else []
        return lines + unread + facts.get("notes", [])

    def facts(self) -> dict[str, Any]:
        """What was met in the rows so far."""
        return {"unread": list(self._unread)} if self._unread else {}


class TrainingFile(RecordFile):
    """One entry of train_files, the form of its records, and what was met in it.

    `work_dir` is where documents that records name by id are laid out (default: the system's folder for such).
    UserError, with file and line, for records of two forms.
    """

    def __init__(self, entry: str | os.PathLike, reading: Reading = AS_IT_IS, work_dir: Path | None = None):
        super().__init__(entry, lambda *_: None, Columns(reading.columns, "training") if reading.columns else None)
        self.form: _Form | None = None
        self._forms = (*(form for form in (_SCORED, _LABELS) if form.kind in reading.kinds), *_FORMS)
        self.score_range: list[float] = []  # of scored pairs
        self.num_rows, self.fewest, self.most = 0, 0, 0
        self._notes: list[str] = []
        self.corpora_sha256 = ""  # of the corpora that were read for the records
        self._reading, self._work_dir = reading, work_dir or Path(tempfile.gettempdir())
        self._named: dict[str, list[dict]] = {}  # by part, the corpora that it names
        self._corpora: dict[str | None, TextTable] = {}
        self._has_text_cells = False

    @property
    def kind(self) -> str:
        """A kind of Reading.kinds; "" for queries with their right documents."""
        return (self.form or _OWN).kind

    @property
    def is_own(self) -> bool:
        """Whether rows are in our own form, without a mapping."""
        return self._columns is None and self.form is _OWN

    def stamps(self) -> list[dict]:
        corpora = [_open_corpus(part, corpus)[0] for part in self.parts for corpus in self._corpora_of(part)]
        files = [path for entry in (*corpora, *self._reading.corpus_files) for path in list_parts(entry)]
        return super().stamps() + [stamp_of(path) for path in files]

    def _corpora_of(self, part: str) -> list[dict]:
        if part not in self._named:
            self._named[part] = Records(part).corpora()
        return self._named[part]

    def open_part(self, records: Records) -> None:
        super().open_part(records)
        self._has_text_cells = records.has_text_cells
        for corpus in self._corpora_of(records.path):
            self.form = _AUTOMODEL_IDS
            entry, metadata = _open_corpus(records.path, corpus)
            corpus_id = str(metadata["corpus_id"])
            if corpus_id in self._corpora:
                continue
            for key, flag in (("query_instruction", "query_prefixes"), ("passage_instruction", "doc_prefixes")):
                if metadata.get(key):
                    note = f"is used only when given as a prefix, with a blank behind it: --{flag}"
                    self._notes.append(f"corpus '{corpus_id}': its {key} {metadata[key]!r} {note}")
            self._read_corpus(corpus_id, [entry])

    def parse(self, where: str, row: dict) -> list[TrainingRecord]:
        if self._columns is not None:
            record = self._columns.mapped(where, row)
            self.form = self.form or next((form for form in self._forms if form.fits(record)), _OWN)
            if not self.form.fits(record):
                _refuse_lack(where, self.form, record, row)
            row = record
        elif self.form is None or not self.form.fits(row):
            form = next((form for form in self._forms if form.fits(row)), None)
            if form is not None and self.form is not None:
                raise BadRecord(
                    where,
                    f"a record of {form.name}, and those before it are {self.form.name}: one file has one form; "
                    "give each form a file of its own",
                )
            self.form = form or self.form
            if form is None:
                _refuse_lack(where, self.form or _OWN, row, row)
        if self._has_text_cells:
            row = _typed(where, row)
        form = self.form or _OWN
        self._note_unread(row, form.unread)
        if form is _TEVATRON_IDS and not self._corpora:
            if not self._reading.corpus_files:
                raise UserError(f"{where}: names its documents by id; give their texts with --corpus_files")
            self._read_corpus(None, self._reading.corpus_files)
        corpus_id = None if form is _TEVATRON_IDS else row.get("corpus_id")
        samples = form.parse(where, row, partial(self._text_of, corpus_id) if form.side is _of_ids else None)
        if form is _SCORED:
            scores = [*self.score_range, samples[0].pos_score]
            self.score_range = [min(scores), max(scores)]
        if form.more is _GRADES and samples[0].neg_scores is not None and not self._notes:
            key = next(key for key in _GRADES if type(row.get(key)) is list)
            is_margins = len(row[key]) == len(samples[0].neg_docs)
            margins = "margins, the positive's score minus each negative's, with 0 for the positive's"
            self._notes.append(f"{key} is read as a teacher's {margins if is_margins else 'scores'}")
        self.num_rows += 1
        if not self.fewest <= len(samples) <= self.most:
            self.fewest = min(self.fewest or len(samples), len(samples))
            self.most = max(self.most, len(samples))
        return samples

    def end(self) -> None:
        super().end()
        if self._reading.corpus_files and self.form is not _TEVATRON_IDS:
            self._notes.append("--corpus_files is not read for it: its records hold the texts of their documents")

    def facts(self) -> dict[str, Any]:
        """What was met in the rows so far: "FlagEmbedding records, 12,345 with 1 to 7 positives", their number, and more."""
        form = "" if self.kind else (self.form or _OWN).name
        if self._columns is not None:
            form = f"mapped ({self._columns.describe()})"
        counts = f"{self.most}" if self.fewest == self.most else f"{self.fewest} to {self.most}"
        several = f" with {counts} positives" if self.most > 1 else ""
        read = f"{form} {_NOUNS[self.kind]}, {self.num_rows:,}{several}".lstrip()
        facts = {"read": read, "num_rows": self.num_rows}
        more = super().facts() | {"notes": self._notes}
        more |= {"kind": self.kind, "score_range": self.score_range}
        return facts | {name: value for name, value in more.items() if value}

    def _read_corpus(self, corpus_id: str | None, entries: Iterable[str]) -> None:
        digest = hashlib.sha256(self.corpora_sha256.encode())
        table = self._corpora[corpus_id] = self.enter_context(TextTable(self._work_dir, "document id"))
        self.callback(self._corpora.clear)
        for part in (part for entry in entries for part in list_parts(entry)):
            records = Records(part, digest.update)
            for number, row in records:
                where = records.location(number)
                # Automodel takes the text alone.
                document = parse_document_record(where, row, join_titles=corpus_id is None)
                table.add(document.doc_id, document.pos_doc, where)
        self.corpora_sha256 = digest.hexdigest()

    def _text_of(self, corpus_id: Any, where: str, name: str, doc_id: str | None) -> str:
        """The text of a document that a record names; `name` is the key with its place in a list."""
        table = self._corpora.get(None if corpus_id is None else str(corpus_id))
        if table is None:
            raise BadRecord(where, f"corpus_id '{corpus_id}' is none of {', '.join(map(str, self._corpora))}")
        text = None if doc_id is None else table.get(doc_id)
        if text is None:
            raise BadRecord(where, f"{name} names document '{doc_id}', which is not in the corpus; add its text")
        return text


def _open_corpus(path: str, corpus: dict) -> tuple[str, dict]:
    """The files of a corpus and its metadata; it lies relative to the file that names it, as Automodel has it."""
    folder = Path(os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(path)), corpus["path"])))
    if not folder.is_dir():
        raise UserError(f"{path}: its corpus {folder} is not a folder")
    try:
        metadata = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
        metadata["corpus_id"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: its corpus {folder} has no {_METADATA} with a corpus_id") from None
    return str(folder) if any(folder.glob("*.parquet")) else f"{folder}/**/*.parquet", metadata


def read_training_records(
    entries: Iterable[str | os.PathLike],
    reading: Reading = AS_IT_IS,
    work_dir: Path | None = None,
    on_bad: Callable[[BadRecord], object] | None = None,
    tell: Callable[[list[str]], object] = lambda _: None,
) -> Iterator[tuple[str, TrainingRecord]]:
    """(place, sample) of training files; see TrainingFile. `tell` is given the lines that describe each file."""
    for entry in entries:
        file = TrainingFile(entry, reading, work_dir)
        for where, _, samples in file.read(on_bad):
            for sample in samples:
                yield where, sample
        tell(file.describe())
