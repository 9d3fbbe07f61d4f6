"""Decoders made bidirectional, exported where transformers' own code can be told so, as the comparison decides."""

import json
import runpy

import pytest
import torch
from tiny import REPOSITORY, make_model

from ds_embed import Embedder
from ds_embed.job.ranks import World
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.loading import find_model, load_encoder, load_tokenizer
from ds_embed.models.lora import add_lora
from ds_embed.settings import LoraArguments
from ds_embed.settings.errors import UserError
from ds_embed.training.run_folder import RunFolder
from ds_embed.training.save import save_model

TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15"]


def make_run(root, kind, lora=0, **changes):
    base = make_model(root / kind, kind, **changes)
    source = find_model(str(base))
    encoder = load_encoder(
        source, pooling="mean", bidirectional=True, bf16=False, attn_implementation=None, trust_remote_code=False
    )
    if lora:
        add_lora(encoder, LoraArguments(lora_rank=lora), seed=1, dtype=torch.float32)
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    card = EmbeddingCard(
        pooling="mean",
        query_prefix="find: ",
        doc_prefix="",
        query_max_length=16,
        doc_max_length=16,
        append_eos=True,
        base_model=str(base),
        consumed_samples=1,
        bidirectional=True,
    )
    run = root / f"run-{kind}"
    save_model(encoder, load_tokenizer(source, False), card, RunFolder(str(run)), World.alone())
    return run


def export(run, out, output_format="sentence-transformers"):
    main = runpy.run_path(str(REPOSITORY / "recipes" / "export.py"))["main"]
    main(["--run", str(run), "--output_dir", str(out), "--format", output_format])


@pytest.mark.parametrize(
    "kind, lora, said", [("llama", 4, {"is_causal": False}), ("gemma3_text", 0, {"use_bidirectional_attention": True})]
)
def test_config_says_it_and_sentence_transformers_gives_the_same_vectors(tmp_path, kind, lora, said):
    from sentence_transformers import SentenceTransformer

    run = make_run(tmp_path, kind, lora)
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said.items() <= config.items()
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs={"dtype": torch.float32})
    ours = Embedder.from_pretrained(run, dtype="float32", device="cpu").encode_queries(TEXTS)
    again = Embedder.from_pretrained(tmp_path / "out", dtype="float32", device="cpu").encode_queries(TEXTS)
    for theirs in (model.encode_query(TEXTS), again):
        assert (ours * theirs).sum(1).min() > 0.99999
    alone = model.encode_query(TEXTS[:1])
    assert (ours[:1] * alone).sum(1).min() > 0.99999


@pytest.mark.parametrize(
    "kind, lora, reason",
    [
        ("llama", 0, None),
        ("gemma3_text", 0, None),
        ("gemma3_text", 4, None),
        ("llama", 4, "an adapter can't record this; ds-embed export --format sentence-transformers writes"),
        ("mistral", 0, "its sliding window would be one token wider"),
    ],
)
def test_run_folder_says_it_too_where_it_can_be_said(tmp_path, caplog, kind, lora, reason):
    """RUN/model in sentence-transformers gives the run's vectors, or the end of training said that it does not."""
    from sentence_transformers import SentenceTransformer

    run = make_run(tmp_path, kind, lora)
    texts = [*TEXTS, " ".join(f"w{i}" for i in range(40))]
    embedder = Embedder.from_pretrained(run, dtype="float32", device="cpu")
    ours = embedder.encode_queries(texts)
    model = SentenceTransformer(str(run / "model"), device="cpu", model_kwargs={"dtype": torch.float32})
    cosines = (ours * model.encode_query(texts)).sum(1)
    said = [record.message for record in caplog.records if "only ds_embed loads" in record.message]
    if reason is None:
        assert cosines.min() > 0.99999 and not said
        # Its sentence-transformers files alone say as much.
        (run / "model" / "ds_embed.json").unlink()
        again = Embedder.from_pretrained(run / "model", dtype="float32", device="cpu")
        assert again.card.bidirectional and (again.encode_queries(texts) * ours).sum(1).min() > 0.99999
    else:
        assert cosines.min() < 0.99 and reason in said[0]


def test_what_can_not_be_said_is_refused(tmp_path):
    run = make_run(tmp_path, "llama", lora=4)
    with pytest.raises(UserError, match="--format adapter: this run attends in both .*; choose merged or sentence-"):
        export(run, tmp_path / "out", "adapter")
    # Its window is wider by one token in transformers, where a text is longer than that.
    run = make_run(tmp_path, "mistral")
    with pytest.raises(UserError, match="AutoModel gives other vectors than the run"):
        export(run, tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()
