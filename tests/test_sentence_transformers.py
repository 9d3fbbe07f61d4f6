"""Folders that sentence-transformers itself wrote: read, trained and saved, each against its own vectors."""

import dataclasses
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
from test_tokenizer_kinds import qwen
from tiny import DECODERS, ENCODING_DECODERS, check, launch, make_model, make_training_file, sentence
from tokenizers import processors

from ds_embed import Embedder
from ds_embed.job.ranks import World
from ds_embed.models.loading import choose_card, find_model
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.errors import UserError
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
    "T5 as sentence-t5": ("T5", dict(dense=[(24, "Identity", False)], prompts=PROMPTS, length=16)),
    "T5 prompt left out": ("T5", dict(pooling=("max", "mean"), prompts=PROMPTS, include_prompt=False)),
    "MT5": ("MT5", dict(pooling="mean_sqrt_len_tokens", normalize=False)),
    "UMT5": ("UMT5", dict(pooling="cls")),
    "llama": ("llama", dict(pooling="lasttoken", prompts=PROMPTS)),
    "llama weighted": ("llama", dict(pooling="weightedmean", prompts=PROMPTS, include_prompt=False, length=16)),
    "llama bidirectional": ("llama", dict(changes=dict(is_causal=False), prompts=PROMPTS)),
    "mistral": ("mistral", dict(pooling="lasttoken", prompts=PROMPTS, length=14)),
    "qwen2": ("qwen2", dict(pooling="lasttoken", normalize=False)),
    "qwen2 bidirectional": ("qwen2", dict(changes=dict(is_causal=False, layer_types=["full_attention"] * 2))),
    "qwen3": ("qwen3", dict(pooling="lasttoken", prompts=PROMPTS, ends=True)),
    "qwen3 Dense": ("qwen3", dict(LEARNED, pooling="lasttoken", prompts=PROMPTS, ends=True, length=12)),
    "mistral bidirectional": ("mistral-encoding", dict(prompts=PROMPTS, pooling=("cls", "mean"))),
    "ministral3 bidirectional": ("ministral3", dict(LEARNED, prompts=PROMPTS, include_prompt=False)),
    "gemma3_text bidirectional": ("gemma3-encoding", dict(prompts=PROMPTS)),
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


def edit(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes if isinstance(content, dict) else changes["modules"]))


@pytest.fixture(scope="module")
def bge(tmp_path_factory):
    """A folder with cls pooling, prompts and a length; its own vectors."""
    folder = tmp_path_factory.mktemp("bge") / "bge"
    return folder, vectors_of(write_folder(folder, *CASES["bert cls"]), texts_to_encode())


@pytest.mark.parametrize(
    "prompts, default, expected",
    [
        ({"query": "q ", "document": "d "}, None, ("q ", "d ")),
        ({"query": "q ", "passage": "p "}, None, ("q ", "p ")),
        ({"Query": "q ", "PASSAGE": "p "}, None, ("q ", "p ")),
        ({"query": "q ", "document": "", "passage": "p "}, None, ("q ", "")),  # as encode_document has it
        ({"find": "f "}, "find", ("f ", "f ")),
        ({"find": "f "}, None, ("", "")),
        ({}, None, ("", "")),
    ],
)
def test_prompts_are_prefixes_and_none_is_invented(bge, tmp_path, prompts, default, expected):
    folder = shutil.copytree(bge[0], tmp_path / "st")
    edit(folder / "config_sentence_transformers.json", prompts=prompts, default_prompt_name=default)
    card = choose_card(find_model(str(folder)), TextArguments(), ModelArguments(str(folder)))
    assert (card.query_prefix, card.doc_prefix) == expected
    assert card.origins["query_prefix"] == "its sentence-transformers files"
    settings = TextArguments(query_prefix="x ", max_length=9)
    card = choose_card(find_model(str(folder)), settings, ModelArguments(str(folder), pooling="max"))
    assert (card.query_prefix, card.doc_prefix, card.pooling, card.doc_max_length) == ("x ", expected[1], "max", 9)
    assert {name: card.origins[name] for name in ("query_prefix", "pooling")} == {
        "query_prefix": "flag",
        "pooling": "flag",
    }


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "dense"
    write_folder(folder, "bert", LEARNED)
    return folder


