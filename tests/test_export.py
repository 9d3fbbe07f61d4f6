"""Exports, the Embedder and the MTEB adapter, each against the .npy files of generate for the same run."""

import contextlib
import json
import random
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from test_tokenize import bert_tokenizer, byte_level_tokenizer, unigram_tokenizer
from tiny import REPOSITORY, launch, make_model, sentence
from tokenizers import AddedToken

from ds_embed import Embedder
from ds_embed.data.tokenize import TextFormat, encode_texts
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.loading import find_model, load_encoder, load_tokenizer
from ds_embed.models.lora import add_lora
from ds_embed.models.tokenizer import save_tokenizer, self_contained
from ds_embed.settings import EncodeArguments, LoraArguments, ModelArguments, TextArguments
from ds_embed.settings.errors import UserError
from ds_embed.tools.export.check import odd_tokens, spelled_texts
from ds_embed.training.run_folder import RunFolder
from ds_embed.training.save import save_model
from ds_embed.vectors.generate import generate

WORLD = World.alone()
POOLINGS = {"llama": ["last", "mean", "weighted_mean"], "bert": ["mean", "cls"]}
LENGTHS = {"llama": (12, 20), "bert": (16, 16)}  # of queries and documents, in tokens
CASES = [(kind, pooling) for kind, poolings in POOLINGS.items() for pooling in poolings]


def recipe(name, *flags):
    """Run a recipe's main() in this process: importing the libraries anew for each would take minutes."""
    main = runpy.run_path(str(REPOSITORY / "recipes" / f"{name}.py"))["main"]
    main([str(flag) for flag in flags])


