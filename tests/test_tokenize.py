"""Tokenization: prefix, truncation, special tokens and EOS, each against the plain way of doing it."""

import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ds_embed.data.tokenize import SpecialTokens, TextFormat, TextTokenizer, encode_texts, tokenizer_fingerprint

TEXTS = [
    "the water of the lake is cold",
    "a lake",
    "",
    "  the hill and the lake, the hill and the water; and so on and on until the end of it all ",
    "naïve 丘 and émigré",
]


def byte_level_tokenizer(template=None, **names):
    """A decoder's tokenizer: byte-level BPE, nothing around a text unless a template is given."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"eos_token": "</s>", "bos_token": "<s>", "pad_token": "</s>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v})


def bert_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[", "]", "sep", "query", ":", "the", "lake", "is", "##s", "a"]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def unigram_tokenizer(**names):
    pieces = [("<unk>", -9.0), ("</s>", 0.0), *((piece, -2.0) for piece in ("▁", "a", "b", "<", "/", "s", ">"))]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens([AddedToken("<unk>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", **names)


def as_lists(arrays):
    return [array.tolist() for array in arrays]


@pytest.mark.parametrize(
    ("tokenizer", "append_eos", "head", "tail"),
    [
        (bert_tokenizer(), False, (2,), (3,)),
        (byte_level_tokenizer(), False, (), ()),
        (byte_level_tokenizer(), True, (), (2,)),
        (byte_level_tokenizer("<s> $A"), True, (1,), (2,)),
        (byte_level_tokenizer("<s> $A </s>"), False, (1,), (2,)),
        (byte_level_tokenizer("<s> $A </s>"), True, (1,), (2,)),
        (byte_level_tokenizer("</s> <s> $A </s> <s>"), False, (2, 1), (2, 1)),
        (byte_level_tokenizer("<s> <s> $A </s> <s>"), True, (1, 1), (2, 1)),
    ],
)
def test_special_tokens_are_found_by_probing(tokenizer, append_eos, head, tail):
    assert SpecialTokens.of(tokenizer, append_eos) == SpecialTokens(head, tail)
    encoded = encode_texts(tokenizer, TEXTS, TextFormat("", 200, append_eos))
    for text, ids in zip(TEXTS, as_lists(encoded)):
        plain = tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        assert ids == [*head, *plain, *tail]
        if not append_eos:
            assert ids == tokenizer(text.strip())["input_ids"]


@pytest.mark.parametrize("prefix", ["", "query: ", " passage:\n"])
def test_the_prefix_stands_in_front_and_the_whole_is_stripped(prefix):
    tokenizer = byte_level_tokenizer()
    encoded = encode_texts(tokenizer, TEXTS, TextFormat(prefix, 200, False))
    assert [tokenizer.decode(ids) for ids in encoded] == [(prefix + text).strip() for text in TEXTS]


@pytest.mark.parametrize("max_length", [8, 9, 12, 13, 1000])
@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer("<s> $A"), bert_tokenizer()])
def test_eos_and_sep_survive_truncation_and_the_left_end_stays(tokenizer, max_length):
    append_eos = tokenizer.eos_token is not None
    last = 2 if append_eos else 3
    text_format = TextFormat("query: ", max_length, append_eos)
    encoder = TextTokenizer(tokenizer, text_format)
    tokens, lengths, full_lengths = encoder.encode_flat(TEXTS)
    assert tokens.dtype == np.int32
    encoded = np.split(tokens, np.cumsum(lengths)[:-1])
    for text, ids, length, full_length in zip(TEXTS, encoded, lengths, full_lengths):
        plain = tokenizer(("query: " + text).strip(), add_special_tokens=False)["input_ids"]
        assert length == len(ids) == min(len(plain) + 2, max_length)
        assert full_length == len(plain) + 2
        assert ids[-1] == last
        assert ids[1:-1].tolist() == plain[: max_length - 2]


def test_left_padding_and_the_tokenizer_s_own_truncation_play_no_part():
    tokenizer = byte_level_tokenizer(padding_side="left", truncation_side="left", model_max_length=3)
    expected = as_lists(encode_texts(byte_level_tokenizer(), TEXTS, TextFormat("", 50, True)))
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=3)
    tokenizer.backend_tokenizer.enable_padding(pad_id=70, length=40, direction="left")
    state = tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding
    assert as_lists(encode_texts(tokenizer, TEXTS, TextFormat("", 50, True))) == expected
    assert (tokenizer.backend_tokenizer.truncation, tokenizer.backend_tokenizer.padding) == state != (None, None)
    assert tokenizer.backend_tokenizer.encode_special_tokens is False


@pytest.mark.parametrize(
    ("tokenizer", "spelling", "control"),
    [(byte_level_tokenizer(), "</s>", 2), (byte_level_tokenizer(), "<pad>", 0), (bert_tokenizer(), "[SEP]", 3)],
)
def test_special_tokens_spelled_out_in_data_are_plain_text(tokenizer, spelling, control):
    append_eos = tokenizer.eos_token is not None
    special = SpecialTokens.of(tokenizer, append_eos)
    text = f"a{spelling}the lake {spelling}"
    assert control in tokenizer(text, add_special_tokens=False)["input_ids"]  # the default would let it in
    (ids,) = as_lists(encode_texts(tokenizer, [text], TextFormat("", 100, append_eos)))
    body = ids[len(special.head) : len(ids) - len(special.tail)]
    assert control not in body
    if append_eos:
        assert tokenizer.decode(body) == text
    else:
        assert tokenizer.convert_ids_to_tokens(body) == ["a", "[", "sep", "]", "the", "lake", "[", "sep", "]"]


def test_a_vocabulary_that_spells_control_tokens_loses_them_and_keeps_the_unknown_token():
    for names in ({"unk_token": "<unk>"}, {}):
        tokenizer = unigram_tokenizer(**names)
        tokens, lengths, full_lengths = TextTokenizer(tokenizer, TextFormat("", 5, True)).encode_flat(
            ["a</s>b", "b", "</s>", "aZb", "a</s>b</s>ab"]
        )
        ids = [tokenizer.convert_ids_to_tokens(part) for part in np.split(tokens, np.cumsum(lengths)[:-1])]
        assert ids == [
            ["▁", "a", "b", "</s>"],
            ["▁", "b", "</s>"],
            ["▁", "</s>"],
            ["▁", "a", "<unk>", "b", "</s>"],
            ["▁", "a", "b", "a", "</s>"],
        ]
        assert full_lengths.tolist() == [4, 3, 2, 5, 6]


@pytest.mark.parametrize(
    ("tokenizer", "append_eos", "shortest"),
    [(bert_tokenizer(), False, 3), (byte_level_tokenizer(), True, 2), (byte_level_tokenizer(), False, 1)],
)
def test_too_small_a_length_names_the_setting(tokenizer, append_eos, shortest):
    TextTokenizer(tokenizer, TextFormat("", shortest, append_eos))
    with pytest.raises(ValueError, match=rf"doc_max_length={shortest - 1} .* set doc_max_length to {shortest} or"):
        TextTokenizer(tokenizer, TextFormat("", shortest - 1, append_eos), "doc_max_length")


def test_a_tokenizer_that_cannot_do_it_is_an_error():
    tokenizer = byte_level_tokenizer(eos_token=None)
    with pytest.raises(ValueError, match="adds no token after a text and has no eos_token .*; name one in its tok"):
        TextTokenizer(tokenizer, TextFormat("", 10, True))
    with pytest.raises(ValueError, match="object has no fast version"):
        encode_texts(object(), ["a"], TextFormat("", 10, False))


def test_no_texts_and_texts_without_tokens():
    tokenizer = byte_level_tokenizer()
    assert encode_texts(tokenizer, [], TextFormat("", 10, True)) == []
    assert as_lists(encode_texts(tokenizer, ["", "  "], TextFormat("", 10, True))) == [[2], [2]]
    assert as_lists(encode_texts(tokenizer, ["", "  "], TextFormat("", 10, False))) == [[], []]


def test_the_fingerprint_follows_what_decides_the_ids_and_nothing_else():
    plain = tokenizer_fingerprint(byte_level_tokenizer())
    used = byte_level_tokenizer(padding_side="left")
    used(TEXTS, padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(used) == plain
    others = [
        byte_level_tokenizer("<s> $A"),
        byte_level_tokenizer(eos_token="<pad>"),
        bert_tokenizer(),
        unigram_tokenizer(),
    ]
    more = byte_level_tokenizer()
    more.add_tokens(["lakeside"])
    assert len({plain, *map(tokenizer_fingerprint, [*others, more])}) == 6


def test_the_fingerprint_is_the_same_in_another_process(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    code = (
        "import sys, types, tokenizers\n"
        "from ds_embed.data.tokenize import tokenizer_fingerprint\n"
        "backend = tokenizers.Tokenizer.from_file(sys.argv[1])\n"
        "print(tokenizer_fingerprint(types.SimpleNamespace(backend_tokenizer=backend, eos_token_id=2)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == tokenizer_fingerprint(tokenizer)
