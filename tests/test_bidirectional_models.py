"""Models that are bidirectional by themselves, whatever they are called: found by trying, and exact text by text."""

import json

import numpy as np
import pytest
import torch
from tiny import ENCODING_DECODERS, T5_ENCODERS, make_model, make_tokenizer

from ds_embed import Embedder
from ds_embed.models.kinds import auto_class, kind_of
from ds_embed.models.loading import choose_card, find_model, load_config, load_encoder
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.errors import UserError

KINDS = (*ENCODING_DECODERS, *T5_ENCODERS)
OWN_CODE = """
from transformers import LlamaConfig, LlamaModel
from transformers.masking_utils import create_bidirectional_mask


class BidirecConfig(LlamaConfig):
    model_type = "llama_bidirec"


class BidirecModel(LlamaModel):
    config_class = BidirecConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.is_causal = False

    def forward(self, input_ids, attention_mask, **more):  # no mask, no states
        assert attention_mask is not None
        seen = (1.0 - attention_mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min
        return super().forward(input_ids=input_ids, attention_mask=seen, **more)


import torch
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bidirectional")
    found = {kind: make_model(root / kind, kind) for kind in KINDS}
    found["own code"] = make_model(root / "own", "llama")
    (root / "own" / "bidirec.py").write_text(OWN_CODE)
    config = json.loads((root / "own" / "config.json").read_text())
    names = {"AutoConfig": "bidirec.BidirecConfig", "AutoModel": "bidirec.BidirecModel"}
    config |= {"auto_map": names, "model_type": "llama_bidirec", "architectures": ["BidirecModel"]}
    (root / "own" / "config.json").write_text(json.dumps(config))
    return found


def choose(folder, **settings):
    model = ModelArguments("unused", trust_remote_code=True, **settings)
    return choose_card(find_model(str(folder)), TextArguments(), model)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", (*KINDS, "own code"))
def test_padded_batch_equals_each_text_alone(folders, kind, kernel):
    """The reference is the model's own code in float64, with a mask of ones."""
    source = find_model(str(folders[kind]))
    card = choose(folders[kind])
    assert card.pooling == "mean" and card.bidirectional and not card.append_eos
    encoder = load_encoder(
        source, pooling="mean", bidirectional=True, bf16=False, attn_implementation=kernel, trust_remote_code=True
    ).eval()
    config = load_config(source, True)
    plain = auto_class(config).from_pretrained(
        folders[kind], config=config, attn_implementation="eager", trust_remote_code=True
    )
    plain = plain.double().eval()
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, 90, (length,), generator=generator) for length in (20, 7, 5, 1)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    got = encoder(ids, torch.tensor([len(row) for row in rows]))
    for row, vector in zip(rows, got):
        alone = encoder(row[None], torch.tensor([len(row)]), has_padding=False)[0]
        mask = torch.ones(1, len(row), dtype=torch.long)
        states = plain(input_ids=row[None], attention_mask=mask).last_hidden_state[0]
        expected = torch.nn.functional.normalize(states.mean(0), dim=0)
        for one in (vector, alone):
            torch.testing.assert_close(one.double(), expected, rtol=0, atol=5e-6)


def test_what_a_trial_shows_and_not_what_it_is_called(folders, tmp_path):
    from transformers import BertConfig, GPT2Config, LlamaConfig

    assert kind_of(load_config(find_model(str(folders["embedding_gemma2"])), False), False).num_dims == 24
    wide = LlamaConfig(vocab_size=50_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=30)
    assert kind_of(wide, False).is_causal
    assert not kind_of(
        LlamaConfig(vocab_size=3, is_causal=False, **{"hidden_size": 32, "num_attention_heads": 4}), False
    ).is_causal
    small = dict(vocab_size=40, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    assert kind_of(BertConfig(is_decoder=True, **small), False).is_causal
    assert not kind_of(BertConfig(**small), False).is_causal
    assert kind_of(GPT2Config(vocab_size=40, n_embd=32, n_head=4, n_positions=16), False).longest == 16
    state = torch.get_rng_state()
    kind_of(BertConfig(num_hidden_layers=3, **small), False)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_refused(folders, tmp_path):
    from transformers import BartConfig, DPRConfig, ViTConfig

    for name, config, message in (
        (
            "bart",
            BartConfig(),
            r"bart: encoder-decoder models \(bart\) are not supported; of t5, mt5, umt5 the encoder is",
        ),
        ("dpr", DPRConfig(projection_dim=8), "dpr: is a DPR encoder with a projection"),
        ("vit", ViTConfig(num_hidden_layers=1), "vit: a vit makes no states of tokens from their ids alone"),
    ):
        config.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=message):
            choose(tmp_path / name)
    with pytest.raises(UserError, match="--bidirectional false: .* is bidirectional by itself"):
        choose(folders["ministral3"], bidirectional=False)


def test_vectors_are_those_of_sentence_transformers(folders, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13"]
    for kind in ("T5", "ministral3", "embedding_gemma2", "gemma3-encoding"):
        transformer = Transformer(str(folders[kind]))
        dims = 24 if kind == "embedding_gemma2" else 32
        model = SentenceTransformer(modules=[transformer, Pooling(dims), Normalize()], device="cpu")
        embedder = Embedder.from_pretrained(
            folders[kind], query_prefix="", doc_prefix="", dtype="float32", device="cpu"
        )
        expected = model.encode(texts)
        assert (expected * embedder.encode_queries(texts)).sum(1).min() > 0.99999
        alone = np.concatenate([embedder.encode_queries([text]) for text in texts])
        assert (expected * alone).sum(1).min() > 0.99999


def test_dpr_is_the_bert_within(tmp_path):
    from tiny import _BERT
    from transformers import DPRConfig, DPRContextEncoder, DPRQuestionEncoder

    for maker in (DPRContextEncoder, DPRQuestionEncoder):
        torch.manual_seed(0)
        model = maker(DPRConfig(**_BERT, initializer_range=0.3)).eval()
        model.save_pretrained(tmp_path / maker.__name__)
        make_tokenizer(tmp_path / maker.__name__, bert=True)
        embedder = Embedder.from_pretrained(tmp_path / maker.__name__, query_prefix="", dtype="float32", device="cpu")
        ids = torch.tensor(embedder.tokenizer(["w1 w2 w3"])["input_ids"])
        with torch.no_grad():
            expected = torch.nn.functional.normalize(model(ids).pooler_output, dim=1).numpy()
        np.testing.assert_allclose(embedder.encode_queries(["w1 w2 w3"]), expected, atol=2e-6)
