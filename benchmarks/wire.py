"""Count what a training run sends: runs a recipe and counts every collective of torch.distributed, step by step.

    deepspeed --num_gpus 2 benchmarks/wire.py COUNTS.jsonl recipes/train_bert.py ...the recipe's flags...

Rank 0 writes a line per step: for each kind and dtype of collective, the calls and the bytes of the whole message (the
output of a gather, the input of a reduction), the rows of embeddings of every rank, and its micro-batches.
"""

import functools
import json
import runpy
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

# By function: the kind of collective, and the position and name of the argument with the whole message.
WHOLE_MESSAGE = {
    "all_reduce": ("all_reduce", 0, "tensor"),
    "reduce": ("reduce", 0, "tensor"),
    "broadcast": ("broadcast", 0, "tensor"),
    "all_gather": ("all_gather", 0, "tensor_list"),
    "all_gather_into_tensor": ("all_gather", 0, "output_tensor"),
    "all_gather_single": ("all_gather", 0, "output"),
    "reduce_scatter": ("reduce_scatter", 1, "input_list"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input"),
    "reduce_scatter_single": ("reduce_scatter", 1, "input"),
    "all_to_all_single": ("all_to_all", 0, "output"),
    "send": ("send", 0, "tensor"),
    "isend": ("send", 0, "tensor"),
    "all_reduce_coalesced": ("all_reduce", 0, "tensors"),
}
CONTROL_BYTES = 256  # smaller messages and those in float64 contain control values, not vectors


class Counts:
    """Calls and bytes of collectives since the last line."""

    def __init__(self):
        self.calls: Counter = Counter()
        self.bytes: Counter = Counter()
        self._depth = 0

    def counted(self, name: str, function: Any) -> Any:
        kind, place, keyword = WHOLE_MESSAGE[name]

        @functools.wraps(function)
        def call(*args, **kwargs):
            # Some of these functions call each other, so only the outermost call counts.
            if self._depth == 0:
                message = args[place] if len(args) > place else kwargs[keyword]
                self._add(kind, message if isinstance(message, (list, tuple)) else [message])
            self._depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1

        return call

    def _add(self, kind: str, tensors: list[torch.Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
        key = "control" if size < CONTROL_BYTES or dtype == "float64" else f"{kind} {dtype}"
        self.calls[key] += 1
        self.bytes[key] += size

    def take(self) -> dict[str, dict[str, int]]:
        taken = {key: {"calls": self.calls[key], "bytes": self.bytes[key]} for key in sorted(self.calls)}
        self.calls.clear()
        self.bytes.clear()
        return taken


def main(counts_path: str, recipe: str, flags: list[str]) -> None:
    counts = Counts()
    for name in WHOLE_MESSAGE:
        if hasattr(dist, name):
            setattr(dist, name, counts.counted(name, getattr(dist, name)))

    from ds_embed.training import loop

    rows: list[int] = []
    micro_batches: list[int] = []

    class CountedStep(loop.ContrastiveStep):
        def run(self, inputs, *args):
            rows[:], micro_batches[:] = inputs.plan.rank_counts(), [inputs.plan.num_micro_batches]
            return super().run(inputs, *args)

    class CountedLog(loop.StepLog):
        def add(self, number, *args, **kwargs):
            line = {"step": number, "rows": list(rows), "micro_batches": micro_batches[0], "collectives": counts.take()}
            if self.world.is_main:
                with open(counts_path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            super().add(number, *args, **kwargs)

    loop.ContrastiveStep, loop.StepLog = CountedStep, CountedLog
    sys.argv = [recipe, *flags]
    runpy.run_path(recipe, run_name="__main__")


if __name__ == "__main__":
    # The launcher inserts --local_rank=N at the front.
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(words[0], words[1], words[2:])
