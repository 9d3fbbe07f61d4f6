"""Measure retrieval with vectors written by recipes/generate.py: exact search, then nDCG, MRR and recall.

    python recipes/evaluate.py --embeddings OUT/consumed_samplesX --query_files queries.jsonl
    python recipes/evaluate.py --embeddings OUT/consumed_samplesX --query_files queries.jsonl --index hnsw
    python recipes/evaluate.py --embeddings OUT/consumed_samplesX --qrels qrels/test.tsv --output_dir RESULTS \
        --compare OTHER_RESULTS --truncate_dims 64 128 256 --quantize int8 binary
    python recipes/evaluate.py --run_file bm25.trec --qrels qrels/test.tsv --output_dir BM25
    deepspeed recipes/evaluate.py --device cuda --embeddings OUT/consumed_samplesX --query_files queries.jsonl

The relevant documents are those named in the query files, or those in --qrels (TREC or BEIR format). Several ranks
share the exact search, with bitwise equal results. It writes metrics.json, per_query.jsonl and run.trec (for trec_eval,
or to fuse with other runs).
"""

import os

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.settings import parse_arguments
from ds_embed.settings.tool_arguments import SearchIndexArguments
from ds_embed.tools.evaluate import EvaluateArguments, evaluate_and_print


def main(argv: list[str] | None = None) -> None:
    # A single process needs no process group, which takes seconds to start.
    world = initialize() if int(os.environ.get("WORLD_SIZE") or 1) > 1 else None
    evaluate_and_print(*parse_arguments(EvaluateArguments, SearchIndexArguments, argv=argv), world)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
