# shellcheck shell=bash
# Site settings of the job scripts: edit this file once for a cluster. It is read on the node that runs the
# script, and its exported variables reach every rank.

# Python that has ds_embed, at the same path on all nodes (`make install` makes this one).
export DS_EMBED_PYTHON="${DS_EMBED_PYTHON:-$DS_EMBED_HOME/.venv/bin/python}"

# How often a job that saved and stopped may put itself back into the queue.
export DS_EMBED_MAX_REQUEUES="${DS_EMBED_MAX_REQUEUES:-100}"

# What sites often need:
# module load cuda/12.6
# export HF_HOME=/shared/huggingface HF_HUB_OFFLINE=1   # models on a file system that all nodes see
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # the network between the nodes