def test_what_was_taken_is_said(bge):
    embedder = ours(bge[0])
    lines = "\n".join(embedder.card.describe(embedder.tokenizer))
    for part in ("cls (its sentence-transformers", '"w1 query: " (its', "at most 12 tokens (its", "[SEP] (tokenizer)"):
        assert part in lines
    more = dataclasses.replace(embedder.card, prompts={"clustering": "sort: ", "sts": ""})
    assert any("clustering, sts: kept for other" in line for line in more.describe(embedder.tokenizer))
    assert "kept for other" not in lines


@pytest.mark.parametrize(
    "kind, message",
    [
        ("sentence_transformers.models.CNN", "has the module sentence_transformers.models.CNN, which can't be applied"),
        ("evil.Pooling", "has the module evil.Pooling"),
        ("os.system", "has the module os.system"),
    ],
)
def test_modules_that_can_not_be_applied_are_refused_by_name_and_never_imported(bge, tmp_path, kind, message):
    folder = shutil.copytree(bge[0], tmp_path / "st")
    (folder / "evil.py").write_text("open(__file__ + '.ran', 'w')")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = kind
    edit(folder / "modules.json", modules=modules)
    with pytest.raises(ValueError, match=message):
        ours(folder)
    assert not (folder / "evil.py.ran").exists()
    modules[1] |= {"type": "sentence_transformers.models.Pooling", "path": "../bge/1_Pooling"}
    edit(folder / "modules.json", modules=modules)
    with pytest.raises(ValueError, match="which leads out of the folder"):
        ours(folder)


