"""Decoders, causal and bidirectional: vectors equal to the plain computation text by text, in every family."""

import dataclasses

import pytest
import torch
from tiny import DECODERS, make_model

from ds_embed.models.attention import BIDIRECTIONAL_FAMILIES, CausalAttention
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.loading import choose_card, find_model, load_encoder
from ds_embed.models.lora import add_lora
from ds_embed.settings import LoraArguments, ModelArguments, TextArguments

LENGTHS = (20, 7, 5, 1)  # the windows hold 5 tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("decoders")
    return {kind: make_model(root / kind, kind) for kind in DECODERS}


def load(folder, bidirectional, pooling="last", kernel=None):
    return load_encoder(
        find_model(str(folder)),
        pooling=pooling,
        bidirectional=bidirectional,
        bf16=False,
        attn_implementation=kernel,
        trust_remote_code=False,
    ).eval()


def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(10, 90, (length,), generator=generator) for length in LENGTHS]


def padded(rows):
    ids = torch.zeros(len(rows), max(LENGTHS), dtype=torch.long)
    for row, text in zip(ids, rows):
        row[: len(text)] = text
    return ids, torch.tensor([len(row) for row in rows])


def plain_states(folder, kind, text, bidirectional):
    """Token states (S, D) of a text alone by transformers' eager kernel in float64, with a mask written out."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    if not bidirectional:
        return model(input_ids=text[None]).last_hidden_state[0]
    size, window = len(text), getattr(model.config, "sliding_window", None)
    masks = {}
    for name in ("full_attention", "sliding_attention"):
        masks[name] = torch.zeros(1, 1, size, size, dtype=torch.float64)
        for i in range(size):
            for j in range(size):
                if name == "sliding_attention" and window is not None and abs(i - j) >= window:
                    masks[name][0, 0, i, j] = torch.finfo(torch.float64).min
    if getattr(model.config, "layer_types", None) is None:
        masks = masks["full_attention" if window is None else "sliding_attention"]
    return model(input_ids=text[None], attention_mask=masks).last_hidden_state[0]


def pooled(states, pooling):
    weights = {
        "mean": torch.ones(len(states)),
        "cls": torch.eye(len(states))[0],
        "last": torch.eye(len(states))[-1],
        "weighted_mean": torch.arange(1, len(states) + 1),
    }[pooling].double()
    return torch.nn.functional.normalize((states * weights[:, None]).sum(0) / weights.sum(), dim=0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_padded_batch_and_text_alone_equal_the_plain_computation(folders, kind, bidirectional):
    rows = texts()
    states = [plain_states(folders[kind], kind, text, bidirectional) for text in rows]
    expected = torch.stack([pooled(s, "weighted_mean") for s in states])
    for kernel in ["eager"] if kind == "gemma2" else ["eager", "sdpa"]:
        encoder = load(folders[kind], bidirectional, "weighted_mean", kernel)
        alone = torch.cat([encoder(text[None], torch.tensor([len(text)]), has_padding=False) for text in rows])
        for got in (encoder(*padded(rows)), alone):
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize(
    "pooling, bidirectional",
    [(p, b) for p in ("mean", "last", "weighted_mean", "cls") for b in (True, False) if b or p != "cls"],
)
@torch.no_grad()
def test_poolings(folders, pooling, bidirectional):
    rows = texts()
    got = load(folders["mistral"], bidirectional, pooling)(*padded(rows))
    for text, vector in zip(rows, got):
        states = plain_states(folders["mistral"], "mistral", text, bidirectional)
        torch.testing.assert_close(vector.double(), pooled(states, pooling), rtol=0, atol=3e-6)


def test_no_token_of_a_mask_sees_nothing(folders):
    """A row of padding far from its text would be a softmax over nothing, which some kernels answer with NaN."""
    lengths = torch.tensor([1, 20])
    for window in (None, 5):
        attention = dataclasses.replace(load(folders["mistral"], True).attention, windows={"": window})
        mask = attention.arguments(lengths, 20, True, torch.float32)["attention_mask"]
        assert mask.any(-1).all() and not mask[0, ..., :5, 1:5].all()


def test_the_families_tested_are_those_supported():
    assert sorted(DECODERS) == sorted(BIDIRECTIONAL_FAMILIES)


@pytest.mark.parametrize("training", [True, False])
def test_attention_that_is_not_as_asked_is_an_error(folders, training):
    """What would happen if a model's code ignored our masks, or were bidirectional unasked."""
    text = torch.arange(10, 20)[None], torch.tensor([10])
    encoder = load(folders["qwen3"], True).train(training)
    encoder.attention = dataclasses.replace(encoder.attention, kernel="flash")  # its masks leave that to the module
    encoder(*text, has_padding=False)
    assert encoder.backbone.training == training
    for wrong in (load(folders["llama"], True), load(folders["llama"], False)):
        for module in wrong.backbone.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = not module.is_causal
        is_causal = isinstance(wrong.attention, CausalAttention)
        with pytest.raises(
            RuntimeError, match="is (bidirectional|causal) and should be " + ("causal" if is_causal else "bi")
        ):
            wrong(*text, has_padding=False)


