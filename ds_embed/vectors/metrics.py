"""Retrieval measures as trec_eval defines them: judgments (qrels) in, means and per-query values out.

A run gives (query id, {document id: score}); qrels are {query id: {document id: relevance}}, where a
relevance above 0 is relevant. Names are those of ir-measures: nDCG@10, RR@10, R@100.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import ir_measures
import numpy as np

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.data.records import read_queries
from ds_embed.data.trec import read_judgments, read_run, unique_judgments
from ds_embed.settings.errors import UserError

Qrels = dict[str, dict[str, int]]
Run = Any  # {query id: {document id: score}}, or a SearchRun

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@1", "R@10", "R@100")
_EXAMPLES = ", ".join(DEFAULT_MEASURES)
# Their means are means over queries; counts such as NumRet are summed instead.
_FAMILIES = ("nDCG", "RR", "R", "P", "AP", "Success", "Rprec")
_QUERIES_AT_ONCE = 1000


@dataclass(frozen=True)
class SearchRun:
    """What search returned, with names: scores and indices (N, k), a row for each of `query_ids`.

    An index of -1, which approximate search may give, stands for no document.
    """

    query_ids: Sequence[str]
    document_ids: Sequence[str]
    scores: np.ndarray
    indices: np.ndarray

    def items(self) -> Iterator[tuple[str, dict[str, float]]]:
        for query_id, scores, indices in zip(self.query_ids, self.scores, self.indices):
            yield query_id, {self.document_ids[i]: s for i, s in zip(indices.tolist(), scores.tolist()) if i >= 0}


@dataclass(frozen=True)
class Evaluation:
    """Means over the judged queries, and {query id: {measure: value}}; measures in the order asked for."""

    means: dict[str, float]
    per_query: dict[str, dict[str, float]]


def read_qrels_from_queries(paths: Iterable[str | os.PathLike]) -> Qrels:
    """Judgments of queries files: each record's `doc_id` is relevant (1) to its `query_id`.

    A query_id may stand on several lines, each with one right document: all count.
    UserError with file and line: a record without doc_id, one query_id with two texts, bad records.
    """
    qrels: Qrels = {}
    texts: dict[str, tuple[int, str]] = {}
    for where, query in read_queries(paths):
        if not query.doc_ids:
            raise UserError(f"{where}: doc_id is missing, the right document; add it or give --qrels")
        text, place = texts.setdefault(query.query_id, (hash(query.query), where))
        if text != hash(query.query):
            what = f"query_id '{query.query_id}' names another query text at {place}"
            raise UserError(f"{where}: {what}; give each query text its own query_id")
        qrels.setdefault(query.query_id, {}).update(dict.fromkeys(query.doc_ids, 1))
    return qrels


def read_qrels(path: str | os.PathLike) -> Qrels:
    """Judgments of a file as read_judgments reads them: TREC, BEIR, three columns, or JSON lines.

    UserError with file and line: other columns, a relevance that is no whole number, one pair judged
    in two ways; and a file without any relevant document.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give a TREC qrels file, a BEIR tsv or JSON lines")
    qrels: Qrels = {}
    for _, judgment in unique_judgments(read_judgments(path)):
        qrels.setdefault(judgment.query_id, {})[judgment.doc_id] = judgment.relevance
    if not any(relevance > 0 for judged in qrels.values() for relevance in judged.values()):
        raise UserError(f"{path}: judges no document relevant (above 0), so there is nothing to measure")
    return qrels


