"""A step waits for its device once: on torch's meta device, whatever a host would have to wait for raises.

Nothing there has a value, so `.item()`, `bool(tensor)`, `nonzero` and boolean indexing raise, and so does mixing
devices: what runs there runs on a GPU without a wait, and with all tensors on it.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from tiny import MODELS, make_model, make_training_file

from ds_embed.data.batch import assemble_batch
from ds_embed.data.order import SampleOrder
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.job.ranks import World
from ds_embed.models.cpu import training_kernel
from ds_embed.models.loading import build_encoder, find_model, load_tokenizer
from ds_embed.settings import StepArguments
from ds_embed.training.step import ContrastiveStep

META = torch.device("meta")
OPTIONS = dict(negatives="own", symmetric=True, label_smoothing=0.1, false_negative_margin=0.1)
DIRECTIONS = ["query_document", "document_query", "query_query", "document_document"]
NEAR = dict(directions=DIRECTIONS, hardness_weight=5.0, distillation_weight=1.0, distillation_loss="margin_mse")


class MetaEngine:
    """An encoder on the meta device, called as DeepSpeed's engine is."""

    def __init__(self, encoder):
        self.encoder = self.module = encoder.train()
        self.num_backwards = 0

    def zero_optimization_stage(self):
        return 0

    def __call__(self, *inputs):
        return self.encoder(*inputs)

    def backward(self, total, scale_wrt_gas):
        total.backward()
        self.num_backwards += 1


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("waits")
    tokenizer = load_tokenizer(find_model(str(make_model(root / "bert", "bert"))), False)
    path = make_training_file(root / "train.jsonl", 30, num_documents=12)
    texts = TextFormat("", 24, False)
    return TrainingStore.open(build_training_store([path], tokenizer, texts, texts, 2, root / "cache"))


def make_step(kind, store, pooling, bidirectional=False, kernel=None, **settings):
    config_class, sizes = MODELS[kind]
    config = getattr(transformers, config_class)(**sizes)
    encoder = build_encoder(
        config,
        pooling=pooling,
        bidirectional=bidirectional,
        bf16=True,
        attn_implementation=training_kernel(config, kernel, "cuda"),
        trust_remote_code=False,
    )
    if settings.get("learnable_temperature"):
        encoder.learn_temperature()
    encoder.to(META)
    arguments = StepArguments(global_batch_size=8, micro_batch_tokens=128, **settings)
    return ContrastiveStep(MetaEngine(encoder), store, replace(World.alone(), device=META), arguments, 1)


@pytest.mark.parametrize("kernel", [None, "varlen"])  # the latter's operator, which torch has shapes of too
@pytest.mark.parametrize("settings", [dict(grad_cache=True, learnable_temperature=True, **OPTIONS), NEAR])
@pytest.mark.parametrize(
    "kind, pooling, bidirectional",
    [
        ("bert", "mean", False),
        ("bert", "cls", False),
        ("roberta", "mean", False),
        ("modernbert", "mean", False),
        ("llama", "last", False),
        ("llama", "weighted_mean", True),
        ("mistral", "last", False),
        ("qwen2", "max+cls", False),
        ("qwen3", "mean", True),
    ],
)
def test_a_step_waits_for_the_device_once(monkeypatch, store, kind, pooling, bidirectional, settings, kernel):
    step = make_step(kind, store, pooling, bidirectional, kernel, **settings)
    waits = []

    def tell_all(self, values):
        assert values.device == META
        waits.append(values)
        return [[1.0] * len(values)]

    monkeypatch.setattr(ContrastiveStep, "_tell_all", tell_all)
    batch = assemble_batch(store, SampleOrder(1, store.file_sizes), first_sample=0, num_queries=8, hard_negatives=2)
    inputs = step.prepare(batch)
    assert len(inputs.micro_batches) > 1
    assert any(micro_batch.has_padding for micro_batch in inputs.micro_batches) == (kernel is None)
    result = step.run(inputs, tell=(0.0, 1.0))
    assert result.told == (1.0, 1.0) and len(waits) == 1
    assert step.engine.num_backwards == (len(inputs.micro_batches) if "grad_cache" in settings else 1)
    trained = [parameter for parameter in step.engine.encoder.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained if parameter.numel())
    step.evaluate(inputs, 0)
    assert len(waits) == 2


def test_a_value_that_is_fetched_is_noticed(store):
    step = make_step("bert", store, "mean")
    batch = assemble_batch(store, SampleOrder(1, store.file_sizes), first_sample=0, num_queries=8, hard_negatives=2)
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta"):
        step.run(step.prepare(batch))


@pytest.mark.parametrize(
    "set_by_user, kept",
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "backend:native"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "None"),
    ],
)
def test_the_allocators_segments_grow_unless_the_user_says_otherwise(set_by_user, kept):
    """Set before torch is loaded, which reads it once."""
    code = (
        "import os, sys; from ds_embed.job import ranks; assert 'torch' not in sys.modules; "
        "ranks._meet = lambda *_: sys.exit(os.environ.get('PYTORCH_CUDA_ALLOC_CONF', 'None')); ranks.initialize()"
    )
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in names} | set_by_user
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.strip().endswith(kept)
