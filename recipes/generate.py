"""Encode queries and documents to OUT/consumed_samplesX/test_queries and test_docs.

    deepspeed recipes/generate.py --deepspeed ds_configs/zero3.json --model_name_or_path MODEL_OR_RUN \
        --query_files queries.jsonl --doc_files docs.jsonl --output_prefix OUT

A job that was killed resumes when it is started again. In a job array, each job adds --num_shards N --shard_index I;
`python recipes/generate.py` with the same flags and --num_shards N --merge_shards true then merges the shards.
"""

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.settings import EncodeArguments, ModelArguments, TextArguments, parse_arguments
from ds_embed.vectors.generate import generate


def main() -> None:
    world = initialize()
    generate(world, *parse_arguments(ModelArguments, TextArguments, EncodeArguments))


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