def save_run(root, kind):
    """RUN/model as training leaves it: LoRA matrices that do something (llama) or a whole model (bert), in bfloat16."""
    base = make_model(root / kind, kind)
    source = find_model(str(base))
    encoder = load_encoder(
        source, pooling="mean", bidirectional=False, bf16=True, attn_implementation=None, trust_remote_code=False
    )
    lora = kind == "llama"
    if lora:
        add_lora(encoder, LoraArguments(lora_rank=4), seed=1, dtype=torch.bfloat16)
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    card = EmbeddingCard("mean", "find: ", "passage: ", *LENGTHS[kind], lora, base_model=str(base), consumed_samples=30)
    save_model(encoder, load_tokenizer(source, False), card, RunFolder(str(root / f"run-{kind}")), WORLD)
    return root / f"run-{kind}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Runs of both kinds, one for each pooling, files to encode, and what generate made of them in float32."""
    root = tmp_path_factory.mktemp("export")
    rng = random.Random(3)
    odd = ["w1", "  w2 w3 \n", "ünïcødé w4 文", "w5 " * 50, "w7 w8 w9 w10 w11 w12 w13 w14 w15 w16 w17 w18 w19"]
    drawn = [sentence(rng) for _ in range(25)], [sentence(rng, 1, 40) for _ in range(40)]
    texts = {"query": odd + drawn[0], "pos_doc": odd + drawn[1]}
    ids = {"query": "query_id", "pos_doc": "doc_id"}
    for key, values in texts.items():
        records = [{key: text, ids[key]: f"{key}{i}"} for i, text in enumerate(values)]
        if key == "query":
            records = [record | {"doc_id": f"pos_doc{i}"} for i, record in enumerate(records)]
        (root / f"{key}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    runs, vectors = {}, {}
    for kind in POOLINGS:
        first = save_run(root, kind)
        for pooling in POOLINGS[kind]:
            run = runs[kind, pooling] = root / f"{kind}-{pooling}"
            shutil.copytree(first, run)
            card = json.loads((run / "model" / "ds_embed.json").read_text()) | {"pooling": pooling}
            (run / "model" / "ds_embed.json").write_text(json.dumps(card))
            vectors[kind, pooling] = generated(root, run, root / f"OUT-{run.name}")
    return root, texts, runs, vectors


def generated(root, model, out, bf16=False, **flags):
    """Queries and documents as generate writes them, by default with no flag but the model's."""
    arguments = EncodeArguments(
        bf16=bf16,
        **flags,
        query_files=[str(root / "query.jsonl")],
        doc_files=[str(root / "pos_doc.jsonl")],
        output_prefix=str(out),
        cache_dir=str(root / "cache"),
    )
    folder = generate(WORLD, ModelArguments(str(model)), TextArguments(), arguments)
    assert folder.name == "consumed_samples30"
    return np.load(folder / "test_queries" / "query.npy"), np.load(folder / "test_docs" / "doc.npy")


def assert_same(got, expected, atol=3e-6):
    for one, other in zip(got, expected, strict=True):
        one, other = (np.asarray(rows, dtype=np.float64) for rows in (one, other))
        np.testing.assert_allclose(one, other, atol=atol)
        cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        assert cosines.min() >= 0.99999


def readme_functions(folder, heading):
    """Run the example under a heading of the exported README.md, where the folder is known by its name."""
    code = re.search(rf"{heading}:\n\n```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    with contextlib.chdir(folder.parent), contextlib.redirect_stdout(None):
        exec(code, names)
    return names


@pytest.mark.parametrize("kind, pooling", CASES)
def test_sentence_transformers_gives_the_vectors_of_generate(place, tmp_path, capsys, kind, pooling):
    root, texts, runs, vectors = place
    recipe("export", "--run", runs[kind, pooling], "--output_dir", tmp_path / "st")
    printed = capsys.readouterr().out
    assert "checked AutoModel in float32" in printed and "checked SentenceTransformer in float32" in printed
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tmp_path / "st"), device="cpu", model_kwargs={"dtype": torch.float32})
    expected = vectors[kind, pooling]
    assert_same((model.encode_query(texts["query"]), model.encode_document(texts["pos_doc"])), expected)
    assert (model.similarity_fn_name, model.prompts) == ("cosine", {"query": "find: ", "document": "passage: "})
    named = model.encode(texts["query"], prompt_name="query"), model.encode(texts["pos_doc"], prompt_name="document")
    if kind == "bert":
        assert_same(named, expected)
    else:  # two lengths: the one that no side names is the larger
        assert_same(named[1:], expected[1:])
        assert "encode_query cuts at 12 tokens and encode_document at 20" in printed
    if pooling == "weighted_mean":
        assert readme_functions(tmp_path / "st", "With sentence-transformers")["documents"].shape == (2, 32)
    assert_same(generated(root, tmp_path / "st", tmp_path / "OUT"), expected)  # the card is inside: no flag repeated


@pytest.mark.parametrize("kind, pooling", CASES)
def test_merged_model_and_its_readme(place, tmp_path, capsys, kind, pooling):
    root, texts, runs, vectors = place
    recipe("export", "--run", runs[kind, pooling] / "model", "--format", "merged", "--output_dir", tmp_path / "whole")
    expected = vectors[kind, pooling]
    assert_same(generated(root, tmp_path / "whole", tmp_path / "OUT"), expected)
    assert ("checked merging in float32" in capsys.readouterr().out) == (kind == "llama")
    code = readme_functions(tmp_path / "whole", "With transformers alone")
    lengths = LENGTHS[kind]
    model = code["model"].float()
    assert not [name for name, _ in model.named_modules() if "lora" in name or name == "pooler"]
    query = code["encode"](texts["query"], "find: ", lengths[0])
    document = code["encode"](texts["pos_doc"], "passage: ", lengths[1])
    assert_same((query, document), expected)
    # The lengths and prefixes that the page itself names, in its bfloat16.
    for rows, example, prefix, length in (
        (code["queries"], ["a question"], "find: ", lengths[0]),
        (code["documents"], ["a text", "another text"], "passage: ", lengths[1]),
    ):
        np.testing.assert_allclose(rows, code["encode"](example, prefix, length), atol=5e-2)


