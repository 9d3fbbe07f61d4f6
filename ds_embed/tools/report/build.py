"""From a run and its vectors to report.html and the charts beside it."""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.data.records import read_document_texts, read_query_texts
from ds_embed.settings import ReportArguments
from ds_embed.settings.errors import UserError
from ds_embed.tools.report.charts import map_chart, margin_chart, rank_chart, similarity_chart
from ds_embed.tools.report.curves import retrieval_chart, speed_charts, training_charts
from ds_embed.tools.report.facts import model_name, what_came_of_it, what_was_trained
from ds_embed.tools.report.neighbours import Found, find, map_documents, sample_documents, worst_queries
from ds_embed.tools.report.run_log import RunLog, read_run
from ds_embed.tools.report.style import Chart
from ds_embed.vectors.metrics import read_qrels, read_qrels_from_queries
from ds_embed.vectors.vectors import Vectors, read_embeddings

_TOP_SHOWN = 3


@dataclass
class Section:
    """A part of the page; `missing` says why there is nothing to see and what would change that."""

    id: str
    title: str
    intro: str = ""
    charts: list[Chart] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    missing: str = ""


@dataclass(frozen=True)
class _Sources:
    """Where vectors, judgments and texts come from: the flags, else what the run keeps of its validation."""

    embeddings: str
    query_files: list[str]
    doc_files: list[str]
    qrels: str | None


def build_report(arguments: ReportArguments) -> tuple[Path, int]:
    """Write the report; returns the page's path and the number of charts beside it.

    UserError when the run, the vectors, the judgments or the texts can't be read or don't fit together.
    """
    import jinja2

    if arguments.map == "tsne" and importlib.util.find_spec("sklearn") is None:
        raise UserError("--map tsne: scikit-learn is not installed; pip install scikit-learn, or give --map pca")
    run = read_run(arguments.run)
    other = None if arguments.compare is None else read_run(arguments.compare)
    sources = _find_sources(arguments, run)
    sections = [
        Section("training", "Training", charts=training_charts(run, other)),
        _validation_section(run, other),
        _speed_section(run, other),
        *_vector_sections(arguments, sources),
    ]
    charts = [chart for section in sections for chart in section.charts]
    retrieval = [figure for section in sections for figure in section.figures]
    output_dir = Path(arguments.output_dir).expanduser() if arguments.output_dir else run.path / "report"
    output_dir.mkdir(parents=True, exist_ok=True)
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(template).render(
        run=run,
        other=other,
        model=model_name(run),
        trained=what_was_trained(run),
        outcome=_outcome(run, other, retrieval),
        sections=sections,
    )
    for chart in charts:
        (output_dir / f"{chart.name}.png").write_bytes(chart.png)
    with replaced_when_whole(output_dir / "report.html") as file:
        file.write(page)
    return output_dir / "report.html", len(charts)


def _outcome(run: RunLog, other: RunLog | None, retrieval: list[tuple[str, str]]) -> list[tuple[str, ...]]:
    """(name, value) or, beside another run, (name, value, its value); what one run lacks is a dash there."""
    own = dict(what_came_of_it(run)) | {f"Retrieval {name}": value for name, value in retrieval}
    if other is None:
        return list(own.items())
    others = dict(what_came_of_it(other))
    return [(name, own.get(name, "–"), others.get(name, "–")) for name in {**own, **others}]


def _validation_section(run: RunLog, other: RunLog | None) -> Section:
    section = Section("retrieval", "Retrieval while training")
    chart = retrieval_chart(run, other)
    if chart is not None:
        section.charts = [chart]
    elif run.validation:
        section.missing = "This run's validation measured no retrieval: set --val_query_files and --val_doc_files."
    else:
        section.missing = "No validation in this run: set --val_check_interval, --val_query_files and --val_doc_files."
    return section


def _speed_section(run: RunLog, other: RunLog | None) -> Section:
    section = Section("speed", "Speed", charts=speed_charts(run, other))
    if run.restarts:
        steps = ", ".join(f"{step:,}" for step in run.restarts)
        section.intro = f"Restarted at step {steps}: the dotted lines. A run's first step after a start takes longer."
    elif not (run.path / "tensorboard").is_dir():
        section.intro = "Restarts are not marked: they are read from the run's TensorBoard files, and it has none."
    return section


