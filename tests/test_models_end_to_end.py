"""Each kind of model that is bidirectional by itself, and DPR: trained, encoded from its run, opened by others."""

import json

import numpy as np
import pytest
from test_bidirectional_models import OWN_CODE
from tiny import _BERT, check, launch, load_recipe, make_model, make_tokenizer, make_training_file

from ds_embed import Embedder
from ds_embed.job.ranks import World
from ds_embed.settings.errors import UserError
from ds_embed.vectors.vectors import read_vectors

KINDS = ("T5", "UMT5", "own code", "ministral3", "gemma3-encoding", "embedding_gemma2", "dpr")
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13"]
LORA = ("ministral3", "gemma3-encoding", "own code")


def make(root, kind):
    if kind == "dpr":
        import torch
        from transformers import DPRConfig, DPRQuestionEncoder

        torch.manual_seed(0)
        DPRQuestionEncoder(DPRConfig(**_BERT, initializer_range=0.3)).save_pretrained(root / kind)
        make_tokenizer(root / kind, bert=True)
        return root / kind
    folder = make_model(root / kind, "llama" if kind == "own code" else kind)
    if kind == "own code":
        (folder / "bidirec.py").write_text(OWN_CODE)
        config = json.loads((folder / "config.json").read_text())
        names = {"AutoConfig": "bidirec.BidirecConfig", "AutoModel": "bidirec.BidirecModel"}
        config |= {"auto_map": names, "model_type": "llama_bidirec", "architectures": ["BidirecModel"]}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("end_to_end")
    make_training_file(root / "train.jsonl", 16, num_negatives=1)
    cases = []
    for kind in KINDS:
        make(root, kind)
        for rank in (0, 2) if kind in LORA else (0,):
            flags = {
                "model_name_or_path": root / kind,
                "train_files": root / "train.jsonl",
                "output_dir": root / f"{kind}-{rank}",
                "cache_dir": root / "cache",
                "deepspeed": "ds_configs/zero2.json",
                "max_length": 32,
                "global_batch_size": 8,
                "micro_batch_tokens": 200,
                "max_steps": 2,
                "warmup_steps": 0,
                "learning_rate": 1e-2,
                "bf16": "false",
                "lora_rank": rank,
                "report_to": "none",
                "trust_remote_code": str(kind == "own code").lower(),
            }
            cases.append({"flags": [str(word) for name, value in flags.items() for word in (f"--{name}", value)]})
    (root / "cases.json").write_text(json.dumps(cases))
    check(launch(0, "tests/workers/validation.py", root / "cases.json"))
    return root


def runs(place, kind):
    return [place / f"{kind}-{rank}" for rank in (0, 2) if (place / f"{kind}-{rank}").exists()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_gives_the_same_vectors_to_all(place, kind, tmp_path, monkeypatch):
    trusts = kind == "own code"
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps({"query": text, "query_id": f"{n}"}) + "\n" for n, text in enumerate(TEXTS))
    )
    recipe = load_recipe("generate")
    monkeypatch.setattr(recipe, "initialize", World.alone)
    options = dict(dtype="float32", device="cpu", trust_remote_code=trusts)
    before = Embedder.from_pretrained(str(place / kind), max_length=32, **options).encode_queries(TEXTS)
    for run in runs(place, kind):
        embedder = Embedder.from_pretrained(str(run), **options)
        assert embedder.card.bidirectional and embedder.card.pooling == ("cls" if kind == "dpr" else "mean")
        vectors = embedder.encode_queries(TEXTS)
        assert ((vectors * before).sum(1) < 1 - 1e-5).all()  # it was trained
        flags = {"model_name_or_path": run, "query_files": tmp_path / "q.jsonl", "output_prefix": tmp_path / run.name}
        flags |= {"cache_dir": tmp_path / "cache", "bf16": "false", "trust_remote_code": str(trusts).lower()}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        monkeypatch.setattr("sys.argv", ["generate.py", *words])
        recipe.main()
        written = read_vectors(next((tmp_path / run.name).iterdir()), "query")
        order = [list(written.ids).index(f"{n}") for n in range(len(TEXTS))]
        np.testing.assert_allclose(np.asarray(written.rows)[order], vectors, atol=2e-6)

        from sentence_transformers import SentenceTransformer

        other = SentenceTransformer(str(run / "model"), device="cpu", trust_remote_code=trusts)
        other = other.encode_query(TEXTS, normalize_embeddings=True)
        assert (other * vectors).sum(1).min() > 0.99999


def refuse(recipe_name, model, words, tmp_path, monkeypatch, **flags):
    recipe = load_recipe(recipe_name)
    monkeypatch.setattr(recipe, "initialize", World.alone)
    (tmp_path / "broken.jsonl").write_text("not a record\n")  # never read here
    flags = {
        "model_name_or_path": model,
        "train_files": tmp_path / "broken.jsonl",
        "output_dir": tmp_path / "run",
        "cache_dir": tmp_path / "cache",
        "deepspeed": "ds_configs/zero2.json",
    } | flags
    with pytest.raises(UserError, match=words) as error:
        recipe.main([str(word) for name, value in flags.items() for word in (f"--{name}", *str(value).split())])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ("gemma3-encoding", "T5"))
def test_modules_that_are_not_there_are_refused_before_anything_is_read(place, kind, tmp_path, monkeypatch):
    words = "--lora_target_modules query_key_value: no module of .*linear modules of this model: .*"
    flags = {
        "lora_rank": 2,
        "lora_target_modules": f"{'v' if kind == 'T5' else 'v_proj'} query_key_value",
    }  # PEFT says nothing of one that is missing beside others
    refuse("train_bert", place / kind, words, tmp_path, monkeypatch, **flags)


def test_wrappers_of_several_modalities_are_refused_and_their_text_model_is_not(tmp_path, monkeypatch):
    from transformers import AutoModel, Gemma3Config, Gemma3Model, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    sight = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28
    )
    tokens = dict(image_token_index=97, boi_token_index=98, eoi_token_index=99)
    config = Gemma3Config(text_config=text.to_dict(), vision_config=sight.to_dict(), mm_tokens_per_image=4, **tokens)
    Gemma3Model(config).save_pretrained(tmp_path / "gemma3")
    words = r"gemma3: a gemma3 has a text model among others; .*language_model.save_pretrained\(FOLDER\)"
    refuse("train_gpt", tmp_path / "gemma3", words, tmp_path, monkeypatch)
    AutoModel.from_pretrained(tmp_path / "gemma3").language_model.save_pretrained(tmp_path / "text")
    make_tokenizer(tmp_path / "text", bert=False)
    assert np.isfinite(Embedder.from_pretrained(str(tmp_path / "text"), device="cpu").encode_queries(TEXTS)).all()
