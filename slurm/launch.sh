# shellcheck shell=bash disable=SC1090
# How the job scripts start a recipe: one rank per GPU (or per task, without GPUs), using only srun.
# Sourced by train.sh, generate.sh and evaluate.sh.

fail() {
    echo "error: $*" >&2
    exit 2
}

# Check that the checkout and the Python exist on every node. Time in a queue is expensive, so mistakes must
# show up in the first seconds.
prepare() {
    [[ -n "${SLURM_JOB_ID:-}" ]] || fail "no job: submit this script with sbatch"
    [[ $# -gt 0 ]] || fail "nothing to run: give a recipe and its flags after the script"
    cd "$DS_EMBED_HOME" || exit 2
    local env_file="${DS_EMBED_ENV:-$DS_EMBED_HOME/slurm/env.sh}"
    [[ -f "$env_file" ]] || fail "DS_EMBED_ENV=$env_file: no such file; it must contain the settings of the site"
    source "$env_file"
    [[ -f "$1" ]] || fail "recipe $1: no such file in $DS_EMBED_HOME"
    srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task=1 --overcommit --quit-on-interrupt \
        bash -c '[[ -x "$0" ]] || { echo "error: DS_EMBED_PYTHON=$0: no such program on node $(hostname); \
run make install on a file system shared by all nodes, or set it in slurm/env.sh" >&2; exit 2; }' \
        "$DS_EMBED_PYTHON" || exit 2

    NUM_NODES="$SLURM_JOB_NUM_NODES"
    RANKS_PER_NODE="${SLURM_GPUS_ON_NODE:-0}"
    if [[ "$RANKS_PER_NODE" -eq 0 ]]; then
        RANKS_PER_NODE="${SLURM_NTASKS_PER_NODE:-1}"
    elif [[ "${SLURM_NTASKS_PER_NODE:-$RANKS_PER_NODE}" -ne "$RANKS_PER_NODE" ]]; then
        fail "--ntasks-per-node=$SLURM_NTASKS_PER_NODE with --gpus-per-node=$RANKS_PER_NODE:" \
            "each rank uses one GPU; remove --ntasks-per-node"
    fi
    # sbatch passes its own options to srun through these variables; they would conflict with the options below.
    unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_NTASKS SLURM_NPROCS \
        SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_GPU_BIND
    export MASTER_ADDR MASTER_PORT
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # different ports for jobs that share a node
}

# For work that runs as one process.
one_rank() {
    RANKS_PER_NODE=1
    NUM_NODES=1
}

# Run a recipe on all ranks and store its exit code in CODE. A signal to the batch script is forwarded to the
# ranks, which save and exit with 85. A recipe that can resume from any point (RESTARTS_ANYWHERE) is terminated.
run_ranks() {
    local cpus=$((${SLURM_CPUS_ON_NODE:-1} / RANKS_PER_NODE))
    local asked=""
    echo "$(date '+%F %T') $NUM_NODES node(s) ($SLURM_JOB_NODELIST) x $RANKS_PER_NODE rank(s)," \
        "$MASTER_ADDR:$MASTER_PORT, start $((${SLURM_RESTART_COUNT:-0} + 1))"
    # A rank that fails ends the others at once. Every rank sees all GPUs of its node and selects one by LOCAL_RANK.
    srun --kill-on-bad-exit=1 --nodes="$NUM_NODES" --ntasks-per-node="$RANKS_PER_NODE" \
        --ntasks=$((NUM_NODES * RANKS_PER_NODE)) --cpus-per-task=$((cpus > 0 ? cpus : 1)) --overcommit \
        bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID \
LOCAL_WORLD_SIZE='"$RANKS_PER_NODE"'; exec "$0" "$@"' "$DS_EMBED_PYTHON" -u "$@" &
    local ranks=$!
    local send=USR1
    [[ -z "${RESTARTS_ANYWHERE:-}" ]] || send=TERM
    trap 'asked=yes' USR1 TERM
    while true; do
        CODE=0
        wait "$ranks" || CODE=$? # returns on every signal; the ranks have finished when the process no longer exists
        kill -0 "$ranks" 2>/dev/null || break
        # srun drops a signal that comes before it has started the ranks, so it is sent until they end.
        while kill "-$send" "$ranks" 2>/dev/null; do sleep 2; done
    done
    trap - USR1 TERM
    # The signal killed the ranks before they had installed a handler: there was nothing to save yet.
    [[ -z "$asked" || "$CODE" -le 128 ]] || CODE=85
}

# Exit with the code of the ranks. If they saved and stopped (85), or a rank or its node was lost (3), requeue the job.
finish() {
    if [[ "$CODE" -ne 85 && "$CODE" -ne 3 ]]; then
        [[ "$CODE" -eq 0 ]] || echo "error: job $SLURM_JOB_ID failed with exit code $CODE; the reason is above" >&2
        exit "$CODE"
    fi
    local count="${SLURM_RESTART_COUNT:-0}" state="work saved"
    [[ "$CODE" -eq 85 ]] || state="a rank was lost"
    [[ "$count" -lt "$DS_EMBED_MAX_REQUEUES" ]] ||
        fail "$state, but the job was already requeued $count times: raise DS_EMBED_MAX_REQUEUES and submit the same command"
    echo "$(date '+%F %T') $state; job $SLURM_JOB_ID is requeued and will resume from there"
    # After a preemption Slurm may already have requeued it.
    scontrol requeue "$SLURM_JOB_ID" 2>/dev/null || [[ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" == PENDING ]] ||
        fail "$state, but Slurm does not requeue this job; submit the same command again to resume"
    exit "$CODE"
}
