"""Mine hard negatives for training records: similar documents that are not positives, with scores.

    deepspeed recipes/mine_negatives.py --model_name_or_path RUN --train_files train.jsonl \
        --output_file mined.jsonl --num_negatives 4 --relative_margin 0.05
    python recipes/mine_negatives.py --method bm25 --train_files train.jsonl --output_file mined.jsonl

Candidates are the pos_doc of all records, or --doc_files. It writes the records with neg_doc, pos_score and
neg_scores, a summary (.summary.json) and a plot of the scores (.scores.png). A job that was killed resumes when it is
started again.
"""

from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.settings import ModelArguments, TextArguments, parse_arguments
from ds_embed.settings.tool_arguments import MINING_DEFAULTS, MiningArguments
from ds_embed.tools.mine.job import mine


def main() -> None:
    world = initialize()
    mine(world, *parse_arguments(ModelArguments, TextArguments, MiningArguments, defaults=MINING_DEFAULTS))


if __name__ == "__main__":
    raise SystemExit(run_recipe(main))
