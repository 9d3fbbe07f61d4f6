"""train_bert and train_gpt differ in defaults alone, and the wrong one says so before anything is read or made."""

import pytest
from tiny import load_recipe, make_model

from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    for kind in ("llama", "bert"):
        make_model(root / kind, kind)
    (root / "broken.jsonl").write_text("not a record\n")  # never read here
    return root


def run(recipe, place, tmp_path, monkeypatch, model):
    module = load_recipe(recipe)
    monkeypatch.setattr(module, "initialize", World.alone)
    files = ["--train_files", str(place / "broken.jsonl"), "--cache_dir", str(tmp_path / "cache")]
    run = ["--deepspeed", "ds_configs/zero2.json", "--output_dir", str(tmp_path / "run")]
    module.main(["--model_name_or_path", str(place / model), *files, *run])


@pytest.mark.parametrize(
    "recipe, model, other", [("train_gpt", "bert", "train_bert"), ("train_bert", "llama", "train_gpt")]
)
def test_the_wrong_recipe_names_the_right_one(place, tmp_path, monkeypatch, recipe, model, other):
    with pytest.raises(
        UserError, match=f"--model_name_or_path .*{model}: .*use ds-embed {other.replace('_', '-')}"
    ) as error:
        run(recipe, place, tmp_path, monkeypatch, model)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_each_has_defaults_of_its_own(place, tmp_path, monkeypatch):
    seen = {}
    for recipe, model in (("train_gpt", "llama"), ("train_bert", "bert"), ("train_bert", "bert")):
        module = load_recipe(recipe)
        flags = ["--lora_rank", "3"] if recipe in seen else []

        class Noted(module.TrainingRun):
            def train(self):
                seen[recipe] = self.lora.lora_rank, self.optimizer.learning_rate, self.step_arguments.negatives

        monkeypatch.setattr(module, "initialize", World.alone)
        monkeypatch.setattr(module, "TrainingRun", Noted)
        files = ["--train_files", str(place / "broken.jsonl"), "--output_dir", str(tmp_path / "run")]
        rest = ["--model_name_or_path", str(place / model), "--deepspeed", "ds_configs/zero2.json"]
        module.main([*files, *rest, *flags])
        if not flags:
            expected = {"train_gpt": (16, 1e-4, "all"), "train_bert": (0, 2e-5, "own")}
            assert seen[recipe] == expected[recipe]
    assert seen["train_bert"] == (3, 2e-5, "own")  # a flag wins
    plan = load_recipe("plan")
    given = {"model_name_or_path": str(place / "bert")}
    assert plan.recipe_defaults(given)["learning_rate"] == 2e-5
    assert plan.recipe_defaults({"model_name_or_path": str(place / "llama")}) == {}
