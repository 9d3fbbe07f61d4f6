"""Turn a process into a rank: read the launcher's environment, configure malloc and initialize DeepSpeed."""

import ctypes
import os
import warnings

from ds_embed.settings.errors import UserError


def read_environment() -> tuple[int, int, int, int]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in os.environ]
    if not present:
        # Port 0 means any free port, bound when the store opens; a port chosen earlier could be taken meanwhile.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    elif len(present) < len(names):
        missing = [name for name in names if name not in os.environ]
        raise UserError(
            f"the environment sets {', '.join(present)} but not {', '.join(missing)}: "
            "start with `deepspeed`, `torchrun` or slurm/train.sh, or unset them to run one process"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    os.environ["LOCAL_RANK"] = str(local_rank)
    # The deepspeed launcher calls this LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", size)))
    return rank, size, local_rank, local_size


def choose_device(local_rank: int, num_visible: int) -> int:
    """The index of this rank's GPU among those that its process sees.

    With Slurm's --gpus-per-task=1 or --gpu-bind, each task sees only its own GPU, which then has index 0. UserError if
    a rank has no GPU of its own.
    """
    if num_visible == 1:
        return 0
    if local_rank >= num_visible:
        raise UserError(
            f"LOCAL_RANK {local_rank}: this process sees {num_visible} GPUs (CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}); start as many ranks on a node as it has GPUs, or show "
            "each rank one GPU (srun --gpus-per-task=1)"
        )
    return local_rank


def keep_freed_memory() -> None:
    """Let malloc keep the memory that a step frees, since the next step needs it again.

    By default glibc returns large blocks to the kernel at once, so every step pays for freshly zeroed pages: a tenth of
    a CPU training step. Peak memory is unchanged.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def join_deepspeed(device) -> None:
    """Let DeepSpeed adopt the existing process group."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # otherwise DeepSpeed warns that it had to detect it
    # Warnings about how these libraries call each other, which a user can't act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed|transformers.modeling_utils")
    import deepspeed

    deepspeed.utils.logger.setLevel(os.environ["DEEPSPEED_LOG_LEVEL"].upper())
    if device.type == "cpu":
        # On first use DeepSpeed compiles a shared-memory all-reduce that only tensor-parallel inference calls. Ranks
        # that compile it simultaneously race, and a killed build leaves a lock on which later runs hang. Nothing here
        # needs it, so declare it unavailable.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
