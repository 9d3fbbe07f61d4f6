"""Mistakes end all ranks with one clear message, a non-zero exit code, and nothing half-written."""

import json
import os
import socket
import subprocess
import sys

import pytest
from tiny import REPOSITORY, launch, leave_out_when_fast, load_recipe, make_model, make_training_file

from ds_embed.settings.errors import UserError

SECONDS = 600  # a job that hangs instead of ending fails by this limit


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    make_model(root / "llama", "llama")
    make_model(root / "bert", "bert")
    make_model(root / "roberta", "roberta")
    make_training_file(root / "good.jsonl", 30, num_negatives=1)
    good = (root / "good.jsonl").read_text().splitlines()
    (root / "empty.jsonl").write_text("")
    (root / "not_json.jsonl").write_text("\n".join([*good[:4], '{"query": "w1", ', *good[4:]]))
    (root / "no_query.jsonl").write_text("\n".join([*good[:2], '{"pos_doc": "w1 w2"}']))
    record = json.loads(good[0]) | {"query_id": True}
    (root / "number_id.jsonl").write_text(json.dumps(record) + "\n")
    (root / "no_negative.jsonl").write_text("\n".join([*good[:3], '{"query": "w1", "pos_doc": "w2"}']))
    same = [json.dumps({"query": f"w{n}", "pos_doc": "w2 w3"}) for n in range(30)]
    (root / "one_document.jsonl").write_text("\n".join(same))
    (root / "bad_key.yaml").write_text("max_steps: 3\nlearning_rat: 0.1\n")
    (root / "bad.yaml").write_text("max_steps: [3\n")
    (root / "no_model").mkdir()
    (root / "gas.json").write_text('{"gradient_accumulation_steps": 4}')
    return root


# Changed flags of an otherwise good command, and what the message must say.
CASES = {
    "missing file": ({"train_files": "{}/absent.jsonl"}, ["--train_files", "absent.jsonl", "no such file"]),
    "empty file": ({"train_files": "{}/empty.jsonl"}, ["empty.jsonl", "empty"]),
    "not JSON": ({"train_files": "{}/not_json.jsonl"}, ["not_json.jsonl:5:"]),
    "no query": ({"train_files": "{}/no_query.jsonl"}, ["no_query.jsonl:3:", "query"]),
    "boolean as id": ({"train_files": "{}/number_id.jsonl"}, ["number_id.jsonl:1:", "query_id"]),
    "folder without data": ({"train_files": "{}/no_model"}, ["no_model"]),
    "no negatives": (
        {"train_files": "{}/no_negative.jsonl", "global_batch_size": "4", "negatives": "pair"},
        ["no_negative.jsonl:4", "neg_doc", "--negatives pair"],
    ),
    "nothing to contrast": (
        {"train_files": "{}/one_document.jsonl", "hard_negatives": "0"},
        ["--train_files", "no query has a negative", "one_document.jsonl:", "is one of its positives"],
    ),
    "unknown flag": ({"learning_rat": "0.1"}, ["--learning_rat", "did you mean --learning_rate"]),
    "unknown key": ({"config": "{}/bad_key.yaml"}, ["bad_key.yaml", "learning_rat", "did you mean learning_rate"]),
    "broken YAML": ({"config": "{}/bad.yaml"}, ["bad.yaml:", "YAML"]),
    "wrong type": ({"max_steps": "many"}, ["max_steps", "many"]),
    "no such model": ({"model_name_or_path": "{}/absent"}, ["--model_name_or_path", "absent", "no such folder"]),
    "no model in folder": ({"model_name_or_path": "{}/no_model"}, ["no_model", "config.json"]),
    "BERT as decoder": ({"model_name_or_path": "{}/bert"}, ["BERT", "decoders"]),
    "tiny budget": ({"micro_batch_tokens": "8"}, ["--micro_batch_tokens 8", "good.jsonl:", "raise it to at least"]),
    "too few samples": ({"global_batch_size": "31"}, ["--global_batch_size 31", "30"]),
    "no such JSON": ({"deepspeed": "ds_configs/zero9.json"}, ["--deepspeed", "zero9.json", "no such file"]),
    "JSON decides ours": ({"deepspeed": "{}/gas.json"}, ["gradient_accumulation_steps", "--global_batch_size"]),
    "unknown module": ({"lora_target_modules": "q_projj"}, ["--lora_target_modules", "q_projj", "q_proj"]),
}