def test_adapter_and_its_readme(place, tmp_path, capsys):
    _, texts, runs, vectors = place
    recipe("export", "--run", runs["llama", "last"], "--format", "adapter", "--output_dir", tmp_path / "lora")
    assert "checked PeftModel in float32" in capsys.readouterr().out
    code = readme_functions(tmp_path / "lora", "With transformers alone")
    got = code["encode"](texts["query"], "find: ", 12), code["encode"](texts["pos_doc"], "passage: ", 20)
    assert type(code["model"]).__name__.startswith("PeftModel")
    assert_same(got, vectors["llama", "last"])


def test_rounded_weights_are_told_apart(place, tmp_path, capsys):
    """A merge stored in 16 bits: the library is held to the stored weights, the rounding is printed."""
    _, _, runs, vectors = place
    recipe(
        "export",
        "--run",
        runs["llama", "mean"],
        "--format",
        "merged",
        "--dtype",
        "bfloat16",
        "--output_dir",
        tmp_path / "rounded",
    )
    printed = capsys.readouterr().out
    assert "checked weights rounded to bfloat16: smallest cosine 0.99" in printed and "checked AutoModel" in printed
    from safetensors.torch import load_file

    weights = load_file(tmp_path / "rounded" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_embedder_gives_the_bits_of_generate(place, kind):
    _, texts, runs, vectors = place
    embedder = Embedder.from_pretrained(runs[kind, "mean"], dtype="float32", device="cpu")
    got = embedder.encode_queries(texts["query"]), embedder.encode_documents(texts["pos_doc"], progress=True)
    assert embedder.dimensions == 32 and got[0].dtype == np.float32
    assert all(np.array_equal(one, other) for one, other in zip(got, vectors[kind, "mean"], strict=True))
    finer = Embedder(embedder.encoder, embedder.tokenizer, embedder.card, micro_batch_tokens=20, truncate_dim=8)
    cut = vectors[kind, "mean"][0][:, :8]
    expected = cut / np.linalg.norm(cut, axis=1, keepdims=True)
    np.testing.assert_allclose(finer.encode_queries(texts["query"]), expected, atol=2e-6)
    assert finer.dimensions == 8 and finer.encode_documents([]).shape == (0, 8)
    with pytest.raises(ValueError, match="one string was given; give a list of queries"):
        embedder.encode_queries("w1")
    with pytest.raises(ValueError, match="text 1 of the documents is nan, expected a string"):
        embedder.encode_documents(["w1", float("nan")])
    with pytest.raises(ValueError, match="truncate_dim 33: the model has vectors of 32 dimensions"):
        Embedder(embedder.encoder, embedder.tokenizer, embedder.card, truncate_dim=33)


def test_mteb_measures_what_evaluate_measures(place):
    root, texts, runs, _ = place
    import mteb
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    from ds_embed.mteb_model import MTEBModel

    class Local(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Local",
            description="files of this test",
            type="Retrieval",
            main_score="ndcg_at_10",
            dataset={"path": "none", "revision": "none"},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
        )

        def load_data(self, **unused):
            def table(key):
                return Dataset.from_list([{"id": f"{key}{i}", "text": text} for i, text in enumerate(texts[key])])

            right = {f"query{i}": {f"pos_doc{i}": 1} for i in range(len(texts["query"]))}
            parts = {"queries": table("query"), "corpus": table("pos_doc"), "relevant_docs": right, "top_ranked": None}
            self.dataset = {"default": {"test": parts}}
            self.data_loaded = True

    model = MTEBModel(str(runs["llama", "last"]), dtype="float32", device="cpu")
    result = mteb.evaluate(model, Local(), cache=None, show_progress_bar=False, co2_tracker=False)
    folder = root / "OUT-llama-last" / "consumed_samples30"
    recipe("evaluate", "--embeddings", folder, "--query_files", root / "query.jsonl", "--output_dir", root / "results")
    ours = json.loads((root / "results" / "metrics.json").read_text())
    theirs = result.task_results[0].scores["test"][0]
    assert 0 < ours["nDCG@10"] < 1
    for name, key in (("nDCG@10", "ndcg_at_10"), ("RR@10", "mrr_at_10"), ("R@100", "recall_at_100")):
        assert theirs[key] == pytest.approx(ours[name], abs=1e-5)
    assert model.mteb_model_meta.name == "ds_embed/llama-last"
    other = MTEBModel(str(runs["llama", "mean"]), dtype="float32", device="cpu")
    assert other.mteb_model_meta.revision != model.mteb_model_meta.revision  # the key of mteb's cache


@pytest.mark.parametrize(
    "tokenizer, append_eos",
    [
        (byte_level_tokenizer(), True),
        (byte_level_tokenizer("<s> $A"), True),
        (byte_level_tokenizer("<s> $A </s>", pad_token=None), True),
        (bert_tokenizer(), False),
        (unigram_tokenizer(), True),
    ],
)
def test_exported_tokenizer_does_by_itself_what_ours_does(tmp_path, tokenizer, append_eos):
    """Blanks, truncation before EOS, right padding, and spelled-out control tokens, after a round trip over the disk."""
    from transformers import AutoTokenizer

    texts = ["a", "  the lake is cold \n", "a</s> [SEP] <s>b", "the water of the lake is cold, " * 3]
    if "▁" in tokenizer.get_vocab():
        texts.remove("a</s> [SEP] <s>b")  # in the vocabulary itself, from where ds_embed drops it
    card = EmbeddingCard("last", "a: ", "", 12, 12, append_eos, "x", 0)
    save_tokenizer(self_contained(tokenizer, card), tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.padding_side, loaded.model_max_length) == ("right", 12)
    expected = [ids.tolist() for ids in encode_texts(tokenizer, texts, TextFormat("a: ", 12, append_eos))]
    batch = loaded(["a: " + text for text in texts], padding=True, truncation=True)
    assert list(batch) == ["input_ids", "attention_mask"]
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], expected, strict=True):
        assert mask == [1] * len(row) + [0] * (len(ids) - len(row)) and ids[: len(row)] == row
    assert len(expected[-1]) == 12 == len(batch["input_ids"][-1])


