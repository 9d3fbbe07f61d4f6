#!/usr/bin/env bash
# Train on any number of nodes. Submit from the root of the checkout:
#
#   sbatch --nodes 4 slurm/train.sh recipes/train_gpt.py --deepspeed ds_configs/zero3.json ...
#
# The recipe and its flags follow the script. Options of sbatch before the script override these:
#SBATCH --job-name=ds_embed
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Three minutes before the time limit, save, requeue and resume. B: signals this script, which tells the ranks.
#SBATCH --signal=B:USR1@180
set -euo pipefail
DS_EMBED_HOME="${DS_EMBED_HOME:-$SLURM_SUBMIT_DIR}"
[[ -f "$DS_EMBED_HOME/slurm/launch.sh" ]] || {
    echo "error: $DS_EMBED_HOME is not the checkout of ds_embed: submit from there, or set DS_EMBED_HOME" >&2
    exit 2
}
source "$DS_EMBED_HOME/slurm/launch.sh"

prepare "$@"
run_ranks "$@"
finish