# Noticed by every rank, by rank 0 alone, before and after the model is loaded: with two ranks. The rest, which
# differ from these in the message alone, as one plain process, which starts twice as fast.
ON_TWO_RANKS = [
    "missing file",
    "empty file",
    "not JSON",
    "boolean as id",
    "unknown flag",
    "unknown key",
    "no such model",
    "tiny budget",
    "too few samples",
    "unknown module",
]


@pytest.mark.parametrize("name", CASES)
def test_training(name, place, tmp_path):
    changes, words = CASES[name]
    flags = {
        "deepspeed": "ds_configs/zero2.json",
        "model_name_or_path": "{}/llama",
        "train_files": "{}/good.jsonl",
        "max_steps": "2",
        "max_length": "32",
        "global_batch_size": "8",
        "hard_negatives": "1",
        "report_to": "none",
    } | changes
    command = [word for key, value in flags.items() for word in (f"--{key}", value.replace("{}", str(place)))]
    out, cache = tmp_path / "run", tmp_path / "cache"
    result = launch(
        2 if name in ON_TWO_RANKS else 0,
        "recipes/train_gpt.py",
        *command,
        "--output_dir",
        out,
        "--cache_dir",
        cache,
        timeout=SECONDS,
    )
    assert_one_clear_error(result, words)
    assert not out.exists()
    # A store that was finished before the mistake was found may stay; nothing unfinished may.
    folders = [path for path in cache.glob("**/") if path != cache]
    assert all((folder / "manifest.json").exists() for folder in folders)


BERT_CASES = {
    "decoder as BERT": ({"model_name_or_path": "{}/llama"}, ["decoder", "train-gpt"]),
    "beyond its positions": ({"max_length": "129"}, ["--max_length 129", "positions for 128 tokens"]),
    "RoBERTa's positions start at 2": (
        {"model_name_or_path": "{}/roberta", "doc_max_length": "129"},
        ["--doc_max_length 129", "positions for 128 tokens"],
    ),
}


@pytest.mark.parametrize("name", BERT_CASES)
def test_training_bert(name, place, tmp_path):
    changes, words = BERT_CASES[name]
    flags = {
        "deepspeed": "ds_configs/zero2.json",
        "model_name_or_path": "{}/bert",
        "train_files": "{}/good.jsonl",
        "max_steps": "2",
        "global_batch_size": "8",
        "report_to": "none",
    } | changes
    command = [word for key, value in flags.items() for word in (f"--{key}", value.replace("{}", str(place)))]
    out = tmp_path / "run"
    result = launch(
        0, "recipes/train_bert.py", *command, "--output_dir", out, "--cache_dir", tmp_path / "cache", timeout=SECONDS
    )
    assert_one_clear_error(result, words)
    assert not out.exists()


GENERATE_CASES = {
    "nothing to encode": ([], ["--query_files", "--doc_files"]),
    "id missing": (["--doc_files", "{}/bad_docs.jsonl"], ["bad_docs.jsonl:2", "doc_id"]),
    "no such run": (["--doc_files", "{}/docs.jsonl", "--model_name_or_path", "./absent"], ["absent", "no such folder"]),
    "adapter is no adapter": (["--doc_files", "{}/docs.jsonl", "--adapter_path", "{}/bert"], ["--adapter_path"]),
    "tiny budget": (["--doc_files", "{}/docs.jsonl", "--micro_batch_tokens", "3"], ["--micro_batch_tokens 3"]),
}