def test_weights_that_are_no_numbers_are_not_blamed_on_the_attention(folders):
    encoder = load(folders["llama"], True)
    encoder.backbone.embed_tokens.weight.data.fill_(torch.nan)
    text = torch.arange(10, 20)[None], torch.tensor([10])
    assert encoder(*text, has_padding=False).isnan().all()
    encoder.backbone.embed_tokens.weight.data.normal_()
    assert encoder(*text, has_padding=False).isfinite().all()


def test_lora_and_gradient_checkpointing_change_nothing(folders):
    rows = padded(texts())
    for kind in ("mistral", "gemma3_text"):
        expected = load(folders[kind], True)(*rows)
        encoder = load(folders[kind], True)
        encoder.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        add_lora(encoder, LoraArguments(lora_rank=2), seed=1, dtype=torch.float32)
        assert torch.equal(encoder.train()(*rows), expected)  # lora_B is zero


def choose(folder, card=None, **settings):
    source = dataclasses.replace(find_model(str(folder)), card=card)
    return choose_card(source, TextArguments(), ModelArguments("unused", **settings))


def test_the_card_keeps_the_direction(folders, tmp_path):
    card = choose(folders["llama"], bidirectional=True)
    card.save(tmp_path)
    known = EmbeddingCard.read(tmp_path / "ds_embed.json")
    assert known.bidirectional and choose(folders["llama"], known).bidirectional
    assert not choose(folders["llama"], known, bidirectional=False).bidirectional
    assert not choose(folders["llama"]).bidirectional
    assert choose(folders["llama"], bidirectional=True, pooling="cls").pooling == "cls"


@torch.no_grad()
def test_a_decoder_that_is_bidirectional_by_its_config(tmp_path):
    """EmbeddingGemma's config: padding and window as transformers' own code has them."""
    from transformers import AutoModel

    folder = make_model(tmp_path / "m", "gemma3_text", use_bidirectional_attention=True, sliding_window=8)
    assert choose(folder).bidirectional
    rows = texts()
    got = load(folder, True, "mean")(*padded(rows))
    plain = AutoModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    for text, vector in zip(rows, got):
        expected = pooled(plain(input_ids=text[None]).last_hidden_state[0], "mean")
        torch.testing.assert_close(vector.double(), expected, rtol=0, atol=3e-6)
    with pytest.raises(ValueError, match="--bidirectional false: .* is bidirectional by itself"):
        choose(folder, bidirectional=False)


def test_what_can_not_be_done_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="--pooling cls: .* causal decoder, sees none .* --bidirectional true"):
        choose(folders["llama"], pooling="cls")
    from transformers import GPT2Config

    GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="is a gpt2, which can't be made bidirectional; supported are llama, .*qwen3"):
        choose(tmp_path / "gpt2", bidirectional=True)
    bert = make_model(tmp_path / "bert", "bert")
    assert choose(bert, bidirectional=True).bidirectional and choose(bert).bidirectional
    with pytest.raises(ValueError, match="--bidirectional false: .* is bidirectional by itself"):
        choose(bert, bidirectional=False)
    with pytest.raises(ValueError, match="--attn_implementation flex_attention: with --bidirectional true choose"):
        load(folders["llama"], True, kernel="flex_attention")
