"""From a run and its vectors to report.html and the charts beside it."""

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.data.records import read_document_texts, read_query_texts
from ds_embed.settings import ReportArguments
from ds_embed.settings.errors import UserError
from ds_embed.tools.report.answers import Answers, find_answers, map_documents, sample_documents, worst_queries
from ds_embed.tools.report.charts import STYLE, Chart, chart_of_documents, charts_of_similarity, draw_curves
from ds_embed.tools.report.run_log import RunLog, read_run
from ds_embed.vectors.metrics import read_qrels, read_qrels_from_queries
from ds_embed.vectors.vectors import Vectors, other_model, read_embeddings

_TOP_SHOWN = 3


@dataclass
class Section:
    """A part of the page; `missing` says why there is nothing to see and what would change that."""

    title: str
    intro: str = ""
    charts: list[Chart] = field(default_factory=list)
    measures: dict[str, float] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    missing: str = ""


def build_report(arguments: ReportArguments) -> tuple[Path, int]:
    """Write the report; returns the page's path and the number of charts beside it.

    UserError when the run, the vectors, the judgments or the texts can't be read or don't fit together.
    """
    import jinja2
    import matplotlib

    if arguments.map == "tsne" and importlib.util.find_spec("sklearn") is None:
        raise UserError("--map tsne: scikit-learn is not installed; pip install scikit-learn, or give --map pca")
    run = read_run(arguments.run)
    other = None if arguments.compare is None else read_run(arguments.compare)
    with matplotlib.rc_context(STYLE):
        titles = {"training": "Training", "retrieval": "Retrieval while training", "speed": "Speed"}
        sections = [Section(title, charts=draw_curves(name, run, other)) for name, title in titles.items()]
        sections += _vector_sections(arguments, run)
        if not sections[1].charts:
            missing = "val_query_files and --val_doc_files"
            sections[1].missing = f"No retrieval was measured: set --val_check_interval, --{missing}."
        charts = [chart for section in sections for chart in section.charts]
        output_dir = Path(arguments.output_dir).expanduser() if arguments.output_dir else run.path / "report"
        output_dir.mkdir(parents=True, exist_ok=True)
        pictures = {chart.name: chart.save(output_dir) for chart in charts}
    results = [each.results() for each in (run, other) if each]
    names = dict.fromkeys(name for of_run in results for name in of_run)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string((Path(__file__).parent / "page.html").read_text(encoding="utf-8")).render(
        run=run,
        other=other,
        results={name: [of_run.get(name, "–") for of_run in results] for name in names},
        sections=sections,
        pictures=pictures,
    )
    with replaced_when_whole(output_dir / "report.html") as file:
        file.write(page)
    return output_dir / "report.html", len(charts)


def _vector_sections(arguments: ReportArguments, run: RunLog) -> list[Section]:
    """Similarities, the map, and the failed queries; or one section that says why they are missing.

    Vectors, judgments and texts come from the flags, else from what the run keeps of its validation. UserError for
    flags that ask for what can't be had.
    """
    kept = {path.name[16:]: str(path) for path in run.path.glob("validation/consumed_samples*")}
    newest = max((number for number in kept if number.isdigit()), key=int, default="")
    embeddings = arguments.embeddings or kept.get(newest)
    title = "Similarities and failures"
    if embeddings is None:
        for name in ("query_files", "doc_files", "qrels"):
            if getattr(arguments, name):
                raise UserError(f"--{name}: has no use without vectors; give --embeddings OUT/consumed_samplesX")
        missing = "No vectors: give --embeddings OUT/consumed_samplesX of ds-embed generate with --query_files and "
        return [Section(title, missing=missing + "--doc_files, or train with --val_save_embeddings true.")]
    # A run's own validation files belong to its own validation's vectors only.
    config = {} if arguments.embeddings else run.config
    query_files = arguments.query_files or config.get("val_query_files", [])
    doc_files = arguments.doc_files or config.get("val_doc_files", [])
    if not query_files and not arguments.qrels:
        raise UserError("--embeddings: which documents are right is missing; give --query_files or --qrels")
    for path in [*query_files, *doc_files]:
        if ":" not in path and not Path(path).exists():  # a flag's file is there, so it is one of the run's own
            missing = f"The run's validation file {path} is not there (any more): give --query_files and --doc_files."
            return [Section(title, missing=missing)]
    queries, documents = read_embeddings(embeddings)
    of_another = _of_another_model(run, documents)
    qrels = read_qrels(arguments.qrels) if arguments.qrels else read_qrels_from_queries(query_files)
    source = arguments.qrels or ", ".join(query_files)
    ignore = arguments.ignore_identical_ids
    ignore = bool(config.get("ignore_identical_ids")) if ignore is None else ignore
    answers = find_answers(queries, documents, qrels, source, arguments.seed, ignore)
    intro = f"{len(answers.query_ids):,} queries searched in {len(documents):,} documents: {embeddings}"
    if answers.num_unjudged:
        intro += f"; {answers.num_unjudged:,} queries without judgments are left out"
    if ignore:
        intro += "; documents of a query's own id are left out"
    if of_another:
        intro += f". {of_another}"
    if answers.hint:
        intro += f". {answers.hint}"
    similarities = Section("Similarities", intro, charts_of_similarity(answers), answers.means)
    chosen = sample_documents(answers, arguments.map_documents, arguments.seed)
    if len(chosen) < 3:
        document_map = Section("Documents", missing=f"A map needs at least 3 documents; there are {len(chosen)}.")
    else:
        points, how = map_documents(documents.rows[chosen], arguments.map, arguments.seed)
        document_map = Section("Documents", charts=[chart_of_documents(answers, chosen, points, how)])
    return [similarities, document_map, _failures_section(arguments, answers, query_files, doc_files)]


