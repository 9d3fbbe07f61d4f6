"""Lines of judgments (TREC qrels, BEIR tsv) and of runs (TREC), one at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.data.files import BadRecord, read_lines
from ds_embed.data.formats.tables import tsv_line
from ds_embed.data.records import id_of
from ds_embed.settings.errors import UserError

BEIR_HEADER = ("query-id", "corpus-id", "score")
_BOTH_FORMS = (
    "'query-id 0 doc-id relevance' (TREC), or tab-separated query, document, score under the header "
    f"{' '.join(BEIR_HEADER)} (BEIR)"
)


class Judgment(NamedTuple):
    """How relevant a document is to a query: above 0 is relevant, more is better."""

    query_id: str
    doc_id: str
    relevance: int


class RunLine(NamedTuple):
    """A document that a search returned for a query."""

    query_id: str
    doc_id: str
    score: float


def read_judgments(path: str | os.PathLike) -> Iterator[tuple[str, Judgment]]:
    """(place, judgment) of a TREC qrels file, or of a BEIR tsv, which is told by its header.

    BadRecord with file and line: other columns, a relevance that is no whole number, not UTF-8.
    """
    beir = None
    for where, line in read_lines(path):
        if not line.strip():
            continue
        if beir is None:
            beir = tuple(line.split("\t")) == BEIR_HEADER
            if beir:
                continue
        columns = line.split("\t") if beir else line.split()
        if len(columns) != (3 if beir else 4):
            raise BadRecord(where, f"{len(columns)} columns; want {_BOTH_FORMS}")
        row = {"query_id": columns[0], "doc_id": columns[-2], "relevance": columns[-1]}
        yield where, judgment(where, row)


def unique_judgments(judgments: Iterable[tuple[str, Judgment]]) -> Iterator[tuple[str, Judgment]]:
    """Each judgment once; holds all pairs of ids in memory. BadRecord for a pair that is judged in two ways."""
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
    """(place, line) of a TREC run file. BadRecord with file and line: other columns, a score that is no number."""
    for where, line in read_lines(path):
        columns = line.split()
        if not columns:
            continue
        if len(columns) != 6:
            raise BadRecord(where, f"{len(columns)} columns; want 'query-id Q0 doc-id rank score tag' (TREC run)")
        yield where, run_line(where, {"query_id": columns[0], "doc_id": columns[2], "score": columns[4]})


def judgment(where: str, row: Mapping[str, Any]) -> Judgment:
    """The judgment of a row with our keys. BadRecord for a missing id or a relevance that is no whole number."""
    query_id, doc_id = _ids(where, row)
    relevance = row.get("relevance")
    try:
        return Judgment(query_id, doc_id, int(relevance))
    except (TypeError, ValueError):
        raise BadRecord(where, f"relevance '{relevance}', want a whole number") from None


def run_line(where: str, row: Mapping[str, Any]) -> RunLine:
    """The run's line of a row with our keys. BadRecord for a missing id or a score that can't be ranked by."""
    value = row.get("score")
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise BadRecord(where, f"score '{value}', want a finite number")
    return RunLine(*_ids(where, row), score)


def _ids(where: str, row: Mapping[str, Any]) -> tuple[str, str]:
    ids = {name: id_of(where, name, row.get(name)) for name in ("query_id", "doc_id")}
    for name, value in ids.items():
        if value is None:
            raise BadRecord(where, f"{name} is missing, want a name")
    return ids["query_id"], ids["doc_id"]


def write_beir_qrels(path: Path, judgments: Iterable[Judgment]) -> None:
    """query, document and score under BEIR's header. UserError for an id with a tab."""
    with replaced_when_whole(path) as file:
        file.write(tsv_line(path, BEIR_HEADER))
        file.writelines(tsv_line(path, judgment) for judgment in judgments)


def write_trec_qrels(path: Path, judgments: Iterable[Judgment]) -> None:
    """`query 0 document relevance` lines. UserError for an id with white space."""
    with replaced_when_whole(path) as file:
        for judgment in judgments:
            _check_ids(path, judgment)
            file.write(f"{judgment.query_id} 0 {judgment.doc_id} {judgment.relevance}\n")


def write_trec_run(path: Path, lines: Iterable[RunLine], tag: str) -> None:
    """`query Q0 document rank score tag` lines; ranks count the lines of a query as they come."""
    ranks: dict[str, int] = {}
    with replaced_when_whole(path) as file:
        for line in lines:
            _check_ids(path, line)
            rank = ranks[line.query_id] = ranks.get(line.query_id, 0) + 1
            file.write(f"{line.query_id} Q0 {line.doc_id} {rank} {line.score!r} {tag}\n")


def _check_ids(path: Path, line: Judgment | RunLine) -> None:
    for name in line[:2]:
        if name.split() != [name]:
            raise UserError(f"{path}: id '{name}' holds white space, which splits TREC columns; give other ids")