SENTENCE, GENERAL = "sentence_bert_config.json", "config_sentence_transformers.json"
NEIGHBOURS = {
    "a pooling of the future": (
        "1_Pooling/config.json",
        dict(pooling_mode_attention=True),
        "pooling_mode_attention true",
    ),
    "no pooling config": ("1_Pooling/config.json", None, "1_Pooling/config.json is missing"),
    "an unknown activation": ("2_Dense/config.json", dict(activation_function=None), "activation_function 'None'"),
    "no weights of a Dense": ("2_Dense/model.safetensors", None, "2_Dense has no weights"),
    "a key of the future": (SENTENCE, dict(window=3), "sentence_bert_config.json: window 3 can't be applied"),
    "prompts without names": (GENERAL, dict(prompts=["w3 "]), "must be texts by name"),
    "a default that is no prompt": (GENERAL, dict(default_prompt_name="x"), 'default_prompt_name "x" is not among'),
    "a prompt with a place": (GENERAL, dict(prompts={"query": "a {text} b"}), "has a {text}"),
    "another form of modules": ("modules.json", dict(modules={"a": 1}), "not in the form of sentence-transformers"),
    "modules that are names": ("modules.json", dict(modules=["a"]), "not in the form of sentence-transformers"),
    "no weights": ("model.safetensors", None, "no file named model.safetensors"),
    "a length in words": (SENTENCE, dict(max_seq_length="12"), 'max_seq_length "12" must be a int'),
    "a size in words": ("2_Dense/config.json", dict(in_features="32"), 'in_features "32" must be a int'),
    "a pooling that is a number": ("1_Pooling/config.json", dict(pooling_mode=3), "pooling_mode 3: known are cls"),
    "no pooling at all": ("1_Pooling/config.json", dict(pooling_mode=[]), "pooling_mode []: known are cls"),
    "a tokenizer that is none": (
        "tokenizer.json",
        "{}",
        "its tokenizer can't be loaded; is its tokenizer.json there?: ",
    ),
    "a card that is no JSON": ("ds_embed.json", "no", "ds_embed.json: is not JSON"),
    "a choice in words": ("1_Pooling/config.json", dict(include_prompt="no"), 'include_prompt "no" must be a bool'),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_what_can_not_be_followed_is_one_line_and_not_a_guess(dense, tmp_path, name):
    folder = shutil.copytree(dense, tmp_path / "st")
    file, changes, message = NEIGHBOURS[name]
    if changes is None:
        (folder / file).unlink()
    elif isinstance(changes, str):
        (folder / file).write_text(changes)
    else:
        edit(folder / file, **changes)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        ours(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["tokenizer_args", "processor_kwargs"])
def test_a_length_among_the_arguments_of_the_tokenizer_is_a_length(dense, tmp_path, key):
    folder = shutil.copytree(dense, tmp_path / "st")
    edit(folder / SENTENCE, **{key: {"model_max_length": 5}}, max_seq_length=9)
    assert ours(folder).card.doc_max_length == 5
    assert_same(vectors_of(ours(folder), texts_to_encode()), vectors_of(theirs(folder), texts_to_encode()))


@pytest.mark.parametrize(
    "name, value", [("doc_max_length", "12"), ("pooling", "middle"), ("strip", None), ("head", {})]
)
def test_a_card_that_was_edited_wrongly_is_one_line(bge, tmp_path, name, value):
    folder = shutil.copytree(bge[0], tmp_path / "st")
    ours(folder).card.save(folder)
    edit(folder / "ds_embed.json", **{name: value})
    with pytest.raises(UserError, match=f"ds_embed.json: {name} ") as error:
        ours(folder)
    assert "\n" not in str(error.value)


def test_outputs_without_names_are_outputs(bge, tmp_path):
    folder = shutil.copytree(bge[0], tmp_path / "st")
    edit(folder / "config.json", return_dict=False)
    assert_same(vectors_of(ours(folder), texts_to_encode()), bge[1])


def test_a_model_without_a_limit_says_minus_one(bge, tmp_path):
    """XLNet's max_position_embeddings."""
    from transformers import XLNetConfig, XLNetModel

    folder = shutil.copytree(bge[0], tmp_path / "st")
    XLNetModel(XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=48)).save_pretrained(folder)
    edit(folder / SENTENCE, max_seq_length=None)
    edit(folder / "tokenizer_config.json", model_max_length=None)
    assert ours(folder).card.doc_max_length == 512
    edit(folder / "tokenizer_config.json", model_max_length=40)
    assert ours(folder).card.doc_max_length == 40


@pytest.mark.parametrize("card", [False, True])
def test_prompts_of_an_adapter_are_put_over_what_its_base_says(bge, tmp_path, card):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    base = shutil.copytree(bge[0], tmp_path / "base")
    if card:
        ours(base).card.save(base)
    lora = LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION", init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(base), lora).save_pretrained(tmp_path / "adapter")
    found = ours(tmp_path / "adapter").card
    assert (found.pooling, found.doc_max_length, found.query_prefix) == ("cls", 12, PROMPTS["query"])
    (tmp_path / "adapter" / GENERAL).write_text(json.dumps({"prompts": {"query": "w9 ", "sts": "w8 "}}))
    found = ours(tmp_path / "adapter").card
    assert (found.pooling, found.doc_max_length, found.strip, found.head) == ("cls", 12, False, [{"type": "Normalize"}])
    assert (found.query_prefix, found.doc_prefix, found.prompts) == ("w9 ", "", {"sts": "w8 "})
    (tmp_path / "adapter" / GENERAL).write_text(json.dumps({"prompts": {}}))
    assert ours(tmp_path / "adapter").card.query_prefix == PROMPTS["query"]


