"""What recipes/evaluate.py does: search, or read a run, and measure it against judgments."""

import contextlib
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError
from ds_embed.settings.fields import Settings, optional, setting, several
from ds_embed.settings.tool_arguments import SearchIndexArguments
from ds_embed.vectors import metrics
from ds_embed.vectors.compressed import QUANTIZED, describe_compressed, measure_compressed
from ds_embed.vectors.significance import compare_runs, describe_comparisons, read_per_query
from ds_embed.vectors.vectors import Vectors, read_embeddings


@dataclass
class EvaluateArguments(Settings):
    embeddings: str | None = optional("folder OUT/consumed_samplesX with test_queries and test_docs")
    run_file: str | None = optional("TREC run file to measure instead of --embeddings")
    query_files: list[str] = several(
        "queries (JSONL or JSON array) whose doc_id is the relevant document; not read if --qrels is given"
    )
    qrels: str | None = optional("judgments: TREC qrels, a BEIR tsv, or JSON lines with query_id, doc_id and score")
    skip_unknown: bool = setting(
        "accept judgments that name ids without a vector: such queries are not measured, such documents count as not "
        "retrieved",
        False,
    )
    ignore_identical_ids: bool = setting(
        "ignore the document that has the same id as the query, for queries that are also documents (ArguAna, Quora)",
        False,
    )
    output_dir: str | None = optional("folder for the results (default: --embeddings)")
    measures: list[str] = setting(
        "measures, named as in ir-measures", default_factory=lambda: list(metrics.DEFAULT_MEASURES)
    )
    top_k: int = setting("number of documents kept for each query", 100, at_least=1, needs="embeddings")
    write_run: bool = setting("write run.trec, whose ids must not contain white space", True)
    device: str = setting(
        "where the search runs: cpu or cuda; with several ranks, each on its own GPU", "cpu", needs="embeddings"
    )
    compare: str | None = optional("results folder of another run, to test the difference query by query")
    truncate_dims: list[int] = several(
        "also measure vectors truncated to these numbers of dimensions and normalized", at_least=1, needs="embeddings"
    )
    quantize: list[str] = several(
        f"also measure quantized documents: {', '.join(QUANTIZED)} (one byte or one bit per dimension)",
        choices=QUANTIZED,
        needs="embeddings",
    )
    rescore_multiplier: int = setting(
        "binary: rescore this many times top_k documents with the float32 query; 0 disables rescoring",
        4,
        at_least=0,
        needs="quantize binary",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.embeddings is None) == (self.run_file is None):
            raise UserError("give either --embeddings or --run_file, to say what is measured")
        if not self.query_files and self.qrels is None:
            raise UserError("--query_files and --qrels are both missing; give one, to say what is right")
        if self.run_file is not None and self.output_dir is None:
            raise UserError("--output_dir is missing: --run_file has no folder of its own for the results")


def evaluate_and_print(arguments: EvaluateArguments, index: SearchIndexArguments, world: World | None = None) -> None:
    """Measure, compare, write the results to --output_dir and print them.

    With a world every rank must call this: all read what there is to read and search a share of the documents, and the
    first alone measures, prints and writes.
    """
    with contextlib.ExitStack() as stack:
        if world is not None and not world.is_main:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
        _evaluate(arguments, index, world)


def _evaluate(arguments: EvaluateArguments, index: SearchIndexArguments, world: World | None) -> None:
    # Mistakes that take no time to find come before the vectors are read.
    depth = arguments.top_k if arguments.run_file is None else None  # of a run file all is measured
    names = [str(measure) for measure in metrics.parse_measures(arguments.measures, depth=depth)]
    other = None if arguments.compare is None else read_per_query(arguments.compare, names)
    if arguments.qrels is not None:
        qrels, source = metrics.read_qrels(arguments.qrels), arguments.qrels
    else:
        qrels, source = metrics.read_qrels_from_queries(arguments.query_files), ", ".join(arguments.query_files)
    measure = _run_of_vectors if arguments.run_file is None else _run_of_file
    run, qrels, summary = measure(arguments, index, world, qrels, source, names)

    def write() -> None:
        _measure_and_write(arguments, run, qrels, summary, names, other)

    if world is None:
        write()
    else:
        world.on_main("measure", write)


def _measure_and_write(
    arguments: EvaluateArguments,
    run: metrics.Run,
    qrels: metrics.Qrels,
    summary: dict[str, Any],
    names: list[str],
    other: Any,
) -> None:
    if hint := metrics.hint_at_identical(run, qrels):
        print(f"hint: {hint}", flush=True)
    evaluation = metrics.evaluate(run, qrels, names)
    comparisons = []
    if other is not None and arguments.compare is not None:
        comparisons = compare_runs(evaluation.per_query, other, names, arguments.compare)
        summary |= {"compared_with": arguments.compare, "comparison": [asdict(one) for one in comparisons]}
    output_dir = arguments.output_dir or arguments.embeddings or ""
    written_run = run if arguments.write_run and isinstance(run, metrics.SearchRun) else None
    paths = metrics.write_results(output_dir, written_run, evaluation, summary)
    print()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {evaluation.means[name]:.4f}")
    if "compressed_vectors" in summary:
        print("\n" + "\n".join(describe_compressed(summary["compressed_vectors"], names)))
    if comparisons:
        print(f"\ncompared with {arguments.compare}, {len(evaluation.per_query)} queries")
        print("\n".join(describe_comparisons(comparisons)))
    print(f"\nwritten to {output_dir}: {', '.join(path.name for path in paths)}")