def _of_another_model(run: RunLog, vectors: Vectors) -> str:
    """A warning, printed too, where the vectors are not of the run's model; "" where they are, or nobody can say.

    UserError for a reranker, which makes none.
    """
    from ds_embed.models.loading import find_model  # torch takes seconds to import
    from ds_embed.vectors.load import identify_with_card

    if "base_model" not in vectors.made_from or not (run.path / "model").exists():
        return ""
    source = find_model(str(run.path), flag="run")
    assert source.card is not None
    trust_remote_code = bool(run.config.get("trust_remote_code"))
    differs = other_model(vectors, identify_with_card(source, source.card, trust_remote_code))
    if not differs:
        return ""
    warning = f"The vectors are not those of {run.path / 'model'}, but of another model or a checkpoint ({differs})"
    print(f"warning: {warning}", file=sys.stderr)
    return warning


def _failures_section(
    arguments: ReportArguments, answers: Answers, query_files: list[str], doc_files: list[str]
) -> Section:
    failed = worst_queries(answers, arguments.worst_queries)
    if not failed:
        none = "Every query found its right document first." if arguments.worst_queries else "--worst_queries is 0."
        return Section("Worst queries", missing=none)
    intro = (
        f"The {len(failed):,} of {(answers.rank > 1).sum():,} queries without their right document at rank 1 that rank "
        f"it lowest, with the first {_TOP_SHOWN} documents. Scores are {answers.score_name}s."
    )
    if not query_files or not doc_files:
        intro += " Where only an id is shown, give --query_files and --doc_files."
    shown = {}  # by query: (rank, document row, score) of the first documents, and of the right one
    for query in failed:
        ranks, scores = range(1, _TOP_SHOWN + 1), answers.scores[query].tolist()
        shown[query] = list(zip(ranks, answers.indices[query].tolist(), scores))
        if answers.rank[query] > len(shown[query]):
            shown[query].append((answers.rank[query], answers.right[query], answers.right_score[query]))
    texts = read_document_texts(doc_files, {answers.document_ids[row] for of in shown.values() for _, row, _ in of})
    questions = read_query_texts(query_files, {answers.query_ids[query] for query in failed})

    def cut(text: str) -> str:
        length = arguments.show_characters
        return text if len(text) <= length else text[:length].rstrip() + " …"

    failures: list[dict[str, Any]] = []
    for query, of_query in shown.items():
        name, found = answers.query_ids[query], []
        for rank, row, score in of_query:
            id_, is_right = answers.document_ids[row], row in answers.relevant[query]
            found.append(
                {"rank": rank, "id": id_, "score": score, "is_right": is_right, "text": cut(texts.get(id_, ""))}
            )
        failures.append({"text": cut(questions.get(name, name)), "documents": found})
    return Section("Worst queries", intro, failures=failures)
