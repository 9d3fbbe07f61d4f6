"""Checkpoints of the middle of a run are encoded, exported and refused as models are."""

import json
import shutil

import numpy as np
import pytest
from test_lora_runs import case
from tiny import check, launch, load_recipe, make_model, make_training_file

from ds_embed import Embedder
from ds_embed.job.ranks import World
from ds_embed.models.loading import find_model
from ds_embed.settings import EncodeArguments, ModelArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.vectors.generate import generate

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11"]
LORA = ("--lora_rank", 4, "--learnable_temperature", "true")
RUNS = {  # what they are trained from, and how
    "lora": ("base", LORA),
    "dora": ("base", ("--lora_rank", 4, "--lora_variant", "dora")),
    "pissa": ("base", ("--lora_rank", 4, "--lora_variant", "pissa")),
    "whole": ("dense", ("--lora_rank", 0)),
    "on dense": ("dense", ("--lora_rank", 4, "--lora_alpha", 8)),
    "on": ("lora", ()),
    "new": ("lora", ("--new_lora", "true", "--lora_rank", 2)),
    "all": ("lora", ("--lora_rank", 0)),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs of three steps in one process, each step saved; "dense" is a folder with a Dense layer behind the pooling."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    root = tmp_path_factory.mktemp("checkpoints")
    make_model(root / "base", "llama")
    transformer = Transformer(str(root / "base"))
    modules = [transformer, Pooling(32, "mean"), Dense(32, 16), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(root / "dense"))
    make_training_file(root / "train.jsonl", 60, num_negatives=2)
    make_training_file(root / "held_out.jsonl", 20, num_negatives=2, seed=1)
    cases = [case(root, name, base, *extra, "--save_total_limit", 0) for name, (base, extra) in RUNS.items()]
    (root / "cases.json").write_text(json.dumps(cases))
    check(launch(0, "tests/workers/validation.py", root / "cases.json", timeout=500))
    return root


def vectors(model, step=None):
    return Embedder.from_pretrained(str(model), step=step, dtype="float32", device="cpu").encode_queries(TEXTS)


@pytest.mark.parametrize("name", RUNS)
def test_the_last_checkpoint_is_the_model(place, name):
    run = place / name
    last = vectors(run)
    np.testing.assert_allclose(vectors(run, 3), last, atol=1e-5)
    np.testing.assert_allclose(vectors(run / "checkpoints" / "step_00000003"), last, atol=1e-5)
    one, other = find_model(str(run)).card, find_model(str(run), step=3).card
    assert (one.consumed_samples, one.temperature) == (other.consumed_samples, pytest.approx(other.temperature))
    middle = vectors(run, 2)
    assert find_model(str(run), step=2).card.consumed_samples == 16
    assert np.abs(middle - last).max() > 1e-3 and np.abs(middle - vectors(run, 1)).max() > 1e-3


@pytest.mark.parametrize("name, kind", [("pissa", "adapter"), ("lora", "sentence-transformers"), ("whole", "merged")])
def test_a_run_that_has_stopped_for_good_is_exported_and_encoded(place, tmp_path, name, kind):
    shutil.copytree(place / name, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no model/ in it; --step can be 1, 2, 3"):
        find_model(str(run))
    with pytest.raises(UserError, match="--step 4: --run .* has no checkpoint of that step; --step can be 1, 2, 3"):
        find_model(str(run), flag="run", step=4)
    flags = ["--run", run, "--step", 2, "--format", kind, "--output_dir", tmp_path / "out", "--dtype", "float32"]
    load_recipe("export").main([str(flag) for flag in flags if kind != "adapter" or flag not in ("--dtype", "float32")])
    np.testing.assert_allclose(vectors(tmp_path / "out"), vectors(run, 2), atol=1e-5)

    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"query": t, "query_id": t}) + "\n" for t in TEXTS))
    arguments = EncodeArguments(
        bf16=False,
        query_files=[str(tmp_path / "q.jsonl")],
        output_prefix=str(tmp_path / "vectors"),
        cache_dir=str(tmp_path / "cache"),
    )
    folder = generate(World.alone(), ModelArguments(str(run), step=2), TextArguments(), arguments)
    assert folder.name == "consumed_samples16"
    np.testing.assert_allclose(np.load(folder / "test_queries" / "query.npy"), vectors(run, 2), atol=1e-6)
    # Vectors of another checkpoint are not taken for these.
    made_from = [find_model(str(run), step=step).identify(None) for step in (2, 3)]
    assert made_from[0] != made_from[1]


def test_what_is_not_as_it_was_is_refused_by_name(place, tmp_path):
    root = shutil.copytree(place, tmp_path / "all", ignore=shutil.ignore_patterns("cache"))
    step = root / "lora" / "checkpoints" / "step_00000002"
    for name in ("weights-00001.safetensors", "state.json"):
        before = (step / name).read_bytes()
        (step / name).write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
        with pytest.raises(UserError, match=f"step_00000002/{name}: was changed"):
            vectors(step)
        (step / name).write_bytes(before)
    # Moved together, a run finds its base.
    np.testing.assert_allclose(vectors(step), vectors(place / "lora", 2), atol=1e-6)
    with pytest.raises(UserError, match="--adapter_path .*: goes on no checkpoint"):
        find_model(str(step), str(root / "lora" / "model"))
    state = json.loads((step / "state.json").read_text())["model"]
    assert state["base"][0] == str((place / "base").resolve())
    make_model(place / "base", "llama", seed=7)
    try:
        with pytest.raises(UserError, match="belongs to .* as it was when the run began"):
            vectors(place / "lora", 2)
    finally:
        make_model(place / "base", "llama")
