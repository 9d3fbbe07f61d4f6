"""Measure retrieval with vectors that recipes/generate.py wrote: exact search, then nDCG, MRR and recall.

    python recipes/evaluate.py --embeddings OUT/consumed_samplesX --query_files queries.jsonl
    python recipes/evaluate.py --embeddings OUT/consumed_samplesX --qrels qrels/test.tsv --output_dir RESULTS
    python recipes/evaluate.py --embeddings OUT/consumed_samplesX --query_files queries.jsonl --index hnsw

The right documents are those that the queries files name, or those of --qrels (TREC or BEIR format).
Writes metrics.json, per_query.jsonl and run.trec (for trec_eval, or to fuse with other runs).
"""

import time
from dataclasses import dataclass

from ds_embed.config import parse_arguments
from ds_embed.config.fields import setting
from ds_embed.config.index_arguments import SearchIndexArguments
from ds_embed.distributed import run_recipe
from ds_embed.retrieval.metrics import (
    DEFAULT_MEASURES,
    SearchRun,
    evaluate,
    match_qrels,
    parse_measures,
    read_qrels,
    read_qrels_from_queries,
    write_results,
)
from ds_embed.retrieval.vectors import read_embeddings


@dataclass
class EvaluateArguments:
    embeddings: str = setting("folder OUT/consumed_samplesX with test_queries and test_docs")
    query_files: list[str] = setting(
        "queries (JSONL or JSON array) whose doc_id is the right document; not read if --qrels is given",
        default_factory=list,
    )
    qrels: str | None = setting("judgments: a TREC qrels file, or a BEIR tsv with its header", default=None)
    output_dir: str | None = setting("folder for the results (default: --embeddings)", default=None)
    measures: list[str] = setting(
        "measures, named as ir-measures names them", default_factory=lambda: list(DEFAULT_MEASURES)
    )
    top_k: int = setting("number of documents kept for each query", default=100)
    write_run: bool = setting("write run.trec, whose ids cannot hold white space", default=True)
    device: str = setting("where the search runs: cpu or cuda", default="cpu")

    def __post_init__(self):
        if not self.query_files and self.qrels is None:
            raise ValueError("--query_files and --qrels are both missing; give one, to say what is right")
        if self.top_k < 1:
            raise ValueError(f"--top_k {self.top_k}: must be at least 1")


def main(argv=None):
    arguments, index = parse_arguments(EvaluateArguments, SearchIndexArguments, argv=argv)
    # Mistakes that take no time to find come before the vectors are read.
    names = [str(measure) for measure in parse_measures(arguments.measures, depth=arguments.top_k)]
    if arguments.qrels is not None:
        qrels, source = read_qrels(arguments.qrels), arguments.qrels
    else:
        qrels, source = read_qrels_from_queries(arguments.query_files), ", ".join(arguments.query_files)
    queries, documents = read_embeddings(arguments.embeddings)
    unjudged = match_qrels(qrels, queries.ids, documents.ids, source)
    if arguments.write_run:
        for vectors in (queries, documents):
            if (name := vectors.ids.first_with_white_space()) is not None:
                raise ValueError(
                    f"{vectors.path.with_suffix('.ids')}: id '{name}' holds white space, which splits the "
                    "columns of run.trec; give --write_run false, or other ids"
                )
    top_k = min(arguments.top_k, len(documents))
    print(f"queries    {len(queries)}, of which {len(qrels)} judged by {source}")
    if unjudged:
        print(f"           {len(unjudged)} without judgments, such as '{unjudged[0]}', are not measured")
    print(f"documents  {len(documents)}, vectors of {documents.rows.shape[1]} dimensions")
    print(f"top_k      {top_k}" + (" (all documents)" if top_k < arguments.top_k else ""), flush=True)

    # torch takes seconds to import; mistakes are found before
    from ds_embed.retrieval.faiss_index import recall_against_exact, search_by_arguments

    start = time.perf_counter()
    options = {"tie_rank": documents.ids.ranks, "device": arguments.device}
    scores, indices, kind = search_by_arguments(index, queries.rows, documents.rows, top_k, **options)
    print(f"searched   in {time.perf_counter() - start:.1f} seconds")
    indexed = {}
    if kind is not None:
        recall, depth, sampled = recall_against_exact(indices, queries.rows, documents.rows, **options)
        print(f"index      {kind}: recall@{depth} against exact search {recall:.4f} on {sampled} queries")
        indexed = {"index": kind, f"index_recall@{depth}": recall, "index_recall_queries": sampled}

    run = SearchRun(queries.ids, documents.ids, scores, indices)
    evaluation = evaluate(run, qrels, names)
    summary = {
        "num_queries": len(qrels),
        "num_documents": len(documents),
        "num_queries_without_qrels": len(unjudged),
        "top_k": top_k,
    } | indexed
    output_dir = arguments.output_dir or arguments.embeddings
    paths = write_results(output_dir, run if arguments.write_run else None, evaluation, summary)
    print()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {evaluation.means[name]:.4f}")
    print(f"\nwritten to {output_dir}: {', '.join(path.name for path in paths)}")


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