def _run_of_file(
    arguments: EvaluateArguments,
    index: SearchIndexArguments,
    world: World | None,
    qrels: dict,
    source: str,
    names: list[str],
) -> tuple[Any, dict, dict[str, Any]]:
    """The run of --run_file, the judgments to measure it by, and what metrics.json says of both."""
    if not index.is_exact:
        raise UserError("--index: there are no vectors to search with --run_file; leave one of them out")
    assert arguments.run_file is not None
    run = metrics.load_run(arguments.run_file)
    if arguments.ignore_identical_ids:
        run = {query: {name: s for name, s in found.items() if name != query} for query, found in run.items()}
    qrels, _, summary = _judged(arguments, qrels, list(run), None, source)
    print(f"queries    {len(run)} of {arguments.run_file}, of which {len(qrels)} judged by {source}")
    return run, qrels, summary


def _run_of_vectors(
    arguments: EvaluateArguments,
    index: SearchIndexArguments,
    world: World | None,
    qrels: dict,
    source: str,
    names: list[str],
) -> tuple[Any, dict, dict[str, Any]]:
    """As _run_of_file, of a search through --embeddings, with the measures of compressed vectors."""
    assert arguments.embeddings is not None
    if world is not None and not index.is_exact:
        flag = f"--index {index.index}" if index.index_file is None else f"--index_file {index.index_file}"
        raise UserError(f"{flag}: FAISS searches in one process; start it without ranks, or leave the flag out")
    folder, read = arguments.embeddings, list[Vectors]()
    if world is not None:  # one rank looks at every row
        world.on_main("read vectors", lambda: read.extend(read_embeddings(folder)))
    queries, documents = read or read_embeddings(folder, every_row=world is None)
    dimensions = documents.rows.shape[1]
    for dims in arguments.truncate_dims:
        if dims >= dimensions:
            raise UserError(f"--truncate_dims {dims}: the vectors have {dimensions} dimensions; choose fewer")
    qrels, unjudged, summary = _judged(arguments, qrels, queries.ids, documents.ids, source)
    for vectors in (queries, documents) if arguments.write_run else ():
        if (name := vectors.ids.first_with_white_space()) is not None:
            raise UserError(
                f"{vectors.path.with_suffix('.ids')}: id '{name}' holds white space, which splits the "
                "columns of run.trec; give --write_run false, or other ids"
            )
    top_k = min(arguments.top_k, len(documents))
    print(f"queries    {len(queries)}, of which {len(qrels)} judged by {source}")
    if unjudged:
        print(f"           {len(unjudged)} without judgments, such as '{unjudged[0]}', are not measured")
    print(f"documents  {len(documents)}, vectors of {dimensions} dimensions")
    print(f"top_k      {top_k}" + (" (all documents)" if top_k < arguments.top_k else ""), flush=True)
    device = arguments.device
    if world is not None:
        device = str(world.device) if device == world.device.type else device
        print(f"ranks      {world.size}, each searches its share of the documents", flush=True)

    # torch takes seconds to import; mistakes are found before
    from ds_embed.vectors.faiss_index import recall_against_exact, search_by_arguments

    start = time.perf_counter()
    options: dict[str, Any] = {"tie_rank": documents.ids.ranks, "device": device}
    depth = min(top_k + arguments.ignore_identical_ids, len(documents))
    scores, indices, kind = search_by_arguments(index, queries.rows, documents.rows, depth, world=world, **options)
    print(f"searched   in {time.perf_counter() - start:.1f} seconds")
    summary |= {"num_documents": len(documents), "top_k": top_k}
    if kind is not None:
        recall, depth, sampled = recall_against_exact(indices, queries.rows, documents.rows, **options)
        print(f"index      {kind}: recall@{depth} against exact search {recall:.4f} on {sampled} queries")
        summary |= {"index": kind, f"index_recall@{depth}": recall, "index_recall_queries": sampled}
    if arguments.ignore_identical_ids:
        scores, indices = metrics.without_identical(queries.ids, documents.ids, scores, indices, top_k)
    if arguments.truncate_dims or arguments.quantize:
        summary["compressed_vectors"] = measure_compressed(
            queries,
            documents,
            top_k,
            qrels,
            names,
            truncate_dims=arguments.truncate_dims,
            quantize=arguments.quantize,
            rescore_multiplier=arguments.rescore_multiplier,
            device=device,
            world=world,
            ignore_identical_ids=arguments.ignore_identical_ids,
        )
    return metrics.SearchRun(queries.ids, documents.ids, scores, indices), qrels, summary


def _judged(
    arguments: EvaluateArguments, qrels: dict, query_ids: Any, document_ids: Any, source: str
) -> tuple[dict, list[str], dict[str, Any]]:
    """The judgments to measure by, the queries without any, and what metrics.json says of both."""
    unknown: dict[str, int] = {}
    if arguments.skip_unknown:
        qrels, unknown = metrics.skip_unknown(qrels, query_ids, document_ids)
    for name, number in unknown.items():
        if number:
            print(f"warning: {source}: {number} {name.removeprefix('num_').replace('_', ' ')}")
    unjudged = metrics.match_qrels(qrels, query_ids, None if arguments.skip_unknown else document_ids, source)
    without = [query for query, judged in qrels.items() if max(judged.values(), default=0) <= 0]
    if without:
        print(
            f"warning: {source}: {len(without)} queries, such as '{without[0]}', have no relevant document and count as 0"
        )
    summary = {"num_queries": len(qrels), "num_queries_without_qrels": len(unjudged)}
    return qrels, unjudged, summary | {"ignore_identical_ids": arguments.ignore_identical_ids} | unknown
