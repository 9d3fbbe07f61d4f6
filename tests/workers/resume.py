"""Train tiny models, save them and go on from checkpoints, on however many ranks the launcher starts.

    deepspeed --num_gpus W tests/workers/resume.py CASES.json OUT_DIR

A case trains `steps` steps from `load` (a checkpoint) or from the base model, saves after `save_after`, and
writes its losses, the trained state after the last step and, with "check", whether loading gave back every byte.
"""

import json
import math
import sys
from pathlib import Path

import torch
from deepspeed.utils import groups
from safetensors.torch import save_file

from ds_embed.data.batch import assemble_batch
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore
from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.models.checkpoint import read_state
from ds_embed.models.engine import gather_weights, partitioned_loading, start_engine, take_step
from ds_embed.models.loading import find_model, load_encoder
from ds_embed.models.lora import add_lora
from ds_embed.settings import LoraArguments, OptimizerArguments, StepArguments, resolve_deepspeed_config
from ds_embed.training.checkpoint import load_checkpoint, save_checkpoint
from ds_embed.training.engine_state import adam_step, gather_state
from ds_embed.training.step import ContrastiveStep

QUERIES = 8


def make_engine(world, case: dict):
    config = resolve_deepspeed_config(f"ds_configs/zero{case['zero']}.json", bf16=case["bf16"], max_grad_norm=1.0)
    # So small that ZeRO-3 shards some weights and keeps others whole.
    if case["zero"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 600
        config["zero_optimization"]["zero_hpz_partition_size"] = case.get("hpz", 1)
    with partitioned_loading(config):
        encoder = load_encoder(
            find_model(case["model"]),
            pooling="last",
            bidirectional=False,
            bf16=case["bf16"],
            attn_implementation="sdpa",
            trust_remote_code=False,
        )
    if case["lora"]:
        dtype = torch.bfloat16 if case["bf16"] else torch.float32
        # Rank 3: shards of uneven size under ZeRO-3.
        add_lora(encoder, LoraArguments(lora_rank=3, lora_dropout=case["dropout"]), seed=1, dtype=dtype)
    return start_engine(encoder, config, OptimizerArguments(weight_decay=0.1), world)


def whole_state(engine, world) -> dict[str, torch.Tensor]:
    """Masters, moments and working weights by name, on rank 0."""
    state = {f"{name}:{kind}": t for name, kinds in gather_state(engine, world) for kind, t in kinds.items()}
    working = gather_weights(engine.module, None, world)
    return state | {f"{name}:working": tensor.contiguous() for name, tensor in working.items()}


def run_case(world, name: str, case: dict, out: Path) -> dict:
    engine = make_engine(world, case)
    store = TrainingStore.open(case["store"])
    arguments = StepArguments(global_batch_size=QUERIES, micro_batch_tokens=150, temperature=0.1)
    first, consumed, checkpoint = 0, 0, Path(case["load"]) if case.get("load") else None
    engine.train()
    step = ContrastiveStep(engine, store, world, arguments, seed=3)
    order = SampleOrder(3, store.file_sizes)
    if checkpoint is not None:
        if case.get("check"):  # into an engine that has trained already, as --load_best_at_end does
            batch = assemble_batch(store, order, first_sample=0, num_queries=QUERIES, hard_negatives=1)
            step.run(step.prepare(batch))
            take_step(engine, 1e-2)
        state = world.on_main(f"state of {name}", lambda: read_state(checkpoint))
        load_checkpoint(engine, world, checkpoint, state)
        first, consumed = state["step"], state["consumed_samples"]
    answer = {"losses": {}, "records": {}}
    if case.get("check"):
        now = whole_state(engine, world)
        if world.is_main:
            from safetensors.torch import load_file

            saved = load_file(out / f"{case['check']}-{first}.safetensors")
            assert saved.keys() == now.keys()
            answer["not_restored"] = [n for n in saved if not torch.equal(saved[n], now[n])]
    for number in range(first + 1, case["steps"] + 1):
        batch = assemble_batch(store, order, first_sample=consumed, num_queries=QUERIES, hard_negatives=1)
        consumed += QUERIES
        result = step.run(step.prepare(batch))
        answer["losses"][number] = result.loss
        answer["records"][number] = batch.records.tolist()
        norm = take_step(engine, 1e-2 / number)
        if number in case.get("save_after", []):
            save_checkpoint(engine, world, out / name, number, {"consumed_samples": consumed}, lambda: None)
        if number in (*case.get("save_after", []), case["steps"]):
            now = whole_state(engine, world)
            if world.is_main:
                save_file(now, out / f"{name}-{number}.safetensors")
    answer["adam_step"] = adam_step(engine)
    if case.get("poison"):
        answer["poison"] = poison(engine, world, step, batch, arguments)
    assert math.isfinite(norm)
    engine.destroy()
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed makes hpZ's groups once a process and refuses again
    return answer


def poison(engine, world, step, batch, arguments) -> dict:
    """A gradient with one nan, on one rank: no weight may change, and take_step must say so on all ranks."""
    before = whole_state(engine, world)
    surrogate = step._surrogate
    bad = math.nan if world.rank == world.size - 1 else 1.0
    step._surrogate = lambda outputs, gradient, on_scale: surrogate(outputs, gradient, on_scale) * bad
    step.run(step.prepare(batch))
    norm = take_step(engine, 1e-2)
    after = whole_state(engine, world)
    step._surrogate = surrogate
    step.run(step.prepare(batch))
    again = take_step(engine, 1e-3)
    return {
        "noticed_by": world.sum([float(not math.isfinite(norm))])[0],
        "changed": [name for name in before if not torch.equal(before[name], after[name])],
        "goes_on": math.isfinite(again),
    }


def main() -> None:
    world = initialize()
    out = Path(sys.argv[2])
    answers = {}
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        answers[name] = run_case(world, name, case, out)
    if world.is_main:
        (out / f"answers{world.size}.json").write_text(json.dumps(answers, indent=1))


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    raise SystemExit(run_recipe(main))