def test_spelled_tokens_that_differ_are_found():
    """An added token that is no control token splits a text, and blanks around the pieces are stripped: a note says so."""
    tokenizer = byte_level_tokenizer()
    card = EmbeddingCard("last", "", "", 12, 12, append_eos=True, base_model="x", consumed_samples=1)

    def odd():
        exported = self_contained(tokenizer, card)
        return set(odd_tokens(tokenizer, exported, card, ["a b", *spelled_texts(tokenizer)]))

    assert odd() == set()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    assert odd() == {"a <tool> b<tool>c"}


def test_what_can_not_be_exported_leaves_nothing(place, tmp_path, monkeypatch):
    root, _, runs, _ = place
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    for name in ("manifest.json", "state.json"):
        (checkpoint / name).touch()
    behind = shutil.copytree(runs["bert", "mean"] / "model", tmp_path / "behind")
    (behind / "ds_embed.json").write_text((behind / "ds_embed.json").read_text().replace("find: ", "find: {text} ?"))
    target = tmp_path / "out"
    for run, flags, message in [
        (runs["bert", "mean"], ["--format", "adapter"], "--format adapter: .* was trained with all weights"),
        (checkpoint, [], "step_00000002: manifest.json can't be read as JSON; take another step"),
        (tmp_path / "run", ["--step", 3], "--step 3: --run .* has no checkpoint of that step; --step can be 2"),
        (tmp_path / "run", [], "--run .*: a run that has not finished"),
        (behind, [], "--format sentence-transformers: this run's prefix 'find: {text} .' goes on behind the text"),
        (root / "bert", [], "--run .*: has no ds_embed.json"),
        (runs["llama", "last"], ["--output_dir", root], "--output_dir .*: exists and is not empty"),
        (runs["llama", "last"], ["--format", "adapter", "--dtype", "float16"], "--dtype float16: an adapter is copied"),
        (runs["llama", "last"], ["--format", "onnx"], "--format onnx: choose one of adapter, merged"),
    ]:
        flags = flags if "--output_dir" in flags else [*flags, "--output_dir", target]
        with pytest.raises(ValueError, match=message):
            recipe("export", "--run", run, *flags)

    # Merged weights beyond the range of float16: what is on disk is not the run any more.
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(runs["llama", "last"] / "model", broken)
    weights = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in weights if "down_proj.lora_B" in name)
    weights[name] = weights[name] * 1e6
    save_file(weights, broken / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="weights in float16 .* gives other vectors than the run .*nothing was written"
    ):
        recipe("export", "--run", broken, "--format", "merged", "--dtype", "float16", "--output_dir", target)

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    with pytest.raises(ValueError, match="the package sentence-transformers is not installed; pip install"):
        recipe("export", "--run", runs["llama", "last"], "--output_dir", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["behind", "broken", "run"]


def test_a_mistake_is_one_line(tmp_path):
    result = launch(0, "recipes/export.py", "--run", tmp_path, "--output_dir", tmp_path / "out")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith(f"error: --run {tmp_path}: no config.json in this folder")


@pytest.mark.parametrize("bf16", [False, True])
def test_generate_and_embedder_merge_the_adapter(place, tmp_path, caplog, bf16):
    """--merge_adapter gives the vectors of the exported merged model, bit for bit, and says what merging costs."""
    root, texts, runs, vectors = place
    caplog.set_level("INFO")
    run = runs["llama", "last"]
    dtype = "bfloat16" if bf16 else "float32"
    recipe("export", "--run", run, "--format", "merged", "--dtype", dtype, "--output_dir", tmp_path / "merged")
    plain, merged = (
        generated(root, model, tmp_path / name, bf16, **options)
        for name, model, options in (("of_export", tmp_path / "merged", {}), ("of_run", run, {"merge_adapter": True}))
    )
    for one, other in zip(plain, merged, strict=True):
        assert np.array_equal(one, other)
    found = re.search(rf"computed in {dtype}: the smallest cosine .* is (\d\.\d+)", caplog.text)
    cosine = float(found[1])
    assert 0.99 < cosine < 0.99999 if bf16 else cosine > 0.99999
    if not bf16:
        assert_same(merged, vectors["llama", "last"])
    embedder = Embedder.from_pretrained(run, dtype=dtype, merge_adapter=True, device="cpu")
    assert np.array_equal(embedder.encode_queries(texts["query"]), merged[0])
    assert embedder.merging_cosine == pytest.approx(cosine, abs=1e-6)
    with pytest.raises(UserError, match="merge_adapter was True and is False"):
        generated(root, run, tmp_path / "of_run", bf16)


def test_what_has_no_adapter_is_not_merged(place):
    _, _, runs, _ = place
    with pytest.raises(UserError, match="--merge_adapter true: .* has no LoRA adapter; leave the flag out"):
        Embedder.from_pretrained(runs["bert", "cls"], merge_adapter=True)
    with pytest.raises(UserError, match="would round the adapter to 4 bits.*leave out --load_in_4bit nf4"):
        Embedder.from_pretrained(runs["llama", "last"], merge_adapter=True, load_in_4bit="nf4")
    with pytest.raises(UserError, match="under ZeRO-3 no rank holds a whole weight; leave out --deepspeed"):
        generated(place[0], runs["llama", "last"], place[0] / "no", deepspeed="zero3", merge_adapter=True)
