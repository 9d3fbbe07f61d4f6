"""A base model in 4 bits: frozen under LoRA, its gradients those of the weights that the 4 bits stand for."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import check, launch, load_recipe, make_model, make_training_file

from ds_embed import Embedder
from ds_embed.job.ranks import World
from ds_embed.models.loading import find_model, load_encoder
from ds_embed.models.lora import add_lora
from ds_embed.settings import SIZING_DEFAULTS, TRAINING_ARGUMENTS, LoraArguments, SizingArguments, parse_arguments
from ds_embed.settings.errors import UserError
from ds_embed.tools.plan.job import job_to_size, table

PLANNED = *TRAINING_ARGUMENTS[:-1], SizingArguments
RUNS = {"zero0": 0, "zero1": 1, "zero2": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    make_model(root / "base", "llama", hidden_size=64, intermediate_size=128)
    make_training_file(root / "train.jsonl", 16, num_negatives=1)
    return root


@pytest.fixture
def needs_package():
    pytest.importorskip("bitsandbytes")


def training_flags(root, name, **changes):
    flags = {
        "model_name_or_path": root / "base",
        "train_files": root / "train.jsonl",
        "val_files": root / "train.jsonl",  # its passes without gradients must not harm those that follow
        "output_dir": root / name,
        "cache_dir": root / "cache",
        "deepspeed": "ds_configs/zero2.json",
        "max_length": 32,
        "global_batch_size": 8,
        "max_steps": 2,
        "save_interval": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "bf16": "false",
        "report_to": "none",
        "load_in_4bit": "nf4",
    }
    return [str(word) for flag, value in (flags | changes).items() for word in (f"--{flag}", value)]


@pytest.fixture(scope="module")
def runs(place):
    pytest.importorskip("bitsandbytes")
    cases = [training_flags(place, name, deepspeed=f"ds_configs/zero{stage}.json") for name, stage in RUNS.items()]
    further = {"model_name_or_path": place / "zero2"}
    cases += [training_flags(place, "further", **further), training_flags(place, "new", new_lora="true", **further)]
    cases.append(training_flags(place, "bf16", bf16="true", gradient_checkpointing="true", lora_dropout=0.1))
    (place / "cases.json").write_text(json.dumps([{"flags": flags} for flags in cases]))
    check(launch(0, "tests/workers/validation.py", place / "cases.json"))
    return place


def losses(root, name):
    lines = [json.loads(line) for line in open(root / name / "metrics.jsonl")]
    return [line["loss"] for line in lines if "loss" in line]


def loaded(root, load_in_4bit=None, bf16=False):
    source = replace(find_model(str(root / "base")), load_in_4bit=load_in_4bit)
    options = dict(attn_implementation="sdpa", trust_remote_code=False, pooling="last", bidirectional=False)
    return load_encoder(source, bf16=bf16, **options).eval()


def quantized_layers(model):
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_gradients_are_those_of_the_weights_it_stands_for(place, needs_package, variant):
    from bitsandbytes.functional import dequantize_4bit

    ours, reference = loaded(place, "nf4"), loaded(place)
    layers = quantized_layers(ours)
    plain = {name: module for name, module in reference.named_modules() if type(module) is torch.nn.Linear}
    assert layers.keys() == plain.keys() and len(layers) == 2 * 7
    for name, layer in layers.items():
        before = plain[name].weight.data
        plain[name].weight.data = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert 0.01 < (plain[name].weight - before).norm() / before.norm() < 0.2
    ids, lengths = torch.randint(4, 90, (3, 9), generator=torch.Generator().manual_seed(2)), torch.tensor([9, 4, 1])
    found = []
    for encoder in (ours, reference):
        add_lora(encoder, LoraArguments(lora_rank=4, lora_variant=variant), seed=1, dtype=torch.float32)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        with torch.no_grad():
            encoder(ids, lengths)
        vectors = encoder.train()(ids, lengths)
        (vectors @ vectors[0]).square().sum().backward()
        found.append((vectors, {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad}))
    (vectors, gradients), (expected, wanted) = found
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)
    assert gradients.keys() == wanted.keys() and all(gradient.norm() > 0 for gradient in wanted.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_training(runs):
    """All stages take the same steps, and what they save fits the base model in 4 bits and whole."""
    first = losses(runs, "zero0")
    assert len(first) == 2 and first[1] != first[0]
    for name in ("zero1", "zero2"):
        assert losses(runs, name) == pytest.approx(first, rel=1e-5)
    assert losses(runs, "further")[0] < first[0] and np.isfinite(losses(runs, "bf16")).all()
    assert (runs / "new" / "base" / "config.json").exists()
    assert "quantization_config" not in json.loads((runs / "new" / "base" / "config.json").read_text())
    texts = ["w1 w2 w3", "w4 w5"]
    for name in ("zero2", "new"):
        whole = Embedder.from_pretrained(str(runs / name), dtype="float32").encode_queries(texts)
        embedder = Embedder.from_pretrained(str(runs / name), dtype="float32", load_in_4bit="nf4")
        cosines = (embedder.encode_queries(texts) * whole).sum(1)
        assert quantized_layers(embedder.encoder) and (cosines > 0.8).all() and (cosines < 1 - 1e-5).all()


def test_a_run_and_vectors_know_of_it(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    (tmp_path / "queries.jsonl").write_text('{"query": "w1 w2", "query_id": "a"}\n')
    recipe = load_recipe("generate")
    monkeypatch.setattr(recipe, "initialize", World.alone)

    def generate(*extra):
        flags = {"--model_name_or_path": runs / "zero2", "--query_files": tmp_path / "queries.jsonl"}
        flags |= {"--output_prefix": tmp_path / "out", "--cache_dir": tmp_path / "cache"}
        words = [str(word) for pair in flags.items() for word in pair]
        monkeypatch.setattr("sys.argv", ["generate.py", *words, *extra])
        recipe.main()

    generate("--load_in_4bit", "nf4")
    with pytest.raises(UserError, match="load_in_4bit was nf4 and is None"):
        generate()
    with pytest.raises(UserError, match="--load_in_4bit nf4: ZeRO-3 can't cut 4-bit weights"):
        generate("--load_in_4bit", "nf4", "--deepspeed", "ds_configs/zero3.json")
    checkpoint = next((runs / "zero2" / "checkpoints").glob("*/manifest.json"))
    assert json.loads(checkpoint.read_text())["made_from"]["load_in_4bit"] == "nf4"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"load_in_4bit": "int4"}, "--load_in_4bit int4: .*nf4"),
        ({"deepspeed": "ds_configs/zero3.json"}, "--load_in_4bit nf4: ZeRO-3 can't .* zero2"),
        ({"lora_rank": 0}, "--load_in_4bit nf4: weights in 4 bits can't be trained; set --lora_rank"),
        ({"lora_variant": "pissa"}, "--lora_variant pissa: .* --load_in_4bit nf4 rounds"),
        ({"no package": ""}, "--load_in_4bit nf4: needs bitsandbytes; pip install bitsandbytes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_before_anything_is_read(place, monkeypatch, changes, words):
    if changes.pop("no package", None) is not None:
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    recipe = load_recipe("train_gpt")
    monkeypatch.setattr(recipe, "initialize", World.alone)
    with pytest.raises(UserError, match=words):
        recipe.main(training_flags(place, "refused", **changes))
    assert not (place / "refused").exists()


def test_the_plan_counts_it(place, needs_package):
    argv = ["--model_name_or_path", str(place / "base"), "--deepspeed", "zero2", "--max_length", "32"]
    plain, quantized = (
        job_to_size(None, *parse_arguments(*PLANNED, argv=argv + extra, defaults=SIZING_DEFAULTS))
        for extra in ([], ["--load_in_4bit", "nf4"])
    )
    layers = quantized_layers(loaded(place, "nf4", bf16=True)).values()
    held = sum(layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes for layer in layers)
    number = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    phases = [job.memory(job.zero).phases["backward"] for job in (plain, quantized)]
    assert phases[0]["weights"] - phases[1]["weights"] == 2 * number - held
    assert phases[1]["gathered weights"] == 2 * 64 * 128  # one, as the product needs it
    assert "ZeRO-3" in table(plain) and "ZeRO-3" not in table(quantized)
    with pytest.raises(UserError, match="--load_in_4bit nf4: ZeRO-3"):
        argv[3] = "zero3"
        job_to_size(None, *parse_arguments(*PLANNED, argv=[*argv, "--load_in_4bit", "nf4"], defaults=SIZING_DEFAULTS))
