"""Gradients of one contrastive step, for many settings, on however many ranks the launcher starts.

deepspeed --num_gpus W tests/workers/gradients.py CASES.json OUT_DIR
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from ds_embed.data.batch import assemble_batch
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore
from ds_embed.job.ranks import initialize, run_recipe
from ds_embed.models.engine import partitioned_loading, start_engine
from ds_embed.models.loading import find_model, load_encoder
from ds_embed.models.lora import add_lora
from ds_embed.settings import LoraArguments, OptimizerArguments, StepArguments, resolve_deepspeed_config
from ds_embed.training.step import ContrastiveStep
from ds_embed.training.stored_vectors import StoredVectors


def run_case(world, case: dict) -> dict[str, np.ndarray]:
    config = resolve_deepspeed_config(f"ds_configs/zero{case['zero']}.json", bf16=case["bf16"], max_grad_norm=0.0)
    if case["partitioned"]:  # small weights too, which would stay whole on every rank
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    store = TrainingStore.open(case["store"])
    with partitioned_loading(config):
        encoder = load_encoder(
            find_model(case["model"]),
            pooling=case["pooling"],
            bidirectional=case["bidirectional"],
            bf16=case["bf16"],
            attn_implementation=case["kernel"],
            trust_remote_code=False,
            head=case["head"],
        )
        if case["lora"]:
            lora = LoraArguments(
                lora_rank=case["lora"],
                lora_alpha=case["alpha"],
                lora_dropout=case["dropout"],
                lora_variant=case["variant"],
            )
            add_lora(encoder, lora, seed=1, dtype=torch.bfloat16 if case["bf16"] else torch.float32)
    if case["checkpointing"]:
        encoder.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case["lora"] and case["variant"] != "pissa":
        # lora_B starts at zero, which would hide the gradient of lora_A.
        generator = torch.Generator().manual_seed(5)
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
    rotary = {name: buffer.clone() for name, buffer in encoder.named_buffers() if "inv_freq" in name}
    arguments = StepArguments(
        global_batch_size=case["queries"],
        micro_batch_tokens=case["budget"],
        grad_cache=case["grad_cache"],
        negatives=case["negatives"],
        temperature=0.1,
        **case["loss"],
        **{f"{name}_embeddings": folder for name, folder in case["models"].items()},
    )
    vectors = {
        name: StoredVectors(world, store, f"--{name}_embeddings", folder, Path(folder).parent / "cache")
        for name, folder in case["models"].items()
    }
    if "teacher" in vectors and arguments.teacher_loss != "scores" and vectors["teacher"].num_dims != 32:
        encoder.learn_projection(32, vectors["teacher"].num_dims, seed=3)
    if arguments.learnable_temperature:
        encoder.learn_temperature()
    engine = start_engine(encoder, config, OptimizerArguments(), world)
    order = SampleOrder(3, store.file_sizes)
    batch = assemble_batch(
        store, order, first_sample=4, num_queries=case["queries"], hard_negatives=case["hard_negatives"]
    )
    engine.train()
    step = ContrastiveStep(engine, store, world, arguments, 3, vectors)
    if case.get("scale"):  # a deliberate error, to see the contract test notice
        surrogate = step._surrogate
        step._surrogate = lambda *parts: surrogate(*parts) * case["scale"]
    result = step.run(step.prepare(batch))
    if case["partitioned"]:
        assert not any(parameter.ds_persist for parameter in encoder.parameters())
    from deepspeed.utils import safe_get_full_grad

    gradients = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad if case["zero"] == 0 else safe_get_full_grad(parameter)
            gradients[name] = gradient.detach().float().numpy().copy()
    engine.destroy()
    assert all(torch.equal(buffer, encoder.get_buffer(name)) for name, buffer in rotary.items()), "cast buffers"
    return gradients | {"loss": np.array(result.loss)}


def main() -> None:
    world = initialize()
    for name, case in json.loads(Path(sys.argv[1]).read_text()).items():
        results = run_case(world, case)
        if world.is_main:
            np.savez(Path(sys.argv[2]) / f"{name}.npz", **results)


if __name__ == "__main__":
    sys.argv = [a for a in sys.argv if not a.startswith("--local_rank")]
    raise SystemExit(run_recipe(main))
