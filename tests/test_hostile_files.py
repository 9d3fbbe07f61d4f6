"""Files that would run code, put in the place of ours: nothing of them runs, and the error names them.

A payload writes a file when it runs, so its absence is the proof; the first tests show that it does run where it may.
"""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import make_model, make_training_file

from ds_embed.artifact.artifact import Artifact
from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.checkpoint import KIND, CheckpointReader, damage
from ds_embed.models.loading import find_model, load_encoder, load_tokenizer
from ds_embed.models.lora import add_lora
from ds_embed.settings import EncodeArguments, LoraArguments, ModelArguments, TextArguments
from ds_embed.training import checkpoint
from ds_embed.vectors.embedder import Embedder
from ds_embed.vectors.generate import generate
from ds_embed.vectors.vectors import read_embeddings


class Payload:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


@pytest.fixture
def sentinel(tmp_path):
    return tmp_path / "it_ran"


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model", "llama")


@pytest.fixture
def adapter(tmp_path, model):
    encoder = load_encoder(
        find_model(str(model)),
        pooling="last",
        bidirectional=False,
        bf16=False,
        attn_implementation=None,
        trust_remote_code=False,
    )
    add_lora(encoder, LoraArguments(), seed=1, dtype=torch.float32)
    encoder.backbone.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    load_tokenizer(find_model(str(model)), False).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def encode(name, trust=False, adapter_path=None):
    """What search, generate and training do to read a model."""
    model = ModelArguments(str(name), trust_remote_code=trust)
    source = find_model(model.model_name_or_path, adapter_path)
    embedder = Embedder.from_source(source, model, TextArguments(max_length=16), device="cpu", bf16=False)
    return embedder.encode_queries(["w1 w2"])


def own_code(folder, sentinel):
    """A module that a config can name, as models on the hub bring their own."""
    (folder / "hostile.py").write_text(
        f"open({str(sentinel)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast\n"
        "class Config(LlamaConfig):\n    model_type = 'hostile'\n"
        "class Model(LlamaModel):\n    config_class = Config\n"
        "class Tokens(PreTrainedTokenizerFast):\n    pass\n"
    )


AUTO_MAP = {
    "AutoConfig": "hostile.Config",
    "AutoModel": "hostile.Model",
    "AutoTokenizer": ["hostile.Tokens", "hostile.Tokens"],
}


def test_payloads_run_where_they_may(tmp_path, sentinel, model):
    pickle.loads(pickle.dumps(Payload(sentinel)))
    assert sentinel.exists()
    os.remove(sentinel)
    own_code(model, sentinel)
    edit(model / "config.json", auto_map=AUTO_MAP, model_type="hostile")
    assert encode(model, trust=True).shape == (1, 32)
    assert sentinel.exists()


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_weights_of_a_base_model(model, sentinel, file, form):
    os.remove(model / "model.safetensors")
    write(model / file, form, sentinel)
    with pytest.raises(ValueError, match=f"{model}: its weights can't be read as plain tensors"):
        encode(model)
    assert not sentinel.exists()


def write(path, form, sentinel):
    if form == "torch":
        torch.save({"layers.0.weight": Payload(sentinel)}, path)
    else:
        path.write_bytes(pickle.dumps({"layers.0.weight": Payload(sentinel)}))


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors"])
def test_weights_of_an_adapter(model, adapter, sentinel, file):
    os.remove(adapter / "adapter_model.safetensors")
    write(adapter / file, "torch", sentinel)
    for name, path in ((adapter, None), (model, str(adapter))):
        with pytest.raises(ValueError, match=f"{adapter}: its weights can't be read as plain tensors"):
            encode(name, adapter_path=path)
    assert not sentinel.exists()


@pytest.mark.parametrize("model_type", ["hostile", "llama"])
def test_config_that_names_code(tmp_path, model, adapter, sentinel, model_type):
    own_code(model, sentinel)
    edit(model / "config.json", auto_map=AUTO_MAP, model_type=model_type)
    for name in (model, adapter):  # the adapter names the model as its base
        if model_type == "llama":  # transformers has a class of that name, which is taken
            edit(
                model / "config.json",
                auto_map=AUTO_MAP | {"AutoModel": AUTO_MAP["AutoModel"].split(".")[0] + ".LlamaModel"},
            )
            assert encode(name).shape == (1, 32)
            edit(model / "config.json", auto_map=AUTO_MAP)  # of another name: the model is meant to be something else
        with pytest.raises(ValueError, match=f"{model}: comes with Python code of its own.*--trust_remote_code true"):
            encode(name)
        documents = tmp_path / "docs.jsonl"
        documents.write_text('{"pos_doc": "w1", "doc_id": "d1"}\n')
        arguments = EncodeArguments(doc_files=[str(documents)], output_prefix=str(tmp_path / "out"))
        with pytest.raises(ValueError, match="--trust_remote_code true"):
            world = World.alone()
            generate(world, ModelArguments(str(name)), TextArguments(), arguments)
    assert not sentinel.exists()


