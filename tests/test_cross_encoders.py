"""Cross-encoders that others published: their scores are those of sentence-transformers, or they are refused by name."""

import json
import logging
import random
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tokenizer_kinds import qwen
from tiny import make_model, sentence

from ds_embed.job.ranks import World
from ds_embed.models.reranker import identify_reranker
from ds_embed.settings.errors import UserError
from ds_embed.vectors.cross_encoder import CrossEncoder

PAIRS = [(sentence(random.Random(i), 1, 9), sentence(random.Random(i + 50), 1, 40)) for i in range(20)]
# As Qwen3-Reranker has it, with roles of a pair in place of a user's.
CHAT = (
    "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\n"
    "<Instruct>: {{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first | default('Find') }}\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}\n"
    "<Document>: {{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
PARTS = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}\n{% endfor %}so?"
USER = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


def make_classifier(folder, kind, labels=1, **changes):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    make_model(folder, kind, **changes)
    config = AutoConfig.from_pretrained(folder, num_labels=labels)
    torch.manual_seed(5)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path):
    return make_classifier(tmp_path / "bert", "bert")


@pytest.fixture
def decoder(tmp_path):
    folder = make_classifier(tmp_path / "qwen", "qwen3", vocab_size=320, max_position_embeddings=2048, pad_token_id=300)
    qwen().save_pretrained(folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def theirs(folder, **settings):
    import sentence_transformers

    return sentence_transformers.CrossEncoder(str(folder), device="cpu", **settings)


def ours(folder, **settings):
    return CrossEncoder(World.alone(), str(folder), flag="model_name_or_path", prefix="", **settings)


def assert_same_scores(folder, pairs=PAIRS, **settings):
    expected = theirs(folder).predict(pairs, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(ours(folder, **settings).score(pairs), expected, atol=1e-4)
    assert np.std(expected) > 1e-3


@pytest.mark.parametrize("activation", ["Sigmoid", "Tanh", "Identity"])
def test_prompt_length_and_case_are_those_of_its_files(bert, tmp_path, caplog, activation):
    function = getattr(torch.nn, activation)()
    plain = ours(bert).score(PAIRS)
    model = theirs(
        bert, prompts={"query": "w1 w2 ", "other": "w3 "}, default_prompt_name="query", activation_fn=function
    )
    model.save_pretrained(str(tmp_path / "saved"))
    edit(tmp_path / "saved" / "sentence_bert_config.json", max_seq_length=24, do_lower_case=True)
    with caplog.at_level(logging.INFO):
        assert_same_scores(tmp_path / "saved", [(query.upper(), document) for query, document in PAIRS])
    assert np.abs(ours(tmp_path / "saved").score(PAIRS) - plain).max() > 1e-3
    assert re.search(r'reads pairs as "\[CLS\] w1 w2 .*, at most 24 tokens', caplog.text)
    assert (f"its {activation} is left out" in caplog.text) == (activation != "Identity")


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def publish_as(folder, general=(), **content):
    """As sentence-transformers saves it, with changes to one of its files."""
    theirs(folder).save_pretrained(str(folder))
    edit(folder / "config_sentence_transformers.json", **dict(general))
    edit(folder / "sentence_bert_config.json", **content)


def test_scores_are_of_other_content_when_pairs_are_read_otherwise(bert, tmp_path):
    """So that work that was begun with another prompt is not gone on with."""
    theirs(bert, prompts={"query": "w1 "}, default_prompt_name="query").save_pretrained(str(tmp_path))
    before = identify_reranker(str(tmp_path), "cross_encoder")
    assert identify_reranker(str(tmp_path), "cross_encoder") == before
    edit(tmp_path / "config_sentence_transformers.json", prompts={"query": "w2 "})
    assert identify_reranker(str(tmp_path), "cross_encoder") != before


MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
    for i, (path, kind) in enumerate(
        (("", "base.modules.transformer.Transformer"), ("1_LogitScore", "cross_encoder.modules.logit_score.LogitScore"))
    )
]
REFUSED = {
    "a prompt that is none": (
        lambda f: publish_as(f, dict(default_prompt_name="x")),
        'config_sentence_transformers.json: default_prompt_name "x" is not among',
    ),
    "a function of its own": (
        lambda f: publish_as(f, dict(activation_fn="their.code.Scale")),
        "its activation function their.code.Scale can't be applied",
    ),
    "a function that changes the order": (
        lambda f: edit(f / "config.json", sentence_transformers={"activation_fn": "torch.nn.modules.activation.GELU"}),
        "its activation function torch.nn.modules.activation.GELU can't be applied",
    ),
    "a function as older versions name it": (
        lambda f: edit(f / "config.json", sbert_ce_default_activation_function="torch.nn.modules.activation.GELU"),
        "its activation function torch.nn.modules.activation.GELU can't be applied",
    ),
    "another kind of model": (lambda f: publish_as(f, dict(model_type="SparseEncoder")), "is a SparseEncoder"),
    "a module behind": (
        lambda f: (f / "modules.json").write_text(json.dumps(MODULES)),
        "has the module sentence_transformers.cross_encoder.modules.logit_score.LogitScore, which can't be applied",
    ),
    "arguments of transformers": (
        lambda f: publish_as(f, config_args={"hidden_act": "relu"}),
        "config_args hidden_act='relu' can't be applied",
    ),
    "a head of another size": (
        lambda f: edit_weights(f, lambda w: w.update({"classifier.weight": torch.ones(1, 16)})),
        "classifier.weight is 1 x 16 in its weight files and 1 x 32 by its config.json",
    ),
    "a weight without a place": (
        lambda f: edit_weights(
            f, lambda w: w.update({"bert.encoder.layer.0.attention.self.distance_embedding.weight": torch.ones(9)})
        ),
        "hold bert.encoder.layer.0.attention.self.distance_embedding.weight, which its config.json has no place for",
    ),
    "layers in words": (
        lambda f: edit(f / "config.json", num_hidden_layers="two"),
        "--model_name_or_path .*bert: cannot be loaded as a sequence classifier",
    ),
    "code of its own": (
        lambda f: edit(f / "config.json", auto_map={"AutoModelForSequenceClassification": "theirs.Flash"}),
        "comes with Python code of its own .Flash., which is not run",
    ),
    "a length in words": (
        lambda f: edit(f / "tokenizer_config.json", model_max_length="20"),
        "model_max_length '20' must",
    ),
    "modalities in a list": (lambda f: publish_as(f, modality_config=["text"]), "modality_config .* must be a dict"),
    "a config that is no JSON": (
        lambda f: (f / "config.json").write_text("no"),
        "bert: cannot be loaded as a sequence classifier|bert: .*not a valid JSON",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_followed_is_one_line(bert, name):
    change, message = REFUSED[name]
    change(bert)
    with pytest.raises(UserError, match=message) as error:
        ours(bert)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", [CHAT, PARTS])
@pytest.mark.parametrize("prompt", ["", "Look"])
def test_a_chat_template_of_pairs_is_followed(decoder, template, prompt):
    """Cut in the middle or not, with and without the files of sentence-transformers."""
    tokenizer = qwen(model_max_length=1000)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(decoder)
    if prompt:
        given = dict(prompts={"query": prompt}, default_prompt_name="query")
        theirs(decoder, **given).save_pretrained(str(decoder))
    assert_same_scores(decoder, max_length=1000)
    model = theirs(decoder, max_length=150)
    cut = model.predict(PAIRS, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(ours(decoder, max_length=150).score(PAIRS), cut, atol=1e-4)
    assert np.abs(cut - ours(decoder, max_length=1000).score(PAIRS)).max() > 1e-4


def test_a_decoder_without_a_word_on_pairs_needs_a_template(decoder):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with pytest.raises(UserError, match="a decoder, and no chat template says .*--template, such as 'query: {query}"):
        ours(decoder)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.chat_template = USER
    tokenizer.save_pretrained(decoder)
    with pytest.raises(UserError, match="its chat template leaves one of the texts out .* give .*--template"):
        ours(decoder)
    model = AutoModelForSequenceClassification.from_pretrained(decoder)
    with torch.no_grad():
        texts = [f"q: {query}\nd: {document} so" for query, document in PAIRS]
        expected = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    got = ours(decoder, template=r"q: {query}\nd: {document} so", max_length=1000).score(PAIRS)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_an_adapter_is_merged_as_the_message_says(bert, tmp_path):
    from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(bert), lora)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter; merge it .*PEFT's merge_and_unload"):
        ours(tmp_path / "adapter")
    merged = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=1
    ).merge_and_unload()
    shutil.copytree(bert, tmp_path / "merged")
    merged.save_pretrained(tmp_path / "merged")
    assert np.abs(ours(tmp_path / "merged").score(PAIRS) - ours(bert).score(PAIRS)).max() > 1e-3


def test_what_says_nothing_of_scores_is_left_alone(bert):
    expected = ours(bert).score(PAIRS)
    edit(bert / "config.json", return_dict=False, sentence_transformers=["x"])
    assert (ours(bert).score(PAIRS) == expected).all()


def test_two_labels_are_named(tmp_path, caplog):
    make_classifier(tmp_path / "two", "bert", labels=2)
    edit(
        tmp_path / "two" / "config.json",
        id2label={"0": "entailment", "1": "other"},
        label2id={"entailment": 0, "other": 1},
    )
    with caplog.at_level(logging.INFO):
        got = ours(tmp_path / "two").score(PAIRS)
    expected = theirs(tmp_path / "two").predict(PAIRS)
    np.testing.assert_allclose(got, expected[:, 1] - expected[:, 0], atol=1e-4)
    assert "a score is the logit of other minus that of entailment" in caplog.text
