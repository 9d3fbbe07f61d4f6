"""Rerank the top documents of each query, from a run file or from exact search in vectors.

    python recipes/rerank.py --model_name_or_path RERANKER_RUN --run_file run.trec \
        --query_files queries.jsonl --doc_files docs.jsonl --output_file reranked.trec
    deepspeed recipes/rerank.py --model_name_or_path RERANKER_RUN --embeddings OUT/consumed_samplesX ...

All ranks score. A job that was killed resumes when it is started again. recipes/evaluate.py --run_file measures the
output.
"""

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.settings import parse_arguments
from ds_embed.settings.tool_arguments import RerankArguments
from ds_embed.tools.rerank import rerank


def main(argv: list[str] | None = None) -> None:
    world = initialize()
    (arguments,) = parse_arguments(RerankArguments, argv=argv)
    rerank(world, arguments)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