def load_run(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """A TREC run file as {query id: {document id: score}}, all of it in memory.

    UserError with file and line: other columns, a score that is no number, a document twice for a query.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give a TREC run file")
    run: dict[str, dict[str, float]] = {}
    for where, line in read_run(path):
        scores = run.setdefault(line.query_id, {})
        if line.doc_id in scores:
            raise UserError(f"{where}: document '{line.doc_id}' stands twice for query '{line.query_id}'; keep one")
        scores[line.doc_id] = line.score
    if not run:
        raise UserError(f"{path}: holds no line of a run")
    return run


def judged_documents(paths: Iterable[str | os.PathLike]) -> dict[str, str]:
    """{doc_id: place of a query that names it} of queries files; queries without a doc_id name none."""
    named: dict[str, str] = {}
    for where, query in read_queries(paths):
        for doc_id in query.doc_ids:
            named.setdefault(doc_id, where)
    return named


def without_identical(
    query_ids: Sequence[str], document_ids: Sequence[str], scores: np.ndarray, indices: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `depth` found (N, k), best first, without the document of the query's own id, as BEIR measures.

    Search one more than depth. Where nothing is left, the index is -1 and the score -inf.
    """
    found = zip(query_ids, indices.tolist())
    is_own = np.array([[row >= 0 and document_ids[row] == name for row in rows] for name, rows in found])
    order = np.argsort(is_own, axis=1, kind="stable")[:, :depth]
    is_own, scores, indices = (np.take_along_axis(values, order, axis=1) for values in (is_own, scores, indices))
    return np.where(is_own, np.float32(-np.inf), scores), np.where(is_own, -1, indices)


def hint_at_identical(run: Run, qrels: Qrels) -> str | None:
    """What to say where judged queries find a document of their own id first, in a run that keeps such."""
    found = [
        name
        for name, scores in run.items()
        if name in scores and name in qrels and qrels[name].get(name, 0) <= 0 and max(scores.values()) == scores[name]
    ]
    if not found:
        return None
    return (
        f"{len(found):,} of {len(qrels):,} judged queries, such as '{found[0]}', find the document of their own id "
        "first: if it is the query itself (ArguAna, Quora), set --ignore_identical_ids true"
    )


def match_qrels(qrels: Qrels, query_ids: Iterable[str], document_ids: Iterable[str] | None, source: str) -> list[str]:
    """Check that judgments and vectors speak of the same ids; returns the query ids without judgments.

    `source` names the judgments in errors; document_ids of None are not looked at. UserError, with the
    count, an example and the cure: no query has judgments, or judged queries or relevant documents have
    no vector (scoring them 0 would blame the model for a wrong file).
    """
    unjudged = [query_id for query_id in query_ids if query_id not in qrels]
    missing, unknown, num_relevant = _without_vectors(qrels, query_ids, document_ids)
    if len(missing) == len(qrels):
        raise UserError(
            f"{source}: none of its {len(qrels)} queries, such as '{missing[0]}', was searched for; "
            "give the judgments of those that were"
        )
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(qrels)} judged queries were not searched for, such as '{missing[0]}'; "
            "search for them too, take them out of the judgments, or set --skip_unknown true"
        )
    if unknown:
        raise UserError(
            f"{source}: {len(unknown)} of {num_relevant} relevant document ids are not in the corpus, such as "
            f"'{min(unknown)}'; encode the documents that are judged, give this corpus's judgments, or set "
            "--skip_unknown true"
        )
    return unjudged


def skip_unknown(
    qrels: Qrels, query_ids: Iterable[str], document_ids: Iterable[str] | None
) -> tuple[Qrels, dict[str, int]]:
    """The judgments of the queries that have a vector, and what is unknown, by its name in metrics.json.

    Relevant documents that aren't in the corpus stay: they count as not retrieved, as trec_eval has it.
    """
    absent = set(qrels).difference(query_ids)
    known = {query_id: judged for query_id, judged in qrels.items() if query_id not in absent}
    _, unknown, _ = _without_vectors(known, query_ids, document_ids)
    counts = {"num_judged_queries_without_vector": len(absent), "num_relevant_documents_without_vector": len(unknown)}
    return known or qrels, counts  # where nothing is known, match_qrels says so


def _without_vectors(
    qrels: Qrels, query_ids: Iterable[str], document_ids: Iterable[str] | None
) -> tuple[list[str], set[str], int]:
    """Judged queries and relevant documents that have no vector, and the number of relevant documents."""
    absent = set(qrels).difference(query_ids)
    missing = [query_id for query_id in qrels if query_id in absent]
    relevant = {name for judged in qrels.values() for name, relevance in judged.items() if relevance > 0}
    return missing, set() if document_ids is None else relevant.difference(document_ids), len(relevant)


def parse_measures(names: Iterable[str], depth: int | None = None) -> list:
    """ir-measures objects of the names; `depth` is how many documents each query keeps (None: all).

    UserError: an unknown name, a measure that is not a mean over queries, a cutoff beyond `depth`.
    """
    parsed = []
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
            known = measure.NAME in _FAMILIES and ir_measures.pytrec_eval.supports(_whole(measure))
        except (NameError, ValueError):
            known = False
        if not known:
            raise UserError(f"measure '{name}': not known here; use names such as {_EXAMPLES}")
        if depth is not None and (_cutoff(measure) or 0) > depth:
            raise UserError(
                f"measure {measure} looks at {_cutoff(measure)} documents but top_k keeps {depth}: it would "
                f"come out too low; raise top_k to {_cutoff(measure)} or leave {measure} out of the measures"
            )
        if measure not in parsed:
            parsed.append(measure)
    if not parsed:
        raise UserError(f"no measures; name some, such as {_EXAMPLES}")
    return parsed


def _cutoff(measure: Any) -> int | None:
    return measure.params.get("cutoff")


