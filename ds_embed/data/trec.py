"""Reads and writes judgments (TREC qrels, BEIR tsv, JSON) and runs (TREC), one line at a time."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.data.files import BadRecord, open_bytes, read_lines, read_records
from ds_embed.data.records import id_of, present
from ds_embed.settings.errors import UserError

_LOOK_BYTES = 1 << 12
_MOST_RELEVANT = 1_000_000  # trec_eval counts the documents of each relevance
BEIR_HEADER = ("query-id", "corpus-id", "score")
_FORMS = (
    "'query-id 0 doc-id relevance' (TREC), 'query-id doc-id relevance', with BEIR's header "
    f"{' '.join(BEIR_HEADER)} or without, or JSON or Parquet with query_id, doc_id and score"
)
# Our keys, and BEIR's names for them.
_JSON_KEYS = {
    "query_id": ("query_id", "query-id"),
    "doc_id": ("doc_id", "corpus-id", "corpus_id"),
    "relevance": ("relevance", "score"),
}


class Judgment(NamedTuple):
    """How relevant a document is to a query: above 0 means relevant, and higher is better."""

    query_id: str
    doc_id: str
    relevance: int


class RunLine(NamedTuple):
    """A document that a search returned for a query."""

    query_id: str
    doc_id: str
    score: float


def read_judgments(path: str | os.PathLike) -> Iterator[tuple[str, Judgment]]:
    """Yield (location, judgment) of a file of judgments, whose format is detected from its first line.

    Formats: TREC qrels (four columns separated by white space), three columns, the same separated by tabs with BEIR's
    header, or JSON and Parquet with their names as keys. BadRecord with file and line for other columns, a relevance
    that is not an integer, or invalid UTF-8.
    """
    with open_bytes(os.fspath(path)) as file:
        start = file.read(_LOOK_BYTES).lstrip()
    if start.startswith((b"{", b"[", b"PAR1")):
        for where, row in read_records(path):
            yield where, judgment(where, {ours: row.get(present(row, names)) for ours, names in _JSON_KEYS.items()})
        return
    form = None
    for where, line in read_lines(path):
        if not line.strip():
            continue
        if form is None:
            form = "columns"
            if tuple(line.split()) == BEIR_HEADER:
                form = "beir"
                continue
        by_tabs = line.count("\t") in (2, 3) or (form == "beir" and "\t" in line)  # ids may hold blanks
        columns = [cell.strip() for cell in line.split("\t")] if by_tabs else line.split()
        wanted = (3,) if form == "beir" else (3, 4)
        if len(columns) not in wanted:
            raise BadRecord(where, f"{len(columns)} columns; expected {_FORMS}")
        if form == "columns":
            form = f"{len(columns)} columns"
        elif form != "beir" and len(columns) != int(form[0]):
            raise BadRecord(where, f"{len(columns)} columns, and the lines before have {form[0]}; expected {_FORMS}")
        yield where, judgment(where, {"query_id": columns[0], "doc_id": columns[-2], "relevance": columns[-1]})


def unique_judgments(judgments: Iterable[tuple[str, Judgment]]) -> Iterator[tuple[str, Judgment]]:
    """Yield each judgment once, keeping all pairs of ids in memory. BadRecord for a pair with two judgments."""
    seen: dict[str, dict[str, int]] = {}
    for where, judgment in judgments:
        query_id, doc_id, relevance = judgment
        judged = seen.setdefault(query_id, {})
        if doc_id not in judged:
            judged[doc_id] = relevance
            yield where, judgment
        elif judged[doc_id] != relevance:
            problem = f"document '{doc_id}' has relevance {relevance} for query '{query_id}' and had {judged[doc_id]}"
            raise BadRecord(where, f"{problem} further up; keep one of the two")


def read_run(path: str | os.PathLike) -> Iterator[tuple[str, RunLine]]:
    """Yield (location, line) of a TREC run file. BadRecord with file and line for other columns or an invalid score."""
    for where, line in read_lines(path):
        columns = line.split()
        if not columns:
            continue
        if len(columns) != 6:
            raise BadRecord(where, f"{len(columns)} columns; expected 'query-id Q0 doc-id rank score tag' (TREC run)")
        yield where, run_line(where, {"query_id": columns[0], "doc_id": columns[2], "score": columns[4]})


def judgment(where: str, row: Mapping[str, Any]) -> Judgment:
    """The judgment in a row with our keys. BadRecord for a missing id or a relevance that is not an integer."""
    query_id, doc_id = _ids(where, row)
    relevance = row.get("relevance")
    try:
        grade = float(relevance)
        if type(relevance) is bool or not grade.is_integer() or abs(grade) > _MOST_RELEVANT:
            raise ValueError
        return Judgment(query_id, doc_id, int(grade))
    except (TypeError, ValueError, OverflowError):
        problem = f"relevance '{relevance}', expected a whole number of at most {_MOST_RELEVANT:,}"
        raise BadRecord(where, problem) from None


def run_line(where: str, row: Mapping[str, Any]) -> RunLine:
    """The run line in a row with our keys. BadRecord for a missing id or a score that is not finite."""
    value = row.get("score")
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise BadRecord(where, f"score '{value}', expected a finite number")
    return RunLine(*_ids(where, row), score)


def _ids(where: str, row: Mapping[str, Any]) -> tuple[str, str]:
    ids = {name: id_of(where, name, row.get(name)) for name in ("query_id", "doc_id")}
    for name, value in ids.items():
        if value is None:
            raise BadRecord(where, f"{name} is missing, expected a name")
    return ids["query_id"], ids["doc_id"]


def write_beir_qrels(path: Path, judgments: Iterable[Judgment]) -> None:
    """Write query, document and score under BEIR's header. UserError for an id with a tab."""
    with replaced_when_whole(path) as file:
        file.write(tsv_line(path, BEIR_HEADER))
        file.writelines(tsv_line(path, judgment) for judgment in judgments)