@pytest.mark.parametrize("name", GENERATE_CASES)
def test_generate(name, place, tmp_path):
    (place / "docs.jsonl").write_text('{"pos_doc": "w1 w2 w3", "doc_id": "a"}\n')
    (place / "bad_docs.jsonl").write_text('{"pos_doc": "w1 w2 w3", "doc_id": "a"}\n{"pos_doc": "w1"}\n')
    changes, words = GENERATE_CASES[name]
    flags = [word.replace("{}", str(place)) for word in changes]
    if "--model_name_or_path" not in flags:
        flags += ["--model_name_or_path", place / "llama"]
    result = launch(
        2 if name == "id missing" else 0,
        "recipes/generate.py",
        *flags,
        "--output_prefix",
        tmp_path / "out",
        "--cache_dir",
        tmp_path / "cache",
        timeout=SECONDS,
    )
    assert_one_clear_error(result, words)
    assert not (tmp_path / "out").exists()


def test_run_that_may_not_be_resumed_is_refused(place, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("max_steps: 1\n")
    result = launch(
        0,
        "recipes/train_gpt.py",
        "--deepspeed",
        "ds_configs/zero2.json",
        "--model_name_or_path",
        place / "llama",
        "--train_files",
        place / "good.jsonl",
        "--output_dir",
        tmp_path / "run",
        "--resume_if_exists",
        "false",
        timeout=SECONDS,
    )
    assert_one_clear_error(result, ["--output_dir", "contains a run that was stopped", "--resume_if_exists"])


@pytest.mark.skipif(os.getuid() == 0, reason="root can write anywhere")
def test_folder_that_cannot_be_written(place, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    result = launch(
        0,
        "recipes/train_gpt.py",
        "--deepspeed",
        "ds_configs/zero2.json",
        "--model_name_or_path",
        place / "llama",
        "--train_files",
        place / "good.jsonl",
        "--output_dir",
        locked / "run",
        timeout=SECONDS,
    )
    assert_one_clear_error(result, ["--output_dir", "can't be written"])


def assert_one_clear_error(result, words):
    assert result.returncode != 0
    output = result.stdout + result.stderr
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output[-3000:]
    assert "Traceback" not in output, output[-3000:]
    missing = [word for word in words if word not in errors[0]]
    assert not missing, errors[0]


def test_a_master_port_that_another_job_uses_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        environment = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        ended = subprocess.run(
            [sys.executable, "-c", "from ds_embed.job.ranks import *; raise SystemExit(run_recipe(initialize))"],
            env=environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            cwd=REPOSITORY,
            timeout=SECONDS,
            text=True,
            stderr=subprocess.PIPE,
        )
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"error: MASTER_PORT {port} is in use")


# Files of one process, and what the message about a recipe that gets them must say.
FILES = {
    "docs.jsonl": [{"pos_doc": "w1 w2", "doc_id": "d1"}, {"pos_doc": "w3", "doc_id": "d2"}],
    "queries.jsonl": [{"query": "w1", "query_id": "q1", "doc_id": "d1"}],
    "two_docs.jsonl": [{"pos_doc": "w1 w2", "doc_id": "d1"}, {"pos_doc": "w3", "doc_id": "d1"}],
    "two_queries.jsonl": [{"query": "w1", "query_id": "q1"}, {"query": "w2", "query_id": "q1"}],
    "scored.jsonl": [{"sentence1": f"w{i}", "sentence2": f"w{i + 1}", "score": i / 9} for i in range(9)],
    "equal.jsonl": [{"sentence1": f"w{i}", "sentence2": f"w{i + 1}", "score": 1} for i in range(9)],
    "nan.jsonl": [{"sentence1": "w1", "sentence2": "w2", "score": score} for score in (0.5, float("nan"))],
    "infinite.jsonl": [{"sentence1": "w1", "sentence2": "w2", "score": -float("inf")}],
    "high.jsonl": [{"sentence1": "w1", "sentence2": "w2", "score": "high"}],
    "labels.jsonl": [{"text": f"w{i} w9", "label": i % 3} for i in range(12)],
    "no_label.jsonl": [{"text": "w1", "label": "a"}, {"text": "w2", "label": None}],
    "one_label.jsonl": [{"text": f"w{i}", "label": "a"} for i in range(9)],
    "lone_label.jsonl": [{"text": f"w{i}", "label": i} for i in range(9)],
    "few_scores.jsonl": [{"query": "w1", "pos_doc": "w2", "neg_doc": ["w3", "w4"], "pos_score": 1, "neg_scores": [0]}],
    "run.trec": ["q1 Q0 d1 1 2.5 x", "q1 Q0 d2 2 0.5 x"],
    "unknown.trec": ["q1 Q0 d9 1 2.5 x"],
    "twice.trec": ["q1 Q0 d1 1 2.5 x", "q1 Q0 d1 2 0.5 x"],
    "nan.trec": ["q1 Q0 d1 1 nan x"],
    "short.trec": ["q1 d1 2.5"],
    "empty.trec": [],
    "other.tsv": ["q1\td1"],
}
OUT = "--output_dir {}/none --cache_dir {}/cache"
TRAIN_RERANKER = f"train_reranker --deepspeed zero0 {OUT} --model_name_or_path {{}}/bert --train_files"
TRAIN = f"train_bert --deepspeed zero0 --global_batch_size 4 {OUT} --model_name_or_path {{}}/bert --train_files"
RERANK = "rerank --model_name_or_path {}/ranker --output_file {}/out.trec --query_files {}/queries.jsonl --doc_files"
RERANK_RUN = f"{RERANK} {{}}/docs.jsonl --run_file"
BENCHMARK = "benchmark --model_name_or_path {}/bert --output_dir {}/out"
OWN = f"{BENCHMARK} --query_files {{}}/queries.jsonl --doc_files"
HERE = {
    f"{TRAIN_RERANKER} {{}}/labels.jsonl": (
        "labels.jsonl:1: the keys here are those of labelled texts: .* of an embedder"
    ),
    f"{TRAIN_RERANKER} {{}}/scored.jsonl": "scored.jsonl:1: the keys here are those of scored pairs: .* --pair_loss",
    f"{TRAIN_RERANKER} {{}}/few_scores.jsonl --loss kl": (
        "few_scores.jsonl:1: neg_scores has 1 numbers and neg_doc 2 texts"
    ),
    f"{TRAIN_RERANKER} {{}}/good.jsonl --guide_embeddings {{}}": "unknown flag --guide_embeddings",
    f"{TRAIN} {{}}/scored.jsonl": "scored.jsonl:1: the keys here are those of scored pairs: .* --pair_loss",
    f"{TRAIN} {{}}/equal.jsonl --pair_loss cosent": "every pair has the score 1",
    f"{TRAIN} {{}}/nan.jsonl --pair_loss cosent": "nan.jsonl:2: not JSON .NaN is no number there",
    f"{TRAIN} {{}}/infinite.jsonl --pair_loss cosent": "infinite.jsonl:1: not JSON .*Infinity is no number there",
    f"{TRAIN} {{}}/high.jsonl --pair_loss cosent": "high.jsonl:1: score is 'high', expected a finite number",
    f"{TRAIN} {{}}/good.jsonl --pair_loss cosent": "--pair_loss cosent: no file .* has scored pairs",
    f"{TRAIN} {{}}/scored.jsonl --pair_loss cosent --guide_embeddings {{}}": (
        "--guide_embeddings .*: applies to no scored"
    ),
    f"{TRAIN} {{}}/no_label.jsonl": "no_label.jsonl:2: label is missing",
    f"{TRAIN} {{}}/one_label.jsonl": "one_label.jsonl:1: every text of its file has this label",
    f"{TRAIN} {{}}/lone_label.jsonl": "lone_label.jsonl:1: no other text of its file has its label",
    f"{TRAIN} {{}}/labels.jsonl --val_files {{}}/labels.jsonl": "--val_files .*labels.jsonl: holds labelled texts",
    f"{TRAIN} {{}}/good.jsonl --guide_embeddings {{}}/good.jsonl": "--guide_embeddings .*good.jsonl: no such folder",
    f"{RERANK_RUN} {{}}/absent.trec": "--run_file .*absent.trec: no such file",
    f"{RERANK_RUN} {{}}/empty.trec": "empty.trec: holds no line of a run",
    f"{RERANK_RUN} {{}}/unknown.trec": "--doc_files: 1 of the 1 ids to rerank have no text there, such as 'd9'",
    f"{RERANK_RUN} {{}}/twice.trec": "twice.trec:2: document 'd1' stands twice",
    f"{RERANK_RUN} {{}}/nan.trec": "nan.trec:1: score 'nan', expected a finite number",
    f"{RERANK_RUN} {{}}/short.trec": "short.trec:1: 3 columns",
    f"{RERANK_RUN} {{}}/run.trec --max_length 3": "--max_length 3: leaves no room beside the 3 tokens",
    f"{RERANK_RUN} {{}}/run.trec --model_name_or_path {{}}/bert": "has no trained classifier .* choose a reranker",
    f"{RERANK} {{}}/two_docs.jsonl --run_file {{}}/run.trec": "two_docs.jsonl:2: doc_id 'd1' has another text",
    RERANK_RUN.replace("/queries", "/two_queries") + " {}/run.trec": (
        "two_queries.jsonl:2: query_id 'q1' has another text"
    ),
    "generate --model_name_or_path {}/ranker --doc_files {}/docs.jsonl": "is a reranker's, which makes no vectors",
    f"{BENCHMARK} --tasks SciFakt": "--tasks SciFakt: .*Did you mean: 'SciFact'",
    f"{OWN} {{}}/docs.jsonl --qrels {{}}/absent.tsv": "--qrels .*absent.tsv: no such file",
    f"{OWN} {{}}/docs.jsonl --qrels {{}}/other.tsv": "other.tsv:1: ",
}


@pytest.mark.parametrize("command", HERE)
def test_here(command, place, tmp_path, monkeypatch):
    for name, lines in FILES.items():
        (place / name).write_text("".join((json.dumps(x) if type(x) is dict else x) + "\n" for x in lines))
    if not (place / "ranker").exists():
        _make_reranker(place)
    recipe, *argv = command.replace("{}", str(place)).split()
    if recipe == "benchmark":
        leave_out_when_fast()  # mteb takes seconds to import
    monkeypatch.setattr(sys, "argv", [recipe, *argv])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=HERE[command]) as error:
        load_recipe(recipe).main()
    assert "\n" not in str(error.value)
    assert not list(place.glob("out.trec*")) and not (place / "none").exists()


def _make_reranker(root):
    """A reranker that has learned nothing, as training leaves it."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from ds_embed.data.pairs import PairFormat
    from ds_embed.models.loading import load_tokenizer
    from ds_embed.models.reranker import PairScorer, RerankerCard, configure, find_reranker, save_reranker

    tokenizer, name = load_tokenizer(find_reranker(str(root / "bert")), False), str(root / "bert")
    torch.manual_seed(0)
    config = configure(AutoConfig.from_pretrained(name), tokenizer, name)
    scorer = PairScorer(AutoModelForSequenceClassification.from_config(config), False)
    card = RerankerCard(name, PairFormat.of(tokenizer, 30), None)
    (root / "ranker").mkdir()
    save_reranker(scorer, scorer.state_dict(), tokenizer, card, root / "ranker")
