"""Prefixes and templates: where the text stands, what truncation leaves, one for each training file."""

import dataclasses
import json

import pytest
import yaml
from test_tokenize import TEXTS, bert_tokenizer, byte_level_tokenizer
from test_tokenizer_kinds import llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ds_embed.data.store import TrainingStore, build_training_store
from ds_embed.data.tokenize import TextFormat, TextTokenizer, encode_texts
from ds_embed.models.card import EmbeddingCard
from ds_embed.models.kinds import Kind
from ds_embed.models.sentence_transformers import write_modules
from ds_embed.settings import DataArguments, ModelArguments, TextArguments, parse_arguments
from ds_embed.training.prepare import describe_prefixes, file_formats


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer("<s> $A"), llama(add_bos_token=True), bert_tokenizer()])
def test_what_stands_behind_the_text_is_never_cut_off(tokenizer):
    template = "the {text} sep" if tokenizer.sep_token else "to {text} </s>\n<end>"
    append_eos = tokenizer.eos_token is not None
    front, back = template.split("{text}")

    def tokens_of(text):
        encoding = tokenizer.backend_tokenizer
        return encoding.encode(text, add_special_tokens=False).ids

    before = len(tokens_of(front))
    plain = encode_texts(tokenizer, TEXTS, TextFormat(template, 1000, append_eos))
    suffix = len(tokens_of("a" + back)) - len(tokens_of("a"))
    assert suffix > 0
    for max_length in (before + suffix + 4, 30 + suffix):
        short = encode_texts(tokenizer, TEXTS, TextFormat(template, max_length, append_eos))
        for text, whole, cut in zip(TEXTS, plain, short):
            assert whole.tolist()[1:-1] == tokens_of((front + text).strip() + back)
            assert len(cut) == min(len(whole), max_length)
            body = len(cut) - suffix - 1
            assert cut.tolist() == whole.tolist()[:body] + whole.tolist()[len(whole) - suffix - 1 :]


def test_prefixes_that_leave_no_room_or_melt_into_the_text_are_refused():
    tokenizer = byte_level_tokenizer()
    needed = len(encode_texts(tokenizer, ["x"], TextFormat("to find:", 100, True))[0])
    TextTokenizer(tokenizer, TextFormat("to find:", needed, True))
    with pytest.raises(
        ValueError, match=f"query_max_length={needed - 1} leaves no room .* set query_max_length to {needed} "
    ):
        TextTokenizer(tokenizer, TextFormat("to find:", needed - 1, True), "query_max_length")
    vocabulary = {character: number for number, character in enumerate(map(chr, range(32, 127)))}
    merges = [(last, "e") for last in "re1"]  # what the texts that are tried end with
    backend = Tokenizer(models.BPE(vocabulary | {a + b: 100 + n for n, (a, b) in enumerate(merges)}, merges))
    with pytest.raises(ValueError, match="'er' behind {text} becomes one token with the end of a text"):
        TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="~"), TextFormat("{text}er", 9, True))


