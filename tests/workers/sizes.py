"""What a training step really takes on however many ranks: bytes of live tensors, peak memory, bytes between ranks.

deepspeed --num_gpus W tests/workers/sizes.py CASES.json OUT.json
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from ds_embed.data.batch import assemble_batch
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore
from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.models.cpu import MATH_KERNEL
from ds_embed.models.engine import partitioned_loading, start_engine, take_step
from ds_embed.models.loading import find_model, load_encoder
from ds_embed.models.lora import add_lora
from ds_embed.settings import LoraArguments, OptimizerArguments, StepArguments, resolve_deepspeed_config
from ds_embed.tools.plan.measure import Tally
from ds_embed.training.step import ContrastiveStep


def live_tensors() -> list[torch.Tensor]:
    """One tensor of each storage alive."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor
    return list(found.values())


def live_bytes() -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in live_tensors())


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def reset_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


class Wire:
    """Counts what collectives carry: bytes of the whole tensor, by kind of collective."""

    POSITIONS = {  # of the whole tensor among the arguments
        "all_reduce": 0,
        "reduce": 0,
        "broadcast": 0,
        "all_gather_into_tensor": 0,
        "all_gather_single": 0,
        "reduce_scatter_tensor": 1,
        "reduce_scatter_single": 1,
        "all_gather": 0,
        "reduce_scatter": 1,
    }

    def __init__(self):
        self.bytes = Counter()
        self.depth = 0
        for name, position in self.POSITIONS.items():
            if hasattr(dist, name):
                setattr(dist, name, self._counted(name, getattr(dist, name), position))

    def _counted(self, name, function, position):
        def call(*args, **kwargs):
            if not self.depth:
                tensor = args[position] if len(args) > position else next(iter(kwargs.values()))
                parts = tensor if isinstance(tensor, (list, tuple)) else [tensor]
                group = kwargs.get("group")
                is_part = group is not None and dist.get_world_size(group) < dist.get_world_size()
                self.bytes[f"{name} in groups" if is_part else name] += sum(
                    part.numel() * part.element_size() for part in parts
                )
            self.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1

        return call


def run_case(world, wire: Wire, case: dict) -> dict:
    config = resolve_deepspeed_config(case["deepspeed"], bf16=case["bf16"], max_grad_norm=1.0, num_ranks=world.size)
    store = TrainingStore.open(case["store"])
    reset_peak()
    before = {"rss": status("VmRSS"), "live": live_bytes()}
    with partitioned_loading(config), Tally([]) as load:
        encoder = load_encoder(
            find_model(case["model"]),
            pooling="last",
            bidirectional=False,
            bf16=case["bf16"],
            attn_implementation=MATH_KERNEL,
            trust_remote_code=False,
        )
    loading = status("VmHWM") - before["rss"]
    if case["checkpointing"]:
        encoder.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case["lora"]:
        dtype = torch.bfloat16 if case["bf16"] else torch.float32
        add_lora(encoder, LoraArguments(lora_rank=case["lora"]), seed=1, dtype=dtype)
    loaded = live_bytes() - before["live"]
    counts = {
        kind: sum(getattr(p, "ds_numel", p.numel()) for p in encoder.parameters() if p.requires_grad or kind == "all")
        for kind in ("all", "trained")
    }
    engine = start_engine(encoder, config, OptimizerArguments(), world)
    started = live_bytes() - before["live"]
    arguments = StepArguments(
        global_batch_size=case["queries"], micro_batch_tokens=case["budget"], grad_cache=case["grad_cache"]
    )
    step = ContrastiveStep(engine, store, world, arguments, seed=3)
    order = SampleOrder(3, store.file_sizes)
    engine.train()
    reset_peak()
    for number in range(case["steps"]):
        wire.bytes.clear()
        batch = assemble_batch(
            store,
            order,
            first_sample=number * case["queries"],
            num_queries=case["queries"],
            hard_negatives=case["hard_negatives"],
        )
        known = live_tensors() if number == case["steps"] - 1 else []
        start = sum(tensor.untyped_storage().nbytes() for tensor in known) - before["live"]
        with Tally(known) as tally:
            assert step.run(step.prepare(batch)).is_finite
            take_step(engine, 1e-4)
    stepped = live_bytes() - before["live"]
    peak = status("VmHWM") - before["rss"]
    engine.destroy()
    return counts | {
        "loading_peak": load.peak_bytes,
        "loading_rss": loading,
        "loaded": loaded,
        "started": started,
        "stepped": stepped,
        "peak": start + tally.peak_bytes,
        "peak_rss": peak,
        "wire": dict(wire.bytes),
    }


def main() -> None:
    wire = Wire()  # first, since DeepSpeed keeps the functions that it finds
    world = initialize()
    results = {}
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        results[name] = run_case(world, wire, case)
        gc.collect()
        gc.freeze()  # what the libraries made; looking through it for tensors would take most of the time
    Path(f"{sys.argv[2]}.{world.rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    raise SystemExit(run_recipe(main))
