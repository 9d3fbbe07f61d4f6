"""Tokenizers as models bring them: sides of padding, pad tokens, BOS and EOS of their own, loaded from folders."""

import shutil

import numpy as np
import pytest
from test_tokenize import byte_level_tokenizer
from tiny import make_model

from ds_embed import Embedder
from ds_embed.data.tokenize import TextFormat, encode_texts
from ds_embed.models.loading import find_model, load_config, load_tokenizer
from ds_embed.settings.errors import UserError

TEXTS = ["the lake is cold", "a", "so it ends </s> and goes on <eos> <|end|> to the end", "the hill and the lake " * 4]


def character_vocabulary(*specials):
    return {token: number for number, token in enumerate([*specials, "▁", *"abcdefghijklmnopqrstuvwxyz</>|"])}


def llama(**names):
    """SentencePiece-like: a blank becomes ▁, BOS in front."""
    from transformers import LlamaTokenizer

    return LlamaTokenizer(vocab=character_vocabulary("<unk>", "<s>", "</s>"), merges=[], **names)


def gemma(**names):
    from transformers import GemmaTokenizer

    return GemmaTokenizer(vocab=character_vocabulary("<pad>", "<eos>", "<bos>", "<unk>"), merges=[], **names)


def qwen(**names):
    from transformers import Qwen2Tokenizer

    plain = byte_level_tokenizer()  # only for its vocabulary
    vocabulary = {t: n for t, n in plain.get_vocab().items() if len(t) == 1} | {"<|end|>": 300}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], eos_token="<|end|>", pad_token="<|end|>", unk_token=None, **names
    )


# Maker, and the token that stands in front of every text.
KINDS = {
    "llama, BOS": (lambda: llama(add_bos_token=True), "<s>"),
    "llama, BOS and EOS, pads left": (
        lambda: llama(add_bos_token=True, add_eos_token=True, padding_side="left"),
        "<s>",
    ),
    "llama, pad is EOS": (lambda: llama(add_bos_token=True, pad_token="</s>", padding_side="right"), "<s>"),
    "llama, pad is unknown": (lambda: llama(add_bos_token=False, pad_token="<unk>"), None),
    "gemma, BOS": (lambda: gemma(add_bos_token=True), "<bos>"),
    "gemma, EOS": (lambda: gemma(add_bos_token=False, add_eos_token=True), None),
    "qwen, pad is EOS": (qwen, None),
    "byte level, EOS by template, pads left": (
        lambda: byte_level_tokenizer("$A </s>", padding_side="left", pad_token=None),
        None,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_eos_once_at_the_end_and_what_spells_it_is_text(kind, tmp_path):
    make, first = KINDS[kind]
    make().save_pretrained(tmp_path)
    make_model(tmp_path / "config", "llama")
    shutil.copy(tmp_path / "config" / "config.json", tmp_path)
    tokenizer = load_tokenizer(find_model(str(tmp_path)), trust_remote_code=False)
    num_head = 0 if first is None else 1
    for max_length in (12, 200):
        rows = encode_texts(tokenizer, TEXTS, TextFormat("to ", max_length, True))
        whole = encode_texts(tokenizer, TEXTS, TextFormat("to ", 10_000, True))
        for text, ids, long in zip(TEXTS, rows, whole):
            assert (ids == tokenizer.eos_token_id).tolist() == [False] * (len(ids) - 1) + [True]
            if first is not None:
                assert tokenizer.convert_ids_to_tokens(int(ids[0])) == first
            assert len(ids) == min(len(long), max_length)
            assert ids[:-1].tolist() == long[: len(ids) - 1].tolist()
            assert tokenizer.decode(long[num_head:-1]).strip() == ("to " + text).strip()


@pytest.mark.parametrize("kind", ["bert", "roberta", "T5", "llama", "qwen3", "modernbert"])
def test_a_tokenizer_that_is_made_up_is_refused(kind, tmp_path):
    """transformers gives one of special tokens alone for a folder without any."""
    folder = make_model(tmp_path / kind, kind)
    load_tokenizer(find_model(str(folder)), False)
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(UserError, match=f"--model_name_or_path .*{kind}: .*tokenizer.*tokenizer.json"):
        load_tokenizer(find_model(str(folder)), False)


def test_a_model_type_that_nobody_knows_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "brandnew"}')
    with pytest.raises(UserError, match="config.json can't be used: .* model type `brandnew`"):
        load_config(find_model(str(tmp_path)), False)


def test_vectors_depend_on_neither_the_side_nor_the_token_of_padding(tmp_path):
    make_model(tmp_path / "model", "llama", bos_token_id=1, eos_token_id=2)
    vectors = []
    for number, names in enumerate(
        [{}, {"padding_side": "left"}, {"pad_token": "</s>", "padding_side": "left"}, {"pad_token": "<unk>"}]
    ):
        folder = shutil.copytree(tmp_path / "model", tmp_path / str(number))
        llama(add_bos_token=True, **names).save_pretrained(folder)
        for pooling in ("last", "mean"):
            for bidirectional in (False, True):
                embedder = Embedder.from_pretrained(
                    folder,
                    pooling=pooling,
                    bidirectional=bidirectional,
                    dtype="float32",
                    device="cpu",
                    max_length=20,
                    query_prefix="to ",
                )
                together = embedder.encode_queries(TEXTS)
                alone = [embedder.encode_queries([text]) for text in TEXTS[:2]]
                np.testing.assert_allclose(together[:2], np.concatenate(alone), atol=2e-6)
                vectors.append(together)
    for later in range(4, 16):
        assert np.array_equal(vectors[later], vectors[later % 4])
    assert np.abs(vectors[0] - vectors[1]).max() > 0.01
