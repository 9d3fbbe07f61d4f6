"""The ranks of a job: startup, shutdown and all collectives. No other module communicates between ranks.

Shapes: W ranks, n_r rows held by rank r, R = sum of n_r, D dimensions.
"""

import itertools
import logging
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ds_embed.job.process import choose_device, join_deepspeed, keep_freed_memory, read_environment
from ds_embed.job.watchdog import Watch
from ds_embed.settings.errors import UserError

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 85  # stopped by a signal, with its work saved: the same command continues it
_NEWS_SECONDS = 5.0  # a failure reaches all ranks within about a second, later if hosts are busy
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # schedulers send them some time before killing a job
_world: "World | None" = None


class FailedElsewhere(Exception):
    """Another rank failed and has reported the error; this rank only has to stop."""


@dataclass(frozen=True)
class World:
    """This process among the W processes of the job, and the collectives between them."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: Any  # torch.device
    store: Any  # torch.distributed.Store, hosted by rank 0
    watch: Watch | None = None  # only with several ranks
    _main_calls: Iterator[int] = field(default_factory=itertools.count)  # the same count on every rank

    @classmethod
    def alone(cls) -> "World":
        """The only rank of a job, on the CPU and without a process group: for single-process work and tests."""
        import torch

        return cls(0, 1, 0, 1, torch.device("cpu"), None)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mark(self, phase: str | None = None, step: int | None = None) -> None:
        """Record this rank's progress for the watchdog. All ranks must make the same marks in the same order."""
        if self.watch is not None:
            self.watch.mark(phase, step)

    def set_timeouts(self, rank_timeout_seconds: float, stall_timeout_seconds: float) -> None:
        """Set how long the watchdog waits for a stopped or silent rank, and for one that holds up the others."""
        if self.watch is not None:
            self.watch.set_timeouts(rank_timeout_seconds, stall_timeout_seconds)

    def all_gather_rows(self, rows, counts: list[int]):
        """Concatenate (n_r, D) rows of all ranks, in rank order, into (R, D) on every rank.

        `counts` holds n_r of every rank. All ranks know it from the plan, so it is not communicated.
        """
        import torch
        import torch.distributed as dist

        assert len(counts) == self.size and rows.shape[0] == counts[self.rank]
        if self.size == 1:
            return rows
        longest = max(counts)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        gathered = rows.new_empty((self.size * longest, *rows.shape[1:]))
        self.mark()
        # torch 2.13 renamed this call and warns about the old name.
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(gathered, padded)
        return torch.cat([gathered[r * longest : r * longest + count] for r, count in enumerate(counts)])

    def rows_in_turn(self, sizes: list[int], rows_of: Callable[[int | None], Any]) -> list[Any]:
        """Return the rows (sizes[i], ...) of every item i, in order, on every rank; rank r computes items r, r + W, ...

        Every rank calls rows_of equally often, as ZeRO-3 requires; rows_of(None) returns no rows, shape (0, ...).
        """
        import torch

        by_rank = [range(rank, len(sizes), self.size) for rank in range(self.size)]
        own = [*by_rank[self.rank], *[None] * (max(1, len(by_rank[0])) - len(by_rank[self.rank]))]
        counts = [sum(sizes[item] for item in items) for items in by_rank]
        gathered = self.all_gather_rows(torch.cat([rows_of(item) for item in own]), counts).cpu()
        order = [item for items in by_rank for item in items]
        parts = dict(zip(order, gathered.split([sizes[item] for item in order])))
        return [parts[item].numpy() for item in range(len(sizes))]

    def reduce_scatter_rows(self, rows, counts: list[int]):
        """Sum the (R, D) rows of all ranks and return this rank's (n_r, D) of the sum."""
        import torch.distributed as dist

        assert rows.shape[0] == sum(counts)
        if self.size == 1:
            return rows
        longest = max(counts)
        padded = rows.new_zeros((self.size * longest, *rows.shape[1:]))
        for r, part in enumerate(rows.split(counts)):
            padded[r * longest : r * longest + len(part)] = part
        own = rows.new_empty((longest, *rows.shape[1:]))
        self.mark()
        getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(own, padded)
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
        self.mark()
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation))
        return tensor.tolist()

    def broadcast(self, tensor):
        """Copy rank 0's tensor into `tensor` on every rank; all must have the same shape and dtype."""
        import torch.distributed as dist

        if self.size > 1:
            self.mark()
            dist.broadcast(tensor, src=0)
        return tensor

    def barrier(self) -> None:
        import torch.distributed as dist

        if self.size > 1:
            self.mark()
            dist.barrier()

    def on_main(self, what: str, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0 and return its (picklable) result on every rank.

        It may take any length of time: the others poll the store that rank 0 hosts, so no collective can time out, and
        they stop as soon as rank 0 fails or disappears. Every rank must make the same calls in the same order; `what`
        describes the work in messages. Raises FailedElsewhere on the other ranks if `work` raises.
        """
        if self.size == 1:
            return work()
        key = f"ds_embed/on_main/{next(self._main_calls)}"
        self.mark(what)
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
            raise RuntimeError(f"rank 0 ended while it ran '{what}' for all ranks") from error
        if answer == b"failed":
            raise FailedElsewhere(what)
        return pickle.loads(answer[len(b"done") :])


def initialize() -> World:
    """Join the job that the launcher's environment describes, or be the only rank of a new one.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT as set by `deepspeed`, `torchrun`
    or slurm/train.sh. UserError if only some of them are set.
    """
    global _world
    if _world is not None:
        return _world
    rank, size, local_rank, local_size = read_environment()
    # At INFO level DeepSpeed reports every default it uses; we print what a user needs to know.
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # Micro-batches differ in shape, which without this setting fragments the allocator's memory.
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        index = choose_device(local_rank, torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed chooses its device by this
        torch.cuda.set_device(index)
        device, backend = torch.device("cuda", index), "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        if "OMP_NUM_THREADS" not in os.environ:
            # Ranks that each start a thread per core compete for the cores and run many times slower.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
        keep_freed_memory()
    store = _meet(rank, size)
    watch = Watch(rank, size, local_rank, dist.PrefixStore("watch", store)) if size > 1 else None
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size)
    join_deepspeed(device)
    _world = World(rank, size, local_rank, local_size, device, dist.PrefixStore("control", store), watch)
    return _world


def _meet(rank: int, size: int) -> Any:
    """Return the store that rank 0 hosts at MASTER_ADDR:MASTER_PORT, once this rank has joined it.

    If another job holds the port, rank 0 can't listen, and the others would join that job and take it down with them.
    """
    import torch.distributed as dist

    in_use = UserError(
        f"MASTER_PORT {os.environ.get('MASTER_PORT')} is in use on this machine, maybe by another job; "
        "choose another one: deepspeed --master_port PORT ..."
    )
    try:
        store, _, _ = next(dist.rendezvous("env://", rank=rank, world_size=size))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise in_use from error
    if store.add(f"ds_embed/joined/{rank}", 1) > 1:
        raise in_use
    return store


def run_recipe(main: Callable[[], Any]) -> int:
    """Run a recipe and return its exit code, with a single message however many ranks fail.

    A UserError is for the user to fix: one line, code 2. Any other exception is a bug of ours or of a library: its
    traceback, code 1. After an error the process exits at once and enters no collective. SIGTERM and SIGUSR1 end it
    with EXIT_REQUEUE unless the recipe handles them itself.
    """
    global _world
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of missing kernels
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_at_once)
    try:
        main()
        code = 0
    except BaseException as error:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # already exiting
        code = _report(error)
        if isinstance(error, SystemExit) and code == 0:
            return 0
    sys.stdout.flush()
    sys.stderr.flush()
    if _world is None:
        return code
    if code:
        if _world.watch is not None:
            _world.watch.leave(code)
        _leave_after_others(_world)
        # Libraries' exit handlers may wait for ranks that are gone.
        os._exit(code)
    import torch.distributed as dist

    _world.barrier()
    if _world.watch is not None:
        _world.watch.leave(0)
    dist.destroy_process_group()
    _world = None  # the next recipe called in this process is a separate job
    return code


def _report(error: BaseException) -> int:
    """Report what ended the recipe, unless another rank has done so, and return the exit code."""
    if isinstance(error, SystemExit):  # --help, or a recipe that chose its own code
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, FailedElsewhere):
        return EXIT_USER_ERROR
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, UserError):
        if _first_to_report():
            print(f"error: {error}", file=sys.stderr)
            if os.environ.get("DS_EMBED_TRACEBACK"):
                traceback.print_exception(error)
        return EXIT_USER_ERROR
    code = None
    if isinstance(error, RuntimeError) and _world is not None and _world.watch is not None:
        code = _world.watch.wait_for_news(10.0)  # about a rank whose exit made a collective fail here
    if code is None:
        trace = "".join(traceback.format_exception(error))
        print(f"[rank {os.environ.get('RANK', 0)}]", trace, file=sys.stderr)
    return 1 if code is None else code


def _stop_at_once(number: int, frame: Any) -> None:
    """Stop at a scheduler's request when there is nothing to save: the same command continues the work.

    It raises no exception, since libraries that are being imported would swallow it; all our writes may be interrupted
    at any time. The signal may also be the launcher's response to a failed rank. The job's exit code is the highest of
    its ranks, so EXIT_REQUEUE would requeue a job that fails again. A rank that learns of a failure therefore exits
    with its code, and one that has not joined the others yet lets the signal kill it.
    """
    if _world is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    watch = None if _world is None else _world.watch
    code = None if watch is None else watch.wait_for_news(_NEWS_SECONDS)
    if code is None:
        code = EXIT_REQUEUE
        if _first_to_report():
            print(f"{signal.Signals(number).name}: stopped (exit code {code})", file=sys.stderr, flush=True)
    if watch is not None:
        watch.leave(code)
    os._exit(code)


def _first_to_report() -> bool:
    """Whether no other rank has reported an error yet."""
    if _world is None or _world.size == 1:
        return True
    try:
        return _world.store.add("error_reports", 1) == 1
    except RuntimeError:  # rank 0 and its store are gone, so it has reported
        return False


def _leave_after_others(world: World) -> None:
    """Let rank 0, which hosts the store, wait a moment for the others to learn from it that the job is over."""
    if world.size == 1:
        return
    try:
        gone = world.store.add("ranks_gone", 1)
        deadline = time.monotonic() + 3
        while world.is_main and gone < world.size and time.monotonic() < deadline:
            time.sleep(0.05)
            gone = world.store.add("ranks_gone", 0)
    except RuntimeError:
        pass  # rank 0 exited first, so there is nothing to wait for