def _whole(measure: Any) -> Any:
    """The measure as pytrec_eval is asked for it: RR without its cutoff, on a run that was cut."""
    if measure.NAME != "RR" or _cutoff(measure) is None or "judged_only" in measure.params:
        return measure
    return ir_measures.RR(**{name: value for name, value in measure.params.items() if name != "cutoff"})


def evaluate(run: Run, qrels: Qrels, measures: Iterable[str] = DEFAULT_MEASURES) -> Evaluation:
    """Measure a run, given as {query id: {document id: score}} or SearchRun, through pytrec_eval.

    Equal scores rank by descending document id, as in trec_eval, for every measure. A judged query
    that the run does not hold counts 0; a query of the run without judgments does not count.
    UserError: unknown measures, a NaN score, a query id twice, no query with judgments.
    """
    parsed = parse_measures(measures)
    per_query = {query_id: {str(measure): 0.0 for measure in parsed} for query_id in qrels}
    # pytrec_eval has no RR@k, and ir-measures' other provider of it ranks equal scores the other way.
    cutoffs = {_cutoff(measure) if measure.NAME == "RR" else None for measure in parsed}
    seen: set[str] = set()
    queries = iter(run.items())
    while block := list(islice(queries, _QUERIES_AT_ONCE)):
        _check_run(block, seen)
        for cutoff in cutoffs:
            asked = {_whole(m): str(m) for m in parsed if (_cutoff(m) if m.NAME == "RR" else None) == cutoff}
            cut = {name: dict(rank_documents(scores)[:cutoff]) for name, scores in block if name in qrels}
            # To trec_eval a relevance below 0 is the same as none, but its arrays begin at 0: it hangs or crashes.
            judged = {name: {id_: grade for id_, grade in qrels[name].items() if grade >= 0} for name in cut}
            evaluator = ir_measures.pytrec_eval.evaluator(asked, judged)
            for metric in evaluator.iter_calc(cut):
                per_query[metric.query_id][asked[metric.measure]] = float(metric.value)
    if seen.isdisjoint(qrels):
        raise UserError("no query of the run has judgments; give those of the queries that were searched")
    names = [str(measure) for measure in parsed]
    sums = {name: math.fsum(values[name] for values in per_query.values()) for name in names}
    means = {name: total / len(per_query) for name, total in sums.items()}
    return Evaluation(means, per_query)


def _check_run(queries: Iterable[tuple[str, Mapping[str, float]]], seen: set[str]) -> None:
    for query_id, scores in queries:
        if query_id in seen:
            raise UserError(f"query id '{query_id}' stands twice in the run; give each query its own id")
        seen.add(query_id)
        if any(score != score for score in scores.values()):
            raise UserError(f"query id '{query_id}' has a NaN score; look at the vectors it comes from")


def rank_documents(scores: Mapping[str, float]) -> list[tuple[str, float]]:
    """(document id, score) best first, in trec_eval's order: float32 scores, then ids, both descending."""
    # Python compares str by code point, which is the byte order of UTF-8 that trec_eval compares.
    return sorted(scores.items(), key=lambda pair: (np.float32(pair[1]), pair[0]), reverse=True)


def write_results(output_dir: str | os.PathLike, run: Run, evaluation: Evaluation, summary: Mapping) -> list[Path]:
    """Write run.trec, per_query.jsonl and metrics.json (means, then `summary`); returns their paths.

    All are written in full before the first takes its place; metrics.json comes last. A `run` of None
    writes no run.trec. UserError as write_run_lines raises it.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    names = ["metrics.json", "per_query.jsonl"] + ([] if run is None else ["run.trec"])
    with ExitStack() as files:
        opened = [files.enter_context(replaced_when_whole(folder / name)) for name in names]
        json.dump({**evaluation.means, **summary}, opened[0], indent=2)
        opened[0].write("\n")
        for query_id, values in evaluation.per_query.items():
            opened[1].write(json.dumps({"query_id": query_id, **values}, ensure_ascii=False) + "\n")
        if run is not None:
            write_run_lines(opened[2], run)
    return [folder / name for name in names]


def write_run_lines(file: IO[str], run: Run, tag: str = "ds_embed") -> None:
    """Write `query Q0 document rank score tag` lines; ranks from 1, scores that keep their float32 value.

    UserError: an id with white space, which would shift the columns.
    """
    for query_id, scores in run.items():
        for rank, (document_id, score) in enumerate(rank_documents(scores), start=1):
            line = f"{query_id} Q0 {document_id} {rank} {score:.9g} {tag}"
            if len(line.split()) != 6:
                ids = f"'{query_id}' or '{document_id}'"
                raise UserError(f"id {ids} holds white space, which splits TREC columns; give other ids")
            file.write(line + "\n")