def write_trec_qrels(path: Path, judgments: Iterable[Judgment]) -> None:
    """Write lines of `query 0 document relevance`. UserError for an id with white space."""
    with replaced_when_whole(path) as file:
        for judgment in judgments:
            _check_ids(path, judgment)
            file.write(f"{judgment.query_id} 0 {judgment.doc_id} {judgment.relevance}\n")


def write_trec_run(path: Path, lines: Iterable[RunLine], tag: str) -> None:
    """Write lines of `query Q0 document rank score tag`, each query's best first. UserError where the order is another."""
    before: dict[str, tuple[int, float]] = {}  # of each query
    with replaced_when_whole(path) as file:
        for line in lines:
            _check_ids(path, line)
            rank, score = before.get(line.query_id, (0, math.inf))
            if line.score > score:
                problem = (
                    f"document '{line.doc_id}' of query '{line.query_id}' has score {line.score!r}, behind {score!r}"
                )
                raise UserError(f"{path}: {problem}; sort the lines of each query by score, the highest first")
            rank += 1
            before[line.query_id] = rank, line.score
            file.write(f"{line.query_id} Q0 {line.doc_id} {rank} {line.score!r} {tag}\n")


def _check_ids(path: Path, line: Judgment | RunLine) -> None:
    for name in line[:2]:
        if name.split() != [name]:
            raise UserError(f"{path}: id '{name}' holds white space, which splits TREC columns; give other ids")


def tsv_line(path: Path, cells: Sequence[Any]) -> str:
    """The cells as a line. UserError if one contains a separator of cells or lines."""
    for cell in cells:
        if type(cell) is str and not {"\t", "\n", "\r"}.isdisjoint(cell):
            raise UserError(f"{path}: '{cell[:60]}' holds a tab or a line break, which a TSV can't hold; write .csv")
    return "\t".join(map(str, cells)) + "\n"
