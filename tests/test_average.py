"""The mean of runs, against a direct mean in float64."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_export import recipe, save_run
from tiny import make_model
from transformers import AutoModel

from ds_embed import Embedder

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"]
SCALES = {"one": 1.0, "two": -0.5, "three": 0.3}
WEIGHTS = [2.0, 1.0, 0.5]


@pytest.fixture(scope="module", params=["llama", "bert"])
def runs(request, tmp_path_factory):
    """Three runs of one base: LoRA matrices (llama) or whole models (bert), each of other weights."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp(request.param)
    first = save_run(root, request.param)
    for name, scale in SCALES.items():
        path = shutil.copytree(first, root / name) / "model"
        weights = next(path.glob("*model.safetensors"))
        torch.manual_seed(len(name))
        changed = {n: t.float() * scale + 0.02 * torch.randn(t.shape) for n, t in load_file(weights).items()}
        save_file(changed, weights, metadata={"format": "pt"})
        if request.param == "llama":  # the way from the model to its base
            card = json.loads((path / "ds_embed.json").read_text()) | {"base_model": str(root / "llama")}
            (path / "ds_embed.json").write_text(json.dumps(card))
    return root, request.param


def whole(root, kind, name):
    """The weights of a run, float64, by a direct merge."""
    if kind == "bert":
        model = AutoModel.from_pretrained(root / name / "model", dtype=torch.float64, add_pooling_layer=False)
        return dict(model.named_parameters())
    from peft import PeftModel

    base = AutoModel.from_pretrained(root / "llama", dtype=torch.float64)
    merged = PeftModel.from_pretrained(base, str(root / name / "model")).double().merge_and_unload()
    return {n: p.double() for n, p in merged.named_parameters()}


def test_vectors_are_those_of_the_mean(runs, tmp_path):
    root, kind = runs
    paths = [root / name for name in SCALES]
    flags = ["--average", *paths, "--weights", *WEIGHTS, "--dtype", "float32", "--output_dir", tmp_path / "out"]
    recipe("export", *flags, "--format", "sentence-transformers")
    parts = [whole(root, kind, name) for name in SCALES]
    mean = {n: sum(w * part[n] for w, part in zip(WEIGHTS, parts)) / sum(WEIGHTS) for n in parts[0]}
    exported = Embedder.from_pretrained(str(tmp_path / "out"), dtype="float32", device="cpu", keep_weights=True)
    assert exported.card.consumed_samples == 30
    found = dict(exported.encoder.backbone.named_parameters())
    assert found.keys() == mean.keys()
    for name, tensor in mean.items():
        torch.testing.assert_close(found[name].double(), tensor, atol=1e-6, rtol=1e-5)
    vectors = exported.encode_queries(TEXTS)
    exported.encoder.backbone.load_state_dict({n: t.float() for n, t in mean.items()}, strict=False)
    np.testing.assert_allclose(vectors, exported.encode_queries(TEXTS), atol=1e-5)
    single = Embedder.from_pretrained(str(root / "one"), dtype="float32", device="cpu").encode_queries(TEXTS)
    assert np.abs(vectors - single).max() > 1e-2


def test_what_has_no_mean_is_refused_by_name(runs, tmp_path):
    root, kind = runs
    one, two = root / "one", root / "two"
    other = shutil.copytree(two, tmp_path / "pooled")
    card = json.loads((other / "model" / "ds_embed.json").read_text())
    (other / "model" / "ds_embed.json").write_text(json.dumps(card | {"pooling": "mean+max"}))
    moved = shutil.copytree(two, tmp_path / "moved")
    elsewhere = str(make_model(tmp_path / "elsewhere", kind, seed=5))
    (moved / "model" / "ds_embed.json").write_text(json.dumps(card | {"base_model": elsewhere}))
    if kind == "llama":
        path = moved / "model" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": elsewhere}))
    for flags, message in [
        ([one, other], "--average .*pooled: its pooling is 'mean.max', and that of .*one is 'mean'"),
        ([one, moved], "--average .*moved: its base is '.*elsewhere', and that of"),
        ([one], "--average .*: give at least two runs"),
        ([one, two, "--weights", 1], "--weights 1: 1 for 2 runs of --average"),
        ([one, two, "--weights", 1, -1], "--weights 1 -1: their sum must be above 0"),
        ([one, two, "--format", "adapter"], "--format adapter: the mean of runs is a whole model"),
        ([one, two, "--step", 3], "--step 3: has no effect with --average"),
        ([one, two, "--run", one], "give either --run RUN, or --average"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipe("export", "--output_dir", tmp_path / "out", "--average", *flags)
    assert not (tmp_path / "out").exists()
