"""PEFT adapters that others trained: on the bare model they give the vectors of where they were trained, or are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import check, launch, make_model
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from ds_embed import Embedder
from ds_embed.models.loading import find_model, load_config, load_encoder
from ds_embed.models.lora import add_lora, save_adapter
from ds_embed.models.lora_runs import resolve_lora
from ds_embed.settings import LoraArguments
from ds_embed.settings.errors import UserError

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])
KINDS = {
    "causal": (AutoModelForCausalLM, dict(task_type="CAUSAL_LM")),
    "no task": (AutoModelForCausalLM, dict()),
    "classifier": (AutoModelForSequenceClassification, dict(task_type="SEQ_CLS")),
    "bare": (AutoModel, dict(task_type="FEATURE_EXTRACTION")),
    "expression": (AutoModelForCausalLM, dict(target_modules=r"^model\.layers\.\d+\.(self_attn\.[qv]|mlp\.up)_proj$")),
    "expression on the bare model": (AutoModel, dict(target_modules=r".*(q|down)_proj")),
    "full names": (AutoModelForCausalLM, dict(target_modules=["model.layers.1.mlp.up_proj", "layers.0.mlp.up_proj"])),
    "some layers": (AutoModelForCausalLM, dict(layers_to_transform=[1], layers_pattern="layers")),
    "patterns": (
        AutoModelForCausalLM,
        dict(rank_pattern={r"model\.layers\.0\.self_attn\.q_proj": 2, "v_proj": 3}, alpha_pattern={"v_proj": 5}),
    ),
    "rslora": (AutoModelForCausalLM, dict(use_rslora=True)),
    "dora": (AutoModelForCausalLM, dict(use_dora=True)),
    "pissa": (AutoModelForCausalLM, dict(init_lora_weights="pissa")),
    "head and embeddings": (AutoModelForCausalLM, dict(modules_to_save=["lm_head", "embed_tokens"])),
    "low-rank head": (AutoModelForCausalLM, dict(target_modules=["q_proj", "v_proj", "lm_head"])),
    "bias": (AutoModelForCausalLM, dict(bias="lora_only")),
    "low-rank embeddings": (AutoModelForCausalLM, dict(target_modules=["q_proj", "embed_tokens"])),
    "some tokens": (AutoModelForCausalLM, dict(trainable_token_indices=[5, 6])),
    "some tokens by name": (
        AutoModelForCausalLM,
        dict(trainable_token_indices={"model.embed_tokens": [5, 6], "lm_head": [5, 6]}),
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder from which each head model and the bare one load the same backbone."""
    folder = make_model(
        tmp_path_factory.mktemp("adapters") / "llama", "llama", attention_bias=True, mlp_bias=True, pad_token_id=0
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, model_class=AutoModelForCausalLM, **settings) -> torch.Tensor:
    """A PEFT folder with matrices that change much; returns the last states of IDS there."""
    torch.manual_seed(2)
    settings = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]) | settings
    model = get_peft_model(model_class.from_pretrained(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    with torch.no_grad():
        outputs = model.eval()(input_ids=IDS, output_hidden_states=True)
    return outputs.hidden_states[-1]


def states(name: Path, adapter: Path | None = None, trained: LoraArguments | None = None) -> torch.Tensor:
    encoder = load_encoder(
        find_model(str(name), None if adapter is None else str(adapter)),
        pooling="last",
        bidirectional=False,
        bf16=False,
        attn_implementation="eager",
        trust_remote_code=False,
        trained=trained,
    )
    with torch.no_grad():
        return encoder.eval().backbone(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_those_of_the_model_it_was_trained_on(base, tmp_path, kind):
    model_class, settings = KINDS[kind]
    expected = make_adapter(base, tmp_path / "adapter", model_class, **settings)
    assert not torch.allclose(states(base), expected, atol=0.1)
    torch.testing.assert_close(states(tmp_path / "adapter"), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [dict(target_modules="all-linear"), dict(modules_to_save=["pooler"])])
def test_berts_pooler_may_be_trained_too(tmp_path, settings):
    folder = make_model(tmp_path / "bert", "bert")
    torch.manual_seed(3)
    AutoModel.from_pretrained(folder).save_pretrained(folder)  # with a pooler
    expected = make_adapter(
        folder, tmp_path / "adapter", AutoModel, **dict(target_modules=["query", "value"]) | settings
    )
    assert any("pooler" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    torch.testing.assert_close(states(tmp_path / "adapter"), expected, atol=1e-5, rtol=1e-4)


def test_weights_as_a_pickle_with_the_name_of_the_adapter_in_them(base, tmp_path):
    expected = make_adapter(base, tmp_path, task_type="CAUSAL_LM", use_dora=True)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    named = {name.replace("_A.", "_A.other.").replace("_B.", "_B.other."): w for name, w in weights.items()}
    assert named.keys() != weights.keys()
    torch.save(named, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(states(base, tmp_path), expected, atol=1e-5, rtol=1e-4)


def changed(folder: Path, change) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def test_a_weight_that_is_missing_left_over_or_misshapen_is_named(base, tmp_path):
    changes = {
        "missing": (lambda w: w.pop(f"{Q_PROJ}.lora_A.weight"), "layers.0.self_attn.q_proj.lora_A.weight.*none"),
        "over": (lambda w: w.update({"base_model.model.model.layers.7.odd.weight": torch.ones(2)}), "layers.7.odd"),
        "shape": (
            lambda w: w.update({f"{Q_PROJ}.lora_B.weight": torch.ones(8, 4)}),
            r"q_proj.lora_B.*\(8, 4\).*\(32, 4\)",
        ),
    }
    for name, (change, message) in changes.items():
        make_adapter(base, tmp_path / name, task_type="CAUSAL_LM")
        changed(tmp_path / name, change)
        with pytest.raises(UserError, match=message) as error:
            states(base, tmp_path / name)
        assert "\n" not in str(error.value) and str(base) in str(error.value)


class Enlarged(AutoModelForCausalLM):
    @classmethod
    def from_pretrained(cls, name):
        model = AutoModelForCausalLM.from_pretrained(name)
        model.resize_token_embeddings(110)
        return model


@pytest.mark.parametrize(
    "settings", [dict(), dict(modules_to_save=["embed_tokens"]), dict(target_modules=["q_proj", "embed_tokens"])]
)
def test_an_embedding_table_other_than_the_bases_is_named(base, tmp_path, settings):
    make_adapter(base, tmp_path / "grown", Enlarged, **settings)
    with pytest.raises(
        UserError, match="brings an embedding table of 110 tokens, .* the base has 100.* merge it with PEFT"
    ):
        states(tmp_path / "grown")
    with pytest.raises(UserError, match="embedding table of 110 tokens"):
        Embedder.from_pretrained(tmp_path / "grown", device="cpu")
    if "target_modules" in settings:
        make_adapter(base, tmp_path / "other", **settings)
        changed(tmp_path / "other", lambda w: w[next(n for n in w if "base_layer" in n)].mul_(2))
        with pytest.raises(UserError, match="brings an embedding table with other numbers than the base's"):
            states(tmp_path / "other")


def test_the_bases_own_table_is_known_also_in_shares(base, tmp_path):
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    (tmp_path / "docs.jsonl").write_text('{"pos_doc": "w5 w6", "doc_id": "d"}\n')
    flags = ("--model_name_or_path", tmp_path / "adapter", "--doc_files", tmp_path / "docs.jsonl", "--bf16", "false")
    check(launch(2, "recipes/generate.py", "--deepspeed", "zero3", *flags, "--output_prefix", tmp_path / "out"))
    (found,) = (np.load(path) for path in (tmp_path / "out").rglob("doc.npy"))
    expected = Embedder.from_pretrained(tmp_path / "adapter", device="cpu", dtype="float32").encode_documents(["w5 w6"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    make_adapter(base, tmp_path / "adapter")
    other = make_model(tmp_path / "other", "llama", hidden_size=48)
    with pytest.raises(UserError, match="does not fit .*other"):
        states(other, tmp_path / "adapter")


def test_kinds_that_are_no_lora_are_refused_by_name(base, tmp_path):
    others = {
        "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "IA3": IA3Config(
            task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    }
    for name, config in others.items():
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=f"peft_type {name}"):
            states(base, tmp_path / name)


@pytest.mark.parametrize("name, value", [("alora_invocation_tokens", [3]), ("from_the_future", {"a": 1})])
def test_what_would_change_vectors_and_is_not_done_is_refused(base, tmp_path, name, value):
    make_adapter(base, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=name):
        find_model(str(tmp_path))


@pytest.mark.parametrize(
    "name, value", [("r", "four"), ("r", 0), ("lora_alpha", "much"), ("target_modules", 3), ("rank_pattern", [1])]
)
def test_a_config_that_peft_cant_use_is_one_line(base, tmp_path, name, value):
    make_adapter(base, tmp_path, AutoModel)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        states(tmp_path)
    assert "\n" not in str(error.value)


def test_the_base_is_found_where_it_is_named_beside_the_adapter_or_not(base, tmp_path, monkeypatch):
    make_adapter(base, tmp_path / "run" / "adapter")
    path = tmp_path / "run" / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text())

    def found(name):
        path.write_text(json.dumps(content | {"base_model_name_or_path": name}))
        return find_model(str(path.parent)).base

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "llama").symlink_to(base)
    assert Path(found("../../models/llama")) == base.resolve()
    monkeypatch.chdir(tmp_path)
    assert Path(found("models/llama")) == base.resolve()
    with pytest.raises(
        UserError, match="gone/llama .the base model that .*adapter names; --adapter_path .*: no such folder"
    ):
        found("/gone/llama")
    with pytest.raises(UserError, match="names no base model"):
        found(None)
    with pytest.raises(UserError, match="is an adapter itself"):
        found(str(path.parent))


def resolve(arguments: LoraArguments, name: Path) -> LoraArguments:
    source = find_model(str(name))
    return resolve_lora(arguments, source, load_config(source, False), False)


def test_settings_that_are_not_given_are_those_of_the_run(base, tmp_path):
    make_adapter(base, tmp_path / "run", task_type="CAUSAL_LM", use_rslora=True, lora_dropout=0.25)
    own = resolve(LoraArguments(), tmp_path / "run")
    assert (own.lora_rank, own.lora_alpha, own.lora_dropout, own.lora_variant) == (4, 8.0, 0.25, "rslora")
    assert own.lora_target_modules == ["down_proj", "q_proj", "v_proj"]
    assert resolve(LoraArguments(lora_rank=4, lora_dropout=0.0), tmp_path / "run").lora_dropout == 0.0
    assert resolve(LoraArguments(lora_rank=2, new_lora=True), tmp_path / "run").lora_rank == 2
    assert resolve(LoraArguments(lora_rank=0), tmp_path / "run").lora_rank == 0
    assert resolve(LoraArguments(), base).lora_rank == 16
    assert resolve(LoraArguments(), make_model(tmp_path / "bert", "bert")).lora_rank == 0
    make_adapter(base, tmp_path / "all", task_type="CAUSAL_LM", target_modules="all-linear")
    assert len(resolve(LoraArguments(lora_target_modules=["all-linear"]), tmp_path / "all").lora_target_modules) == 7


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(lora_rank=8), "--lora_rank 8: .* has 4; .*--new_lora true"),
        (dict(lora_alpha=9.0), "--lora_alpha 9.0: .* has 8.0; .*--new_lora true"),
        (dict(lora_variant="dora"), "--lora_variant dora: .* has lora; .*--new_lora true"),
        (dict(lora_target_modules=["all-linear"]), "--lora_target_modules all-linear: .* has down_proj q_proj v_proj"),
    ],
)
def test_other_matrices_than_the_run_has_are_refused(base, tmp_path, given, message):
    make_adapter(base, tmp_path / "run", task_type="CAUSAL_LM")
    with pytest.raises(UserError, match=message) as error:
        resolve(LoraArguments(**given), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_flags_that_say_nothing_are_refused(base, tmp_path):
    with pytest.raises(UserError, match="--new_lora true: the model is no LoRA run"):
        resolve(LoraArguments(new_lora=True), base)
    with pytest.raises(UserError, match="--lora_variant dora: needs a --lora_rank"):
        resolve(LoraArguments(lora_variant="dora", lora_rank=0), base)
    with pytest.raises(UserError, match="--lora_alpha 8.0: needs a --lora_rank"):
        resolve(LoraArguments(lora_alpha=8.0, lora_rank=0), base)
    # As a run without matrices writes its config.yaml.
    assert resolve(resolve(LoraArguments(lora_rank=0), base), base).lora_rank == 0


def test_pissa_is_saved_beside_the_weights_that_it_began_with(base, tmp_path):
    encoder = load_encoder(
        find_model(str(base)),
        pooling="last",
        bidirectional=False,
        bf16=False,
        attn_implementation="eager",
        trust_remote_code=False,
    )
    with torch.no_grad():
        before = encoder.eval().backbone(input_ids=IDS).last_hidden_state
        add_lora(encoder, LoraArguments(lora_rank=4, lora_variant="pissa"), seed=1, dtype=torch.float32)
        started = encoder.eval().backbone(input_ids=IDS).last_hidden_state
        torch.testing.assert_close(started, before, atol=1e-5, rtol=1e-4)
        trained = {n: p for n, p in encoder.backbone.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            parameter += 0.05 * torch.randn(parameter.shape)
        expected = encoder.backbone(input_ids=IDS).last_hidden_state
    assert not torch.allclose(expected, before, atol=0.1)
    save_adapter(encoder, trained, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8
    torch.testing.assert_close(states(tmp_path), expected, atol=1e-5, rtol=1e-4)
