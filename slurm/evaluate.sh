#!/usr/bin/env bash
# Measure retrieval, without a GPU. Submit from the root of the checkout, with the flags of recipes/evaluate.py:
#
#   sbatch --dependency=afterok:$ID slurm/evaluate.sh --embeddings OUT/consumed_samplesX --query_files queries.jsonl
#
#SBATCH --job-name=ds_embed-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --output=%x-%j.log
set -euo pipefail
DS_EMBED_HOME="${DS_EMBED_HOME:-$SLURM_SUBMIT_DIR}"
[[ -f "$DS_EMBED_HOME/slurm/launch.sh" ]] || {
    echo "error: $DS_EMBED_HOME is not the checkout of ds_embed: submit from there, or set DS_EMBED_HOME" >&2
    exit 2
}
source "$DS_EMBED_HOME/slurm/launch.sh"

prepare recipes/evaluate.py "$@"
one_rank
run_ranks recipes/evaluate.py "$@"
finish
