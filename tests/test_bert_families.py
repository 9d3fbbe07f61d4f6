"""Every BERT-family model: vectors equal to the plain computation text by text, and the lengths it can take."""

import pytest
import torch
from test_gradients import FAMILIES
from tiny import make_model

from ds_embed.models.kinds import kind_of
from ds_embed.models.loading import choose_card, find_model, load_config, load_encoder
from ds_embed.settings import ModelArguments, TextArguments

KINDS = ("bert", *FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {kind: make_model(root / kind, kind) for kind in (*KINDS, "llama")}


def load(folder, pooling):
    return load_encoder(
        find_model(str(folder)),
        pooling=pooling,
        bidirectional=True,
        bf16=False,
        attn_implementation=None,
        trust_remote_code=False,
    ).eval()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_batch_equals_each_text_alone(folders, kind, pooling):
    from transformers import AutoModel

    encoder = load(folders[kind], pooling)
    plain = AutoModel.from_pretrained(folders[kind], attn_implementation="eager").double().eval()
    lengths = torch.tensor([40, 7, 23, 1])
    ids = torch.randint(4, 90, (4, 40), generator=torch.Generator().manual_seed(1))
    ids[torch.arange(40)[None] >= lengths[:, None]] = 0
    with torch.no_grad():
        got = encoder(ids, lengths)
        for row, length, vector in zip(ids, lengths, got):
            states = plain(input_ids=row[None, :length]).last_hidden_state[0]
            pooled = states.mean(0) if pooling == "mean" else states[0]
            expected = torch.nn.functional.normalize(pooled, dim=0)
            torch.testing.assert_close(vector.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_tokens_as_the_model_has_positions_for(folders, kind):
    source = find_model(str(folders[kind]))
    longest = kind_of(load_config(source, False), False).longest
    assert longest == (None if kind == "modernbert" else 128)
    ids = torch.full((1, 128), 5)
    assert torch.isfinite(load(folders[kind], "mean")(ids, torch.tensor([128]))).all()
    if longest is not None:
        with pytest.raises((IndexError, RuntimeError)):
            load(folders[kind], "mean")(torch.full((1, 129), 5), torch.tensor([129]))


def test_defaults_by_kind_of_model(folders):
    model = ModelArguments("unused")
    card = choose_card(find_model(str(folders["roberta"])), TextArguments(), model)
    assert (card.pooling, card.append_eos, card.doc_max_length) == ("mean", False, 128)  # 512 would not fit
    assert (card.query_prefix, card.doc_prefix) == ("query: ", "passage: ")
    card = choose_card(find_model(str(folders["llama"])), TextArguments(query_max_length=64), model)
    assert (card.pooling, card.append_eos, card.query_max_length, card.doc_max_length) == ("last", True, 64, 512)


def test_error_names_the_flag_that_decided(folders):
    source = find_model(str(folders["mpnet"]))
    model = ModelArguments("unused")
    with pytest.raises(ValueError, match="--max_length 200: .* positions for 128 tokens"):
        choose_card(source, TextArguments(max_length=200), model)
    with pytest.raises(ValueError, match="--query_max_length 129: "):
        choose_card(source, TextArguments(max_length=100, query_max_length=129), model)
