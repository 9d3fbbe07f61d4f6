# shellcheck shell=bash disable=SC1090
# How the job scripts start a recipe: one rank per GPU (or per task, where there are no GPUs), by srun alone.
# Sourced by train.sh, generate.sh and evaluate.sh.

fail() {
    echo "error: $*" >&2
    exit 2
}

# Find the checkout and the Python, and see that both are there on every node: minutes in a queue are
# expensive, so a mistake must show in the first seconds.
prepare() {
    [[ -n "${SLURM_JOB_ID:-}" ]] || fail "no job: submit this script with sbatch"
    [[ $# -gt 0 ]] || fail "nothing to run: give a recipe and its flags behind the script"
    cd "$DS_EMBED_HOME" || exit 2
    local env_file="${DS_EMBED_ENV:-$DS_EMBED_HOME/slurm/env.sh}"
    [[ -f "$env_file" ]] || fail "DS_EMBED_ENV=$env_file: no such file; it holds the settings of the site"
    source "$env_file"
    [[ -f "$1" ]] || fail "recipe $1: no such file in $DS_EMBED_HOME"
    srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" --cpus-per-task=1 --overcommit --quit-on-interrupt \
        bash -c '[[ -x "$0" ]] || { echo "error: DS_EMBED_PYTHON=$0: no such program on node $(hostname); \
run make install on a file system that all nodes see, or set it in slurm/env.sh" >&2; exit 2; }' \
        "$DS_EMBED_PYTHON" || exit 2

    NUM_NODES="$SLURM_JOB_NUM_NODES"
    RANKS_PER_NODE="${SLURM_GPUS_ON_NODE:-0}"
    if [[ "$RANKS_PER_NODE" -eq 0 ]]; then
        RANKS_PER_NODE="${SLURM_NTASKS_PER_NODE:-1}"
    elif [[ "${SLURM_NTASKS_PER_NODE:-$RANKS_PER_NODE}" -ne "$RANKS_PER_NODE" ]]; then
        fail "--ntasks-per-node=$SLURM_NTASKS_PER_NODE with --gpus-per-node=$RANKS_PER_NODE:" \
            "a rank drives one GPU; leave --ntasks-per-node out"
    fi
    # sbatch hands its own options on to srun through these; they would contradict the ones given below.
    unset SLURM_CPUS_PER_GPU SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_NTASKS SLURM_NPROCS \
        SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_GPU_BIND
    export MASTER_ADDR MASTER_PORT
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs that share a node get different ones
}

# For work that is one process's.
one_rank() {
    RANKS_PER_NODE=1
    NUM_NODES=1
}

# Run a recipe on all ranks. Its exit code is left in CODE. A signal that the batch script gets meanwhile is
# sent on to the ranks, which save and leave with 85; a recipe that goes on from any instant (RESTARTS_ANYWHERE)
# is just ended.
run_ranks() {
    local cpus=$((${SLURM_CPUS_ON_NODE:-1} / RANKS_PER_NODE))
    local asked=""
    echo "$(date '+%F %T') $NUM_NODES node(s) ($SLURM_JOB_NODELIST) x $RANKS_PER_NODE rank(s)," \
        "$MASTER_ADDR:$MASTER_PORT, start $((${SLURM_RESTART_COUNT:-0} + 1))"
    # A rank that fails ends the others at once. Every rank sees all GPUs of its node and takes its own by LOCAL_RANK.
    srun --kill-on-bad-exit=1 --nodes="$NUM_NODES" --ntasks-per-node="$RANKS_PER_NODE" \
        --ntasks=$((NUM_NODES * RANKS_PER_NODE)) --cpus-per-task=$((cpus > 0 ? cpus : 1)) --overcommit \
        bash -c 'export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID \
LOCAL_WORLD_SIZE='"$RANKS_PER_NODE"'; exec "$0" "$@"' "$DS_EMBED_PYTHON" -u "$@" &
    local ranks=$!
    local send=USR1
    [[ -z "${RESTARTS_ANYWHERE:-}" ]] || send=TERM
    trap 'asked=yes; kill -$send $ranks 2>/dev/null || true' USR1 TERM
    # `wait` ends whenever a signal comes; the ranks are done when they are no more.
    CODE=0
    while true; do
        CODE=0
        wait "$ranks" || CODE=$?
        kill -0 "$ranks" 2>/dev/null || break
    done
    trap - USR1 TERM
    # Ended by the signal itself, which came before they could listen: nothing was under way that is not saved.
    [[ -z "$asked" || "$CODE" -le 128 ]] || CODE=85
}

# End the job as its ranks ended; where they saved and stopped (85), or a rank or its node was lost (3), put it back
# into the queue.
finish() {
    if [[ "$CODE" -ne 85 && "$CODE" -ne 3 ]]; then
        [[ "$CODE" -eq 0 ]] || echo "error: job $SLURM_JOB_ID failed with exit code $CODE; the reason stands above" >&2
        exit "$CODE"
    fi
    local count="${SLURM_RESTART_COUNT:-0}" state="work saved"
    [[ "$CODE" -eq 85 ]] || state="a rank was lost"
    [[ "$count" -lt "$DS_EMBED_MAX_REQUEUES" ]] ||
        fail "$state, but started again $count times already: raise DS_EMBED_MAX_REQUEUES and submit the same command"
    echo "$(date '+%F %T') $state; job $SLURM_JOB_ID goes back into the queue and on from there"
    # After a preemption Slurm may have put it there already.
    scontrol requeue "$SLURM_JOB_ID" 2>/dev/null || [[ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" == PENDING ]] ||
        fail "$state, but Slurm does not requeue this job; submit the same command again to go on"
    exit "$CODE"
}
