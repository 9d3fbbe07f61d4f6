# shellcheck shell=bash
# Site settings for the job scripts: edit this file once per cluster. It is sourced on the node that runs the
# script, and its exported variables reach every rank.

# The Python with ds_embed, at the same path on all nodes (`make install` creates this one).
export DS_EMBED_PYTHON="${DS_EMBED_PYTHON:-$DS_EMBED_HOME/.venv/bin/python}"

# How many times a job that saved and stopped may requeue itself.
export DS_EMBED_MAX_REQUEUES="${DS_EMBED_MAX_REQUEUES:-100}"

# Settings that sites often need:
# module load cuda/12.6
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1   # models on a shared file system
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network between the nodes
