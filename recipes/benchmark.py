"""Measure a model on mteb tasks, NanoBEIR, BEIR folders and your own files, with one command and one table.

    ds-embed benchmark --model_name_or_path RUN --tasks SciFact STSBenchmark NanoBEIR beir/scifact --output_dir DIR
    python recipes/benchmark.py --model_name_or_path RUN --query_files queries.jsonl --doc_files docs.jsonl \
        --output_dir DIR

Results are in mteb's format. When started again with the same model and settings, it skips finished tasks. All ranks
encode. It needs mteb: pip install -e '.[mteb]'.
"""

import importlib.util

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.settings import ModelArguments, TextArguments, parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.settings.tool_arguments import BenchmarkArguments


def main(argv: list[str] | None = None) -> None:
    world = initialize()
    settings = parse_arguments(ModelArguments, TextArguments, BenchmarkArguments, argv=argv)
    if importlib.util.find_spec("mteb") is None:
        raise UserError("mteb, which provides the tasks and measures, is not installed: pip install -e '.[mteb]'")
    from ds_embed.tools.benchmark import benchmark

    benchmark(world, *settings)


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
