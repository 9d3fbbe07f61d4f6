"""The ranks of a job: start, end, and every collective. No other module talks to other ranks.

Shapes: W ranks, n_r rows held by rank r, R = sum of n_r, D dimensions.
"""

import ctypes
import logging
import os
import pickle
import socket
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from typing import Any, Callable

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 85  # stopped by a signal with its work saved: start the same command again
_world: "World | None" = None


class FailedElsewhere(Exception):
    """Another rank met an error and has reported it; this rank only has to stop."""


@dataclass(frozen=True)
class World:
    """This process among the W processes of the job, and the collectives between them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: Any  # torch.device
    store: Any  # torch.distributed.Store, hosted by rank 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_gather_rows(self, rows, counts: list[int]):
        """Concatenate (n_r, D) rows of all ranks, in rank order, into (R, D) on every rank.

        `counts` holds n_r of every rank: all ranks know it from the plan, so it is not sent.
        """
        import torch

        assert len(counts) == self.size and rows.shape[0] == counts[self.rank]
        if self.size == 1:
            return rows
        longest = max(counts)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        gathered = rows.new_empty((self.size * longest, *rows.shape[1:]))
        _all_gather(gathered, padded)
        return torch.cat([gathered[r * longest : r * longest + count] for r, count in enumerate(counts)])

    def reduce_scatter_rows(self, rows, counts: list[int]):
        """Sum the (R, D) rows of all ranks and return this rank's (n_r, D) of the sum."""
        assert rows.shape[0] == sum(counts)
        if self.size == 1:
            return rows
        longest = max(counts)
        padded = rows.new_zeros((self.size * longest, *rows.shape[1:]))
        start = 0
        for r, count in enumerate(counts):
            padded[r * longest : r * longest + count] = rows[start : start + count]
            start += count
        own = rows.new_empty((longest, *rows.shape[1:]))
        _reduce_scatter(own, padded)
        return own[: counts[self.rank]]

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum of a short list of numbers over all ranks, in float64."""
        return self._reduce(values, "SUM")

    def max(self, values: list[float]) -> list[float]:
        """Element-wise maximum of a short list of numbers over all ranks, in float64."""
        return self._reduce(values, "MAX")

    def _reduce(self, values: list[float], operation: str) -> list[float]:
        import torch
        import torch.distributed as dist

        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation))
        return tensor.tolist()

    def broadcast(self, tensor):
        """Rank 0's tensor on every rank, in place; the others pass one of its shape and dtype."""
        import torch.distributed as dist

        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def barrier(self) -> None:
        import torch.distributed as dist

        if self.size > 1:
            dist.barrier()

    def on_main(self, name: str, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and return its (picklable) result on every rank.

        However long it takes: the others poll the store that rank 0 hosts, so there is no
        collective to time out, and they stop as soon as rank 0 fails or disappears.
        `name` must be unique in the job. Raises FailedElsewhere on the other ranks when `work` raises.
        """
        if self.size == 1:
            return work()
        key = f"ds_embed/{name}"
        if self.is_main:
            try:
                result = work()
            except BaseException:
                self.store.set(key, b"failed")
                raise
            self.store.set(key, b"done" + pickle.dumps(result))
            return result
        try:
            while not self.store.check([key]):
                time.sleep(0.05)
            answer = self.store.get(key)
        except RuntimeError as error:
            raise RuntimeError(f"rank 0 ended while it ran '{name}' for all ranks") from error
        if answer == b"failed":
            raise FailedElsewhere(name)
        return pickle.loads(answer[len(b"done") :])


def initialize() -> World:
    """Join the job that the launcher's environment describes, or be the only rank of a new one.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as set by
    `deepspeed`, `torchrun` or slurm/train.sh. Errors: ValueError when they are set in part.
    """
    global _world
    if _world is not None:
        return _world
    rank, size, local_rank, local_size = _read_environment()
    # DeepSpeed reports every default it takes at INFO level; what a user has to know, we print.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks that each start a thread per core fight over the cores and run many times slower.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        _keep_freed_memory()
    store, _, _ = next(dist.rendezvous("env://", rank=rank, world_size=size))
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size)
    _join_deepspeed(device)
    _world = World(rank, size, local_rank, local_size, device, dist.PrefixStore("control", store))
    return _world


def _read_environment() -> tuple[int, int, int, int]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in os.environ]
    if not present:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    elif len(present) < len(names):
        missing = [name for name in names if name not in os.environ]
        raise ValueError(
            f"the environment sets {', '.join(present)} but not {', '.join(missing)}: "
            "start with `deepspeed`, `torchrun` or slurm/train.sh, or unset them to run one process"
        )
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    os.environ["LOCAL_RANK"] = str(local_rank)
    # The deepspeed launcher calls it LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", size)))
    return rank, size, local_rank, local_size


def _all_gather(output, own) -> None:
    import torch.distributed as dist

    # torch 2.13 renamed the call and warns at the old name.
    getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(output, own)


def _reduce_scatter(own, all_rows) -> None:
    import torch.distributed as dist

    getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(own, all_rows)


def _keep_freed_memory() -> None:
    """Let malloc keep what a step frees, since the next step asks for it again.

    By default glibc hands large blocks back to the kernel at once, and every step pays for fresh
    zeroed pages: a tenth of a CPU training step. The peak is the same.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _join_deepspeed(device) -> None:
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


def run_recipe(main: Callable[[], Any]) -> int:
    """Run a recipe and turn its end into an exit code, with one message however many ranks fail.

    A ValueError or OSError is the user's to cure: one line, code 2. Anything else is ours: the
    traceback, code 1. After an error the process leaves at once and enters no collective.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        main()
        code = 0
    except SystemExit as stop:  # --help, or a recipe that chose its own code
        code = stop.code if isinstance(stop.code, int) else 1
        if code == 0:
            return 0
    except FailedElsewhere:
        code = EXIT_USER_ERROR
    except (ValueError, OSError) as error:
        if _first_to_report():
            print(f"error: {error}", file=sys.stderr)
            if os.environ.get("DS_EMBED_TRACEBACK"):
                traceback.print_exc()
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        print(f"[rank {os.environ.get('RANK', 0)}]", traceback.format_exc(), file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if _world is None:
        return code
    if code:
        _leave_after_others(_world)
        # Exit handlers of libraries may wait for ranks that are gone.
        os._exit(code)
    import torch.distributed as dist

    _world.barrier()
    dist.destroy_process_group()
    return code


def _first_to_report() -> bool:
    """Whether no other rank has reported an error yet."""
    if _world is None or _world.size == 1:
        return True
    try:
        return _world.store.add("error_reports", 1) == 1
    except RuntimeError:  # rank 0 and its store are gone: it has reported
        return False


def _leave_after_others(world: World) -> None:
    """Rank 0 hosts the store, so it gives the others a moment to learn from it that the job is over."""
    if world.size == 1:
        return
    try:
        gone = world.store.add("ranks_gone", 1)
        deadline = time.monotonic() + 3
        while world.is_main and gone < world.size and time.monotonic() < deadline:
            time.sleep(0.05)
            gone = world.store.add("ranks_gone", 0)
    except RuntimeError:
        pass  # rank 0 left first: there is nobody to wait for