def test_tokenizer_that_names_code(model, sentinel):
    own_code(model, sentinel)
    edit(model / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="Tokens")
    try:
        encode(model)
    except ValueError as error:
        assert f"{model}: comes with Python code of its own" in str(error)
    assert not sentinel.exists()


def test_adapter_that_names_a_module(adapter, sentinel, tmp_path, monkeypatch):
    own_code(tmp_path, sentinel)
    monkeypatch.syspath_prepend(tmp_path)
    named = {"base_model_class": "Model", "parent_library": "hostile"}
    edit(adapter / "adapter_config.json", auto_mapping=named)
    assert encode(adapter).shape == (1, 32)
    edit(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="hostile")
    with pytest.raises(ValueError, match=f"{adapter}/adapter_config.json: has megatron_config"):
        encode(adapter)
    assert not sentinel.exists()


def objects(path, sentinel, num_items):
    array = np.empty(num_items, dtype=object)
    array[:] = [Payload(sentinel) for _ in range(num_items)]
    np.save(path, array, allow_pickle=True)


def archive(path, sentinel, num_items):
    with open(path, "wb") as file:
        np.savez(file, a=np.array([Payload(sentinel)], dtype=object), allow_pickle=True)


def bare(path, sentinel, num_items):
    path.write_bytes(pickle.dumps(Payload(sentinel)))


FORMS = [objects, archive, bare]


@pytest.mark.parametrize("form", FORMS)
def test_vectors(tmp_path, sentinel, form):
    for kind in ("query", "doc"):
        folder = tmp_path / f"test_{'queries' if kind == 'query' else 'docs'}"
        folder.mkdir()
        np.save(folder / f"{kind}.npy", np.ones((3, 2), np.float32))
        (folder / f"{kind}.ids").write_text("a\nb\nc\n")
    read_embeddings(tmp_path)
    form(tmp_path / "test_docs" / "doc.npy", sentinel, 3)
    with pytest.raises(ValueError, match=str(tmp_path / "test_docs" / "doc.npy")):
        read_embeddings(tmp_path)
    assert not sentinel.exists()


@pytest.mark.parametrize("form", FORMS)
def test_store(tmp_path, sentinel, model, form):
    make_training_file(tmp_path / "train.jsonl", 5, num_negatives=1)
    texts = TextFormat("", 24, True)
    tokenizer = load_tokenizer(find_model(str(model)), False)
    path = build_training_store([tmp_path / "train.jsonl"], tokenizer, texts, texts, 1, tmp_path / "cache")
    form(path / "scores.npy", sentinel, TrainingStore.open(path).num_texts)
    with pytest.raises(ValueError, match=str(path)):
        TrainingStore.open(path)
    # The same where the sizes of the files were made to fit.
    edit(path / "manifest.json", store_files={f.name: f.stat().st_size for f in path.iterdir() if f.suffix == ".npy"})
    with pytest.raises(ValueError, match=f"{path}: scores.npy is not an array of plain numbers"):
        TrainingStore.open(path)
    assert not sentinel.exists()


def test_checkpoint(tmp_path, sentinel):
    writer = checkpoint.CheckpointWriter(tmp_path, 1)
    writer.add("a", "weight", torch.ones(3))
    writer.finish({})
    path = writer.publish()
    shard = path / "weights-00001.safetensors"
    torch.save({"a": Payload(sentinel)}, path / "weights-00001.pt")
    torch.save({"a": Payload(sentinel)}, path / "zzz.safetensors")  # last in the order of names
    assert damage(path) is None
    assert torch.equal(CheckpointReader(path).read("a", "weight"), load_file(shard)["a"])
    torch.save({"a": Payload(sentinel)}, shard)
    assert "weights-00001.safetensors has" in damage(path)
    # By somebody who makes the hashes fit.
    forged = Artifact(tmp_path / "step_00000002", KIND, "--output_dir")
    forged.begin(anew=True)
    forged.write(shard.name, shard.read_bytes())
    forged.publish()
    assert damage(forged.path) is None
    with pytest.raises(ValueError, match=f"{forged.path / shard.name}: not a file of tensors"):
        CheckpointReader(forged.path)
    assert not sentinel.exists()


def test_card(model):
    (model / "ds_embed.json").write_text('{"__reduce__": "os.system"}')
    with pytest.raises(ValueError, match="ds_embed.json: written by another version.*__reduce__"):
        EmbeddingCard.read(model / "ds_embed.json")