def test_the_layout_of_the_first_versions(bge, tmp_path):
    folder, expected = bge
    old = tmp_path / "old"
    shutil.copytree(
        folder, old / "0_Transformer", ignore=shutil.ignore_patterns("modules.json", "config_s*", "1_*", "2_*")
    )
    for name in ("1_Pooling", "2_Normalize"):
        shutil.copytree(folder / name, old / name)
    shutil.copy(folder / "config_sentence_transformers.json", old)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (old / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (old / "0_Transformer" / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12}))
    names = [("0_Transformer", "BERT"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(names)
    ]
    (old / "modules.json").write_text(json.dumps(modules))
    assert_same(vectors_of(ours(old), texts_to_encode()), expected)


def test_hub_names_are_read_as_folders_are(bge, tmp_path):
    """A local cache stands for the hub: a revision that pools by mean beside main, and an adapter without a card."""
    folder, expected = bge
    repository = tmp_path / "hub" / "models--me--model"
    for name, commit in (("main", "a" * 40), ("old", "b" * 40)):
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    edit(repository / "snapshots" / ("b" * 40) / "1_Pooling" / "config.json", pooling_mode="mean")
    script = tmp_path / "script.py"
    script.write_text(
        "import json, numpy as np\nfrom ds_embed import Embedder\n"
        "one, old = (Embedder.from_pretrained('me/model', revision=r, dtype='float32', device='cpu') for r in (None, 'old'))\n"
        f"texts = json.loads({json.dumps(json.dumps(texts_to_encode()))})\n"
        f"np.save({str(tmp_path / 'v.npy')!r}, np.concatenate([one.encode_queries(texts), one.encode_documents(texts)]))\n"
        "print(one.card.pooling, old.card.pooling, one.card.query_prefix)\n"
    )
    result = check(launch(0, script, environment={"HF_HUB_CACHE": str(tmp_path / "hub")}, fork=False))
    assert result.stdout.strip().endswith("cls mean w1 query:")
    assert_same(np.load(tmp_path / "v.npy"), expected)


TRAINED = ("bert cls", "bert two Dense", "roberta", "mpnet prompt left out", "modernbert prompt left out")
TRAINED += ("distilbert", "T5 as sentence-t5", "llama weighted", "qwen2", "qwen3 Dense", "gemma3_text bidirectional")
TRAINED += ("llama lora",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three steps with the recipe on each folder, all by one process."""
    root = tmp_path_factory.mktemp("trained")
    make_training_file(root / "a.jsonl", 48, 1)
    jobs = []
    for number, name in enumerate(TRAINED):
        lora = name == "llama lora"
        kind, case = ("llama", dict(LEARNED, pooling="lasttoken", prompts=PROMPTS)) if lora else CASES[name]
        write_folder(root / name / "st", kind, case)
        flags = ["--deepspeed", f"ds_configs/zero{2 * (number % 2)}.json", "--train_files", root / "a.jsonl"]
        flags += ["--max_steps", "3", "--global_batch_size", "8", "--micro_batch_tokens", "256", "--bf16", "false"]
        flags += ["--model_name_or_path", root / name / "st", "--output_dir", root / name / "run"]
        flags += ["--learning_rate", "1e-2", "--lora_rank", "4" if lora else "0", "--hard_negatives", "1"]
        flags += ["--cache_dir", root / "cache"]
        is_decoder = kind in DECODERS | ENCODING_DECODERS
        jobs.append((f"train_{'gpt' if is_decoder else 'bert'}", [str(flag) for flag in flags]))
    (root / "jobs.json").write_text(json.dumps(jobs))
    check(launch(1, "tests/workers/train_many.py", root / "jobs.json"))
    return root


@pytest.mark.parametrize("name", TRAINED)
def test_trained_folders_are_opened_again_by_sentence_transformers(name, trained):
    """With LoRA, RUN/model is an adapter, and its Dense layer was trained whole."""
    run, texts = trained / name / "run", texts_to_encode()
    vectors = vectors_of(ours(run), texts)
    assert_same(vectors_of(theirs(run / "model"), texts), vectors)
    assert np.abs(vectors - vectors_of(ours(trained / name / "st"), texts)).max() > 1e-2
    assert (run / "model" / "adapter_config.json").exists() == (name == "llama lora")
