# ds_embed with CUDA, in the versions of constraints.txt:
#   docker build --tag ds-embed .
#   docker run --gpus all --ipc host --volume "$PWD:/work" ds-embed train-gpt --deepspeed zero2 ...
# --ipc host (or --shm-size 8g) because NCCL shares memory between the ranks through /dev/shm.
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Versions of the distribution's packages follow the tag of the image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/ds_embed PATH=/opt/ds_embed/bin:$PATH PIP_NO_CACHE_DIR=1

WORKDIR /src
COPY constraints.txt ./
# Before the code: this layer, which is by far the largest, stays as long as the versions do.
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --constraint constraints.txt pip setuptools wheel torch numpy
COPY . .
RUN pip install --constraint constraints.txt --no-build-isolation '.[export,mteb]' \
    && ds-embed --version

WORKDIR /work
ENTRYPOINT ["ds-embed"]
CMD ["doctor"]
