"""What a process needs to become a rank: the launcher's environment, its memory, DeepSpeed's own start."""

import ctypes
import os
import warnings

from ds_embed.settings.errors import UserError


def read_environment() -> tuple[int, int, int, int]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in os.environ]
    if not present:
        # Port 0 is any free one, taken when the store of the one rank opens: chosen before, another could take it.
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
    # The deepspeed launcher calls it LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", size)))
    return rank, size, local_rank, local_size


def choose_device(local_rank: int, num_visible: int) -> int:
    """The index of this rank's GPU among those that its process sees.

    Slurm's --gpus-per-task=1 and --gpu-bind show each task its own GPU alone, which is then number 0.
    UserError when a rank finds no GPU of its own.
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
    """Let malloc keep what a step frees, since the next step asks for it again.

    By default glibc hands large blocks back to the kernel at once, and every step pays for fresh
    zeroed pages: a tenth of a CPU training step. The peak is the same.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def join_deepspeed(device) -> None:
    """Let DeepSpeed adopt the process group that exists."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it warns that it had to find out
    # Notices about calls between these libraries, which a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed|transformers.modeling_utils")
    import deepspeed

    deepspeed.utils.logger.setLevel(os.environ["DEEPSPEED_LOG_LEVEL"].upper())
    if device.type == "cpu":
        # On first use DeepSpeed compiles a shared-memory all-reduce that only tensor-parallel inference
        # calls. Ranks that compile it at once race, and a killed build leaves a lock on which later
        # runs hang: declare it absent, nothing here needs it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
