"""Train a reranker: an encoder or a decoder that reads a query and a document together and gives one score.

    deepspeed recipes/train_reranker.py --deepspeed ds_configs/zero2.json --model_name_or_path MODEL \
        --train_files mined.jsonl --hard_negatives 7 --output_dir RUN

The records are those of an embedder, with hard negatives (recipes/mine_negatives.py). RUN/model loads in transformers
and in sentence-transformers' CrossEncoder; recipes/rerank.py and mine_negatives.py --cross_encoder read the run.
"""

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.settings import parse_arguments
from ds_embed.settings.reranker_arguments import RERANKER_ARGUMENTS, RERANKER_DEFAULTS
from ds_embed.training.reranker import RerankerRun


def main(argv: list[str] | None = None) -> None:
    world = initialize()
    RerankerRun(world, *parse_arguments(*RERANKER_ARGUMENTS, argv=argv, defaults=RERANKER_DEFAULTS)).train()


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