def _vector_sections(arguments: ReportArguments, sources: _Sources | str) -> list[Section]:
    """Similarities, the map, and the failed queries; or one section that says why they are missing."""
    if isinstance(sources, str):
        return [Section("similarities", "Similarities and failures", missing=sources)]
    queries, documents = read_embeddings(sources.embeddings)
    if sources.qrels:
        qrels, source = read_qrels(sources.qrels), sources.qrels
    else:
        qrels, source = read_qrels_from_queries(sources.query_files), ", ".join(sources.query_files)
    found = find(queries, documents, qrels, source, arguments.seed)
    similarities = Section(
        "similarities",
        "Similarities",
        intro=f"{len(found.query_ids):,} queries searched in {len(documents):,} documents: {sources.embeddings}"
        + (f"; {found.num_unjudged:,} queries without judgments are left out" if found.num_unjudged else ""),
        charts=[chart for chart in (similarity_chart(found), margin_chart(found), rank_chart(found)) if chart],
        figures=[(name, f"{value:.4f}") for name, value in found.means.items()],
    )
    return [similarities, _map_section(arguments, found, documents), _failures_section(arguments, found, sources)]


def _find_sources(arguments: ReportArguments, run: RunLog) -> _Sources | str:
    """Where everything is, or why it is not there. UserError for flags that ask for what can't be had."""
    folders = [(int(m[1]), path) for path in run.path.glob("validation/*") if (m := _FOLDER.fullmatch(path.name))]
    embeddings = arguments.embeddings or (str(max(folders)[1]) if folders else None)
    if embeddings is None:
        asked = [name for name in ("query_files", "doc_files", "qrels") if getattr(arguments, name)]
        if asked:
            raise UserError(f"--{asked[0]}: has no use without vectors; give --embeddings OUT/consumed_samplesX")
        return (
            "No vectors: give --embeddings OUT/consumed_samplesX of recipes/generate.py with --query_files and "
            "--doc_files, or train with --val_save_embeddings true."
        )
    # A run's own validation files belong to its own validation's vectors only.
    config = {} if arguments.embeddings else run.config
    query_files = arguments.query_files or config.get("val_query_files", [])
    doc_files = arguments.doc_files or config.get("val_doc_files", [])
    if not query_files and not arguments.qrels:
        raise UserError("--embeddings: which documents are right is missing; give --query_files or --qrels")
    gone = [path for path in [*query_files, *doc_files] if not Path(path).is_file()]
    if gone:  # a flag's file is there, so it is one of the run's own
        return f"The run's validation file {gone[0]} is not there (any more): give --query_files and --doc_files."
    return _Sources(embeddings, query_files, doc_files, arguments.qrels)


_FOLDER = re.compile(r"consumed_samples(\d+)")


def _map_section(arguments: ReportArguments, found: Found, documents: Vectors) -> Section:
    section = Section("documents", "Documents")
    if len(documents) < 3:
        section.missing = f"A map needs at least 3 documents; there are {len(documents)}."
        return section
    rows = sample_documents(found, arguments.map_documents, arguments.seed)
    points, share = map_documents(documents.rows[rows], arguments.map, arguments.seed)
    section.charts = [map_chart(found, rows, points, share, arguments.map)]
    return section


def _failures_section(arguments: ReportArguments, found: Found, sources: _Sources) -> Section:
    section = Section("failures", "Worst queries")
    places = worst_queries(found, arguments.worst_queries)
    if not places:
        section.missing = (
            "Every query found its right document first."
            if arguments.worst_queries
            else "Left out: --worst_queries is 0."
        )
        return section
    missed = int((found.rank > 1).sum())
    section.intro = (
        f"The {len(places):,} of {missed:,} queries without their right document at rank 1 that rank it lowest, "
        f"with the first {_TOP_SHOWN} documents found. Scores are {found.score_name}s."
    )
    if not sources.query_files or not sources.doc_files:
        section.intro += " Where only an id is shown, give --query_files and --doc_files."
    shown = [found.indices[place][:_TOP_SHOWN].tolist() for place in places]
    wanted = {found.document_ids[row] for rows in shown for row in rows}
    wanted |= {found.document_ids[found.right[place]] for place in places}
    texts = read_document_texts(sources.doc_files, wanted)
    questions = read_query_texts(sources.query_files, {found.query_ids[place] for place in places})
    cut = _cutter(arguments.show_characters)

    def document(row: int, rank: int, score: float, is_right: bool) -> dict[str, Any]:
        name = found.document_ids[row]
        return {"rank": rank, "id": name, "score": score, "text": cut(texts.get(name, "")), "is_right": is_right}

    for place, rows in zip(places, shown):
        relevant = set(found.relevant[place])
        best = [
            document(row, rank, found.scores[place, rank - 1], row in relevant)
            for rank, row in enumerate(rows, start=1)
        ]
        if found.rank[place] > len(best):
            best.append(document(found.right[place], found.rank[place], found.right_score[place], True))
        name = found.query_ids[place]
        section.failures.append({"id": name, "text": cut(questions.get(name, "")), "documents": best})
    return section


def _cutter(length: int) -> Callable[[str], str]:
    return lambda text: text if len(text) <= length else text[:length].rstrip() + " …"