def data(tmp_path, **settings):
    for name in ("a", "b"):
        (tmp_path / name).write_text(json.dumps({"query": f"the {name}", "pos_doc": "a lake"}) + "\n")
    return DataArguments(train_files=[str(tmp_path / "a"), str(tmp_path / "b")], **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(query_prefixes=["x"], query_prefix="x"),
            "--query_prefixes x: has 1 values, but --train_files has 2 files",
        ),
        (dict(doc_prefixes=["x", "y"]), "--doc_prefixes: also set --doc_prefix"),
        (dict(query_prefixes=["x", "{query}"], query_prefix=""), "--query_prefixes '{query}': only {text} can stand"),
        (dict(query_prefix="{text} {text}"), "--query_prefix '{text} {text}': .* once; found {text} {text}"),
        (dict(doc_prefix="{}: "), "--doc_prefix '{}: ': only {text}"),
        (dict(query_prefix='["a", "b"]'), r'--query_prefix \["a", "b"\]: takes one prefix; --query_prefixes draws'),
        (dict(query_prefixes=["x", '["a", 1]'], query_prefix=""), r'--query_prefixes \["a", 1\]: .* must hold strings'),
        (
            dict(query_prefixes=["x", "['a', 'b']"], query_prefix=""),
            "--query_prefixes .*: looks like a list and is no JSON",
        ),
        (dict(query_prefixes=["x", '["a", "{b}"]'], query_prefix=""), "--query_prefixes '{b}': only {text}"),
        (dict(doc_prefixes=["x", '["a", "b"]'], doc_prefix=""), r'--doc_prefixes \["a", "b"\]: only --query_prefixes'),
    ],
)
def test_mistakes_name_the_setting(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        data(tmp_path, **settings)


def choose(text, known=None):
    kind = Kind(is_causal=True, num_dims=8, longest=None)
    return EmbeddingCard.choose(text, ModelArguments("m"), kind, "m", known, {})


def test_new_lines_are_written_as_on_a_command_line(tmp_path):
    card = choose(TextArguments(query_prefix=r"Instruct: find\nQuery: {text}\n<response>", doc_prefix=r"C:\\new\d: "))
    assert card.query_prefix == "Instruct: find\nQuery: {text}\n<response>" and card.doc_prefix == r"C:\new\d: "
    assert choose(TextArguments(), card) == card  # what a card holds is not read a second time
    yaml = tmp_path / "c.yaml"
    yaml.write_text("query_prefix: 'a\\nb'\ndoc_prefix: \"a\\nb\"\n")
    (text,) = parse_arguments(TextArguments, argv=["--config", str(yaml)])
    assert choose(text).query_prefix == choose(text).doc_prefix == "a\nb"


def test_each_file_has_its_own(tmp_path):
    tokenizer = byte_level_tokenizer()
    settings = data(tmp_path, query_prefix=r"{text}\n", query_prefixes=[r"first\n{text} .", "second "], doc_prefix="d ")
    card = choose(settings)
    query_formats, document_format = file_formats(settings, card)
    folder = build_training_store(settings.train_files, tokenizer, query_formats, document_format, 0, tmp_path / "c")
    store = TrainingStore.open(folder)
    texts = ["first\nthe a .", "d a lake", "second the b", "d a lake"]
    assert [tokenizer.decode(store.tokens_of(i)[:-1]) for i in range(4)] == texts
    again = build_training_store(settings.train_files, tokenizer, query_formats, document_format, 0, tmp_path / "c")
    other = build_training_store(
        settings.train_files, tokenizer, query_formats[::-1], document_format, 0, tmp_path / "c"
    )
    assert again == folder != other
    assert describe_prefixes(settings, card) == [
        f'queries        "first\\n{{text}} ." for {tmp_path / "a"}',
        f'queries        "second " for {tmp_path / "b"}',
        'queries        "{text}\\n" stored with the model, for later queries',
    ]
    assert describe_prefixes(data(tmp_path, query_prefix="x"), card) == []


def test_a_query_draws_one_prefix_of_its_files_list(tmp_path):
    tokenizer = byte_level_tokenizer()
    records = [{"query": f"question {n % 40}", "pos_doc": f"lake {n}"} for n in range(50)]
    records[7]["prompt"] = "its own "
    for name in ("a", "b"):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    drawn = ["find: ", "search </s>{text}?", "say\n"]
    config = {"query_prefix": "x ", "train_files": [{"path": "b"}, {"path": "a", "query_prefix": drawn}]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config).replace("path: ", f"path: {tmp_path}/"))
    (settings,) = parse_arguments(DataArguments, argv=["--config", str(tmp_path / "c.yaml"), "--doc_prefix", "d "])
    card = choose(settings)
    store = TrainingStore.open(
        build_training_store(settings.train_files, tokenizer, *file_formats(settings, card), 0, tmp_path / "c")
    )
    found = {prefix: set() for prefix in drawn}
    for number, record in enumerate(records * 2):
        told = tokenizer.decode(store.tokens_of(2 * number)[:-1])
        if number in (7, 57):
            assert told == "its own question 7"
        elif number < 50:
            assert told == f"x {record['query']}"
        else:
            ways = {one.partition("{text}")[0] + record["query"] + one.partition("{text}")[2]: one for one in drawn}
            found[ways[told]].add(record["query"])
    assert all(len(queries) > 5 for queries in found.values()) and sum(map(len, found.values())) == 40
    assert store.manifest["files"][1]["queries"]["num_texts"] == 50
    assert 'queries        "find: " or "search </s>{text}?" or "say\\n" for' in "\n".join(
        describe_prefixes(settings, card)
    )
    pooled = dataclasses.replace(card, include_prompt=False)
    with pytest.raises(ValueError, match="--query_prefixes: a list for .*/a: this model's pooling leaves out"):
        build_training_store(settings.train_files, tokenizer, *file_formats(settings, pooled), 0, tmp_path / "c")


@pytest.mark.parametrize("tokenizer", [byte_level_tokenizer(), llama(add_bos_token=True), bert_tokenizer()])
def test_control_tokens_spelled_in_a_prefix_are_tokens_and_in_data_text(tokenizer):
    control = tokenizer.sep_token or "</s>"
    append_eos = tokenizer.eos_token is not None
    prefix = f"the {control} lake "
    text_format = TextFormat(prefix, 100, append_eos)
    plain, spelled = (ids.tolist() for ids in encode_texts(tokenizer, ["is cold", f"is {control} cold"], text_format))
    end = tokenizer.sep_token_id if tokenizer.sep_token else tokenizer.eos_token_id
    assert plain == tokenizer(prefix + "is cold")["input_ids"] + ([end] if append_eos else [])
    assert plain.count(end) == 2 and spelled.count(end) == 2  # in the prefix and at the end
    short = encode_texts(tokenizer, ["is cold " * 30], TextFormat(prefix, 20, append_eos))[0].tolist()
    assert short[:19] == tokenizer(prefix + "is cold " * 30)["input_ids"][:19] and short[19] == end


def test_prompts_of_other_libraries_hold_what_stands_before_a_text(tmp_path):
    card = EmbeddingCard(
        "last", "find: {text} ?", "{text}", 9, 9, append_eos=True, base_model="none", consumed_samples=0
    )
    write_modules(tmp_path, card, 8, {}, {})
    prompts = json.loads((tmp_path / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {"query": "find: ", "document": ""}
    assert EmbeddingCard.read(tmp_path / "ds_embed.json").query_prefix == "find: {text} ?"
