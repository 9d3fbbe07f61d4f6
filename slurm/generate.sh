#!/usr/bin/env bash
# Encode queries and documents. Submit from the root of the checkout, with the flags of recipes/generate.py:
#
#   sbatch --nodes 2 slurm/generate.sh --model_name_or_path RUN --doc_files docs.jsonl --output_prefix OUT
#
# or as an array of jobs, each of which encodes a shard of the rows, and a job that merges the shards:
#
#   ID=$(sbatch --parsable --array=0-7 slurm/generate.sh --model_name_or_path RUN ... --output_prefix OUT)
#   sbatch --dependency=afterok:$ID slurm/generate.sh --model_name_or_path RUN ... --output_prefix OUT \
#       --num_shards 8 --merge_shards true
#
# Encoding can be stopped at any time and resumes where it was, so the job simply stops near the time limit.
#SBATCH --job-name=ds_embed-generate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#SBATCH --signal=B:USR1@30
set -euo pipefail
DS_EMBED_HOME="${DS_EMBED_HOME:-$SLURM_SUBMIT_DIR}"
[[ -f "$DS_EMBED_HOME/slurm/launch.sh" ]] || {
    echo "error: $DS_EMBED_HOME is not the checkout of ds_embed: submit from there, or set DS_EMBED_HOME" >&2
    exit 2
}
source "$DS_EMBED_HOME/slurm/launch.sh"

set -- recipes/generate.py "$@"
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
    set -- "$@" --num_shards "$SLURM_ARRAY_TASK_COUNT" --shard_index $((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))
fi
prepare "$@"
[[ " $* " != *" --merge_shards true "* ]] || one_rank
RESTARTS_ANYWHERE=yes
run_ranks "$@"
finish
