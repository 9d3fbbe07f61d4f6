"""Parts of a model that don't belong together are one line that names both, before anything is read or made."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import load_recipe, make_model, make_tokenizer

from ds_embed import Embedder
from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("bert", "llama"):
        make_model(root / kind, kind)
    (root / "broken.jsonl").write_text("not a record\n")  # never read here
    return root


@pytest.fixture
def model(models, tmp_path):
    return shutil.copytree(models / "llama", tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_tokens(folder, *tokens, special):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(folder)


def add_words(folder):
    add_tokens(folder, *(f"new{i}" for i in range(8)), special=False)


MISFITS = {
    "a weight that is not there": (
        lambda folder: edit_weights(folder, lambda w: w.pop("layers.1.mlp.up_proj.weight")),
        r"model: its weight files lack layers.1.mlp.up_proj.weight \(1 of the 20 tensors that its config.json asks for\)",
    ),
    "a config with more layers": (
        lambda folder: edit_config(folder, num_hidden_layers=3),
        r"lack layers.2.input_layernorm.weight \(9 of the 29 tensors",
    ),
    "a config with fewer layers": (
        lambda folder: edit_config(folder, num_hidden_layers=1),
        "model: its weight files hold layers.1..*, which its config.json has no place for",
    ),
    "a config of other widths": (
        lambda folder: edit_config(folder, intermediate_size=64),
        "mlp.down_proj.weight is 32 x 48 in its weight files and 32 x 64 by its config.json",
    ),
    "a config of another vocabulary": (
        lambda folder: edit_config(folder, vocab_size=99),
        "embed_tokens.weight is 100 x 32 in its weight files and 99 x 32 by",
    ),
    **{
        f"weights of {method}": (
            lambda folder, method=method: edit_config(folder, quantization_config={"quant_method": method, "bits": 4}),
            rf"model: its weights are quantized already \({method}\), .*--load_in_4bit nf4",
        )
        for method in ("bitsandbytes", "gptq", "awq", "fp8")
    },
    **{
        f"a weight {name} without a place": (
            lambda folder, name=name: edit_weights(
                folder, lambda w: w.update({f"model.layers.0.{name}": torch.ones(2)})
            ),
            f"model: its weight files hold model.layers.0.{name}, which its config.json has no place for",
        )
        for name in ("self_attn.q_proj.bias", "self_attn.q_norm.weight", "mlp.up_proj.lora_A.weight")
    },
    **{
        f"a config whose {name} is {value}": (
            lambda folder, name=name, value=value: edit_config(folder, **{name: value}),
            "--model_name_or_path .*model: its config.json can't be used",
        )
        for name, value in (
            ("num_hidden_layers", "two"),
            ("hidden_size", None),
            ("vocab_size", 1),
            ("hidden_size", 30),
            ("num_attention_heads", 0),
            ("hidden_act", "nope"),
            ("model_type", None),
            ("model_type", "unheard_of"),
            ("rope_parameters", {"rope_type": "nope"}),
            ("rope_parameters", [1]),
            ("dtype", "float99"),
            ("auto_map", "modeling.Model"),
        )
    },
    **{
        f"a config that is {content}": (
            lambda folder, content=content: (folder / "config.json").write_text(content),
            "--model_name_or_path .*model: its config.json can't be used",
        )
        for content in ("no JSON", "[1]", "{}")
    },
    "a type of weights that are no fractions": (
        lambda folder: edit_config(folder, dtype="int8"),
        "--model_name_or_path .*model: can't be loaded: .*torch.int8",
    ),
    "an index of weights that is none": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"),
        "--model_name_or_path .*model: can't be loaded: ",
    ),
    "a tokenizer with more words": (
        add_words,
        "model: its tokenizer knows 'new7' as token 101, and the embedding table of .*model has 100 rows",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_one_line_and_leaves_nothing(models, model, tmp_path, monkeypatch, name):
    change, message = MISFITS[name]
    change(model)
    with pytest.raises(UserError, match=message) as error:
        Embedder.from_pretrained(model, device="cpu")
    assert "\n" not in str(error.value)
    for recipe, flags in (
        ("train_gpt", ["--train_files", models / "broken.jsonl", "--output_dir", tmp_path / "run"]),
        ("generate", ["--query_files", models / "broken.jsonl", "--output_prefix", tmp_path / "run"]),
    ):
        module = load_recipe(recipe)
        monkeypatch.setattr(module, "initialize", World.alone)
        flags += [
            "--model_name_or_path",
            model,
            "--cache_dir",
            tmp_path / "cache",
            "--deepspeed",
            "ds_configs/zero2.json",
        ]
        monkeypatch.setattr("sys.argv", [recipe, *map(str, flags)])
        with pytest.raises(UserError, match=message):
            module.main()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_adapter_of_another_base(models, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    other = make_model(tmp_path / "other", "llama", intermediate_size=64)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    get_peft_model(AutoModel.from_pretrained(other), lora).save_pretrained(tmp_path / "adapter")
    module = load_recipe("generate")
    monkeypatch.setattr(module, "initialize", World.alone)
    flags = [
        "--query_files",
        models / "broken.jsonl",
        "--output_prefix",
        tmp_path / "out",
        "--cache_dir",
        tmp_path / "cache",
    ]
    flags += ["--model_name_or_path", models / "llama", "--adapter_path", tmp_path / "adapter"]
    make_tokenizer(tmp_path / "adapter", bert=False)
    monkeypatch.setattr("sys.argv", ["generate", *map(str, flags), "--deepspeed", "ds_configs/zero2.json"])
    with pytest.raises(UserError, match="adapter: this adapter does not fit .*/llama: .*mlp") as error:
        module.main()
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other"]


def test_what_is_no_misfit(models, tmp_path):
    """Heads, poolers, tied weights, decoders left behind, spare rows, control tokens that no text is given."""
    import transformers

    def vectors(folder):
        return Embedder.from_pretrained(folder, dtype="float32", device="cpu").encode_queries(["w1 w2", "w3"])

    bert = shutil.copytree(models / "bert", tmp_path / "bert")
    expected = vectors(bert)
    model = transformers.BertForMaskedLM.from_pretrained(bert)
    model.save_pretrained(bert)
    assert (vectors(bert) == expected).all()
    torch.save(load_file(bert / "model.safetensors"), bert / "pytorch_model.bin")
    (bert / "model.safetensors").unlink()
    assert (vectors(bert) == expected).all()
    llama = shutil.copytree(models / "llama", tmp_path / "llama")
    expected = vectors(llama)
    for name in (
        "lm_head.weight",
        "score.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "layers.0.self_attn.bias",
    ):
        edit_weights(llama, lambda w, name=name: w.update({name: torch.ones(2)}))
    assert (vectors(llama) == expected).all()
    add_tokens(llama, "[PAD1]", "[PAD2]", "[PAD3]", "[PAD4]", "[PAD5]", "[PAD6]", "[PAD7]", special=True)
    assert (vectors(llama) == expected).all()
    t5 = make_model(tmp_path / "t5", "T5")  # an encoder and a decoder
    assert any(re.match("decoder", name) for name in load_file(t5 / "model.safetensors"))
    expected = vectors(t5)
    encoder = transformers.T5EncoderModel.from_pretrained(t5)
    encoder.save_pretrained(tmp_path / "encoder")
    make_tokenizer(tmp_path / "encoder", bert=True)
    assert (vectors(tmp_path / "encoder") == expected).all()
