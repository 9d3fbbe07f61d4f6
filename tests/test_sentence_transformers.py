"""Folders that sentence-transformers itself wrote: read, trained and saved, each against its own vectors."""

import json
import random

import numpy as np
import pytest
import torch
from test_tokenizer_kinds import qwen
from tiny import make_model, sentence
from tokenizers import processors

from ds_embed import Embedder
from ds_embed.job.ranks import World
from ds_embed.training.run_folder import RunFolder
from ds_embed.training.save import save_model

PROMPTS = {"query": "w1 query: ", "document": "w2 w3 "}
ALL = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
LEARNED = dict(dense=[(24, "Tanh", True)])
# By name: kind of model, and what its folder says beside the default (mean, no prompts, Normalize).
CASES = {
    "bert": ("bert", {}),
    "bert cls": ("bert", dict(pooling="cls", prompts=PROMPTS, length=12)),
    "bert max": ("bert", dict(pooling="max", normalize=False)),
    "bert all at once": ("bert", dict(pooling=ALL, length=20, prompts=PROMPTS)),
    "bert in another order": ("bert", dict(pooling=("lasttoken", "cls"), normalize=False)),
    "bert one Dense": ("bert", dict(dense=[(24, "Tanh", True)])),
    "bert two Dense": ("bert", dict(dense=[(96, "GELU", True), (16, "Identity", False)], prompts=PROMPTS)),
    "bert residual": ("bert", dict(dense=[(32, "ReLU", True), (8, "SiLU", False)], residual=True, normalize=False)),
    "bert lower case": ("bert", dict(lower_case=True)),
    "roberta": ("roberta", dict(pooling="mean_sqrt_len_tokens", normalize=False, length=16)),
    "roberta prompt left out": ("roberta", dict(prompts=PROMPTS, include_prompt=False)),
    "mpnet": ("mpnet", dict(pooling="cls", prompts=PROMPTS)),
    "mpnet prompt left out": ("mpnet", dict(pooling="cls", prompts=PROMPTS, include_prompt=False)),
    "modernbert": ("modernbert", dict(pooling=("cls", "mean"), prompts=PROMPTS)),
    "modernbert prompt left out": ("modernbert", dict(pooling=ALL, prompts=PROMPTS, include_prompt=False, length=18)),
    "distilbert": ("distilbert", dict(pooling="max", length=10)),
    "distilbert Dense, prompt left out": ("distilbert", dict(LEARNED, prompts=PROMPTS, include_prompt=False)),
    "xlm-roberta": ("xlm-roberta", dict(prompts={"query": "query: ", "document": "passage: "})),
    "llama": ("llama", dict(pooling="lasttoken", prompts=PROMPTS)),
    "llama weighted": ("llama", dict(pooling="weightedmean", prompts=PROMPTS, include_prompt=False, length=16)),
    "llama bidirectional": ("llama", dict(changes=dict(is_causal=False), prompts=PROMPTS)),
    "mistral": ("mistral", dict(pooling="lasttoken", prompts=PROMPTS, length=14)),
    "qwen2": ("qwen2", dict(pooling="lasttoken", normalize=False)),
    "qwen2 bidirectional": ("qwen2", dict(changes=dict(is_causal=False, layer_types=["full_attention"] * 2))),
    "qwen3": ("qwen3", dict(pooling="lasttoken", prompts=PROMPTS, ends=True)),
    "qwen3 Dense": ("qwen3", dict(LEARNED, pooling="lasttoken", prompts=PROMPTS, ends=True, length=12)),
    "gemma3_text": ("gemma3_text", dict(pooling="weightedmean")),
    "embeddinggemma": (
        "gemma3_text",
        dict(changes=dict(use_bidirectional_attention=True, layer_types=["full_attention"] * 2), prompts=PROMPTS)
        | dict(dense=[(96, "Identity", False), (32, "Identity", False)]),
    ),
}


def texts_to_encode(seed=0):
    rng = random.Random(seed)
    return ["w1", "  w2 w3 \n", "unknown w4", "W5 w6 W7", "w8 " * 60, *(sentence(rng, 1, 40) for _ in range(12))]


def write_folder(folder, kind, case, seed=0):
    """A folder that sentence-transformers wrote; returns its own model of it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    changes = case.get("changes", {}) | ({"vocab_size": 320} if kind == "qwen2" else {})
    base = make_model(folder.with_name(f"{folder.name}-base"), kind, seed, **changes)
    if kind == "qwen2":
        qwen().save_pretrained(base)  # of bytes, for which blanks count
    if case.get("ends"):  # as Qwen3-Embedding's: its own end is not the EOS, and it pads left
        content = json.loads((base / "tokenizer.json").read_text())
        content["post_processor"] = json.loads(
            processors.TemplateProcessing(single="$A w9", special_tokens=[("w9", 11)]).__getstate__()
        )
        (base / "tokenizer.json").write_text(json.dumps(content))
    torch.manual_seed(seed)
    more = dict(max_seq_length=case["length"]) if "length" in case else {}
    transformer = Transformer(str(base), do_lower_case=case.get("lower_case", False), **more)
    if case.get("ends"):
        transformer.tokenizer.padding_side = "left"
    modes = case.get("pooling", "mean")
    modules = [transformer, Pooling(32, modes, include_prompt=case.get("include_prompt", True))]
    width = 32 * (1 if isinstance(modes, str) else len(modes))
    for out, activation, bias in case.get("dense", []):
        function = getattr(torch.nn, activation)()
        modules.append(Dense(width, out, bias, function, use_residual=case.get("residual", False)))
        width = out
    modules += [Normalize()] if case.get("normalize", True) else []
    SentenceTransformer(modules=modules, prompts=case.get("prompts"), device="cpu").save_pretrained(str(folder))
    return theirs(folder)


def theirs(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def vectors_of(model, texts):
    """Of queries and documents, from a SentenceTransformer or an Embedder."""
    if isinstance(model, Embedder):
        return np.concatenate([model.encode_queries(texts), model.encode_documents(texts)])
    return np.concatenate([model.encode_query(texts), model.encode_document(texts)])


def assert_same(got, expected):
    one, other = got.astype(np.float64), expected.astype(np.float64)
    assert one.shape == other.shape
    norms = np.linalg.norm(one, axis=1), np.linalg.norm(other, axis=1)
    np.testing.assert_allclose(*norms, rtol=1e-4)
    cosines = (one * other).sum(1) / norms[0] / norms[1]
    assert cosines.min() >= 0.99999, cosines.round(5)


def ours(folder, **settings):
    return Embedder.from_pretrained(folder, dtype="float32", device="cpu", **settings)


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_those_of_sentence_transformers_and_stay_so_when_saved(name, tmp_path):
    kind, case = CASES[name]
    texts = texts_to_encode()
    expected = vectors_of(write_folder(tmp_path / "st", kind, case), texts)
    embedder = ours(tmp_path / "st", keep_weights=True)
    assert_same(vectors_of(embedder, texts), expected)
    embedder.encoder.requires_grad_(True)  # all of it was trained
    save_model(embedder.encoder, embedder.tokenizer, embedder.card, RunFolder(str(tmp_path / "run")), World.alone())
    assert_same(vectors_of(theirs(tmp_path / "run" / "model"), texts), expected)
    again = ours(tmp_path / "run")
    assert_same(vectors_of(again, texts), expected)
    assert again.card.origins["pooling"] == "ds_embed.json" and again.card.pooling == embedder.card.pooling
