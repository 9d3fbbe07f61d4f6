"""Rerankers: the gradient contract, pairs as tokens, and runs as users start them."""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import torch
from test_cross_encoders import make_classifier
from tiny import (
    REPOSITORY,
    check,
    launch,
    leave_out_when_fast,
    load_recipe,
    make_model,
    make_training_file,
    sentence,
    start,
    write_teacher_scores,
)

from ds_embed.data.pairs import PairFormat
from ds_embed.job.ranks import World
from ds_embed.models.loading import load_tokenizer
from ds_embed.models.reranker import find_reranker, pair_tokenizer, save_reranker
from ds_embed.settings.errors import UserError

sys.path.append(str(REPOSITORY / "tests" / "workers"))
TEMPLATE = r"w80 {query}\nw81 {document} w82"
# Flags of each case; all have 5 queries with 3 documents each.
CASES = {
    "listwise": ["bert", 2, "--micro_batch_tokens", 90],
    "bce": ["bert", 0, "--loss", "bce", "--grad_cache", "true", "--micro_batch_tokens", 60],
    "kl": ["bert", 3, "--loss", "kl", "--distillation_temperature", 2, "--micro_batch_tokens", 90],
    "decoder": ["llama", 1, "--lora_rank", 0, "--grad_cache", "true", "--micro_batch_tokens", 90],
    "template": ["llama", 2, "--lora_rank", 4, "--template", TEMPLATE, "--gradient_checkpointing", "true"],
    "words": ["llama", 3, "--lora_rank", 0, "--yes_no", "w5", "w6"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("rerankers")
    make_bert(root / "bert")
    make_model(root / "llama", "llama")
    _with_language_head(root / "llama")
    write_teacher_scores(make_training_file(root / "train.jsonl", 24, num_negatives=3))
    return root


def make_bert(folder):
    """A tiny BERT whose tokenizer gives token types, as BERT's do."""
    make_model(folder, "bert")
    path = folder / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | names))


def _with_language_head(folder):
    """The tiny decoder as a language model, whose words have logits."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.model.load_state_dict(AutoModel.from_pretrained(folder).state_dict())
    model.save_pretrained(folder)


def flags_of(root, name, *more):
    kind, stage, *flags = CASES[name]
    fixed = ["--model_name_or_path", root / kind, "--train_files", root / "train.jsonl", "--deepspeed", f"zero{stage}"]
    fixed += ["--bf16", "false", "--global_batch_size", 5, "--hard_negatives", 2, "--max_length", 30]
    fixed += ["--cache_dir", root / "cache", "--report_to", "none", "--output_dir", root / f"none-{name}"]
    return [str(word) for word in [*fixed, *flags, *more]]


@pytest.fixture(scope="module")
def results(place):
    def of(num_ranks):
        leave_out_when_fast()
        out = place / f"ranks{num_ranks}"
        if not out.exists():
            out.mkdir()
            (out / "cases.json").write_text(json.dumps({name: flags_of(place, name) for name in CASES}))
            check(launch(num_ranks, "tests/workers/reranking.py", out / "cases.json", out))
        return {name: np.load(out / f"{name}.npz") for name in CASES}

    return of


def reference(root, name):
    """Loss and gradients by transformers' own call with two texts, in float64, and autograd."""
    from reranking import fill_lora, start
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, kl_div

    run = start(World.alone(), flags_of(root, name, "--deepspeed", "zero0"))
    batch = run.batch(4)
    scorer = run._load_encoder()
    fill_lora(scorer)
    scorer.double().eval()
    records = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    losses = []
    tokenizer = pair_tokenizer(run.tokenizer, run.card)
    for number in batch.records.tolist():
        record = records[number]
        documents = [record["pos_doc"], *record["neg_doc"][:2]]
        queries = [record["query"]] * len(documents)
        inputs = tokenizer(queries, documents, truncation=True, padding=True, return_tensors="pt")
        scores = scorer.model(**inputs).logits[:, 0]
        teacher = torch.tensor([record["pos_score"], *record["neg_scores"][:2]], dtype=torch.float64)
        if name == "bce":
            losses.append(binary_cross_entropy_with_logits(scores, torch.eye(3, dtype=torch.float64)[0]))
        elif name == "kl":
            losses.append(kl_div(scores.log_softmax(0), (teacher / 2).softmax(0), reduction="sum"))
        else:
            losses.append(cross_entropy(scores[None], torch.tensor([0])))
    loss = torch.stack(losses).mean()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in scorer.named_parameters() if p.requires_grad}


_references = {}


@pytest.mark.parametrize("num_ranks, name", [(ranks, name) for ranks in (1, 2, 4) for name in CASES])
def test_gradient_equals_float64_reference(num_ranks, name, results, place):
    found = results(num_ranks)[name]
    if name not in _references:
        _references[name] = reference(place, name)
    loss, gradients = _references[name]
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    # A weight that no score depends on, such as the embedding of positions never seen, has no gradient at all.
    wanted = {n: np.zeros_like(found[n]) if g is None else g.numpy() for n, g in gradients.items()}
    got, want = (np.concatenate([part[n].ravel() for n in wanted]) for part in (found, wanted))
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want) > 0


@pytest.mark.parametrize("kind, template", [("bert", None), ("llama", TEMPLATE)])
def test_pairs_are_those_of_a_plain_call(place, kind, template):
    """Truncated or not, from texts that were tokenized one by one."""
    from reranking import start

    run = start(World.alone(), flags_of(place, "template" if template else "listwise", "--deepspeed", "zero0"))
    tokenizer, form = pair_tokenizer(run.tokenizer, run.card), run.card.pair_format
    batch = run.batch(0)
    ids, lengths, first = form.collate(run.store, batch.texts)
    words = ["\n".join(_decoded(run, text) for text in pair) for pair in batch.texts]
    rng, cut = random.Random(1), 0
    for row, length, text in zip(ids, lengths, words):
        expected = tokenizer(*text.split("\n"), truncation=True)["input_ids"]
        assert row[:length].tolist() == expected
        cut += len(expected) == 30
    assert 0 < cut < len(words)
    for _ in range(300):
        query, document = sentence(rng, 1, 40), sentence(rng, 1, 40)
        counts = [np.array([len(text.split())]) for text in (query, document)]
        left = form.truncated(*counts)
        assert form.num_around + left[0][0] + left[1][0] == len(
            tokenizer(query, document, truncation=True)["input_ids"]
        )
        middle = tokenizer(query, document, truncation=True)["input_ids"][len(form.head) :][: left[0][0]]
        assert middle == tokenizer(query, "w1", truncation=False)["input_ids"][len(form.head) :][: left[0][0]]


def _decoded(run, text):
    before, behind = run.card.pair_format.around
    ids = run.store.tokens_of(int(text))
    return run.tokenizer.decode(ids[before : len(ids) - behind])


def losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], [line for line in lines if "nDCG@10" in line]


def train(root, num_ranks, name, run, *more):
    flags = flags_of(root, name, "--max_steps", 6, "--learning_rate", "1e-3", *more)
    return check(launch(num_ranks, "recipes/train_reranker.py", *flags, "--output_dir", root / run))


@pytest.mark.parametrize("name", ["listwise", "template", "words"])
def test_runs_are_equal_on_ranks_resume_and_open_elsewhere(place, name):
    """1 and 2 ranks; stopped and resumed to the bit; CrossEncoder's scores are those of the run."""
    from safetensors.torch import load_file
    from sentence_transformers import CrossEncoder

    val = ["--val_files", place / "train.jsonl", "--val_check_interval", 3, "--save_interval", 2]
    train(place, 2, name, f"{name}-2", *val)
    assert "rerank with: ds-embed rerank --model_name_or_path" in train(place, 1, name, f"{name}-1", *val).stderr
    (one, measured), (two, _) = losses(place / f"{name}-1"), losses(place / f"{name}-2")
    assert len(one) == 6 and one == pytest.approx(two, rel=1e-4)
    assert [line["step"] for line in measured] == [3, 6] and 0 < measured[-1]["nDCG@10"] <= 1
    for step in ("00000004", "00000006"):  # as if it had been killed after the second step
        shutil.rmtree(place / f"{name}-1" / "checkpoints" / f"step_{step}", ignore_errors=True)
    before = load_file(place / f"{name}-1" / "model" / "model.safetensors")
    train(place, 1, name, f"{name}-1", *val)
    assert losses(place / f"{name}-1")[0] == one
    after = load_file(place / f"{name}-1" / "model" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)

    texts = [(sentence(random.Random(i), 1, 9), sentence(random.Random(i + 50), 1, 40)) for i in range(40)]
    theirs = CrossEncoder(str(place / f"{name}-1" / "model"), device="cpu").predict(texts)
    ours = score(place / f"{name}-1", texts)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.std(theirs) > 1e-3


def score(run, texts):
    from ds_embed.vectors.cross_encoder import CrossEncoder

    return CrossEncoder(World.alone(), str(run), flag="model_name_or_path").score(texts)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--template", "{document} {query}"], "--template .*once each, in this order"),
        (["--yes_no", "w1"], "--yes_no w1: give exactly two words"),
        (["--yes_no", "w1", "w2"], "is not a decoder"),
        (
            ["--yes_no", "w1", "w2", "--model_name_or_path", "{headless}"],
            "has no weights lm_head.weight, so words have no",
        ),
        (
            ["--model_name_or_path", "{chat}"],
            "--template: .*chat reads pairs with its tokenizer's chat template, which can't",
        ),
        (["--max_length", 1000], "--max_length 1000: .*has positions for 128 tokens"),
        (["--max_length", 4], "--max_length 4: leaves no room"),
        (["--loss", "cosine"], "--loss cosine: choose one of listwise, bce, kl"),
        (["--hard_negatives", 0], "--hard_negatives 0: must be at least 1"),
        (["--lora_variant", "dora", "--lora_rank", 4], "--lora_variant dora: rerankers support lora and rslora"),
        (["--model_name_or_path", "no/such/model"], "no such folder"),
        (["--temperature", 1], "unknown flag --temperature"),
        (["--train_files", "{plain}", "--loss", "kl"], "which --loss kl needs in every record"),
        (["--train_files", "{bare}"], "no record has a neg_doc"),
    ],
)
def test_what_is_refused(place, given, message):
    make_training_file(place / "plain.jsonl", 12, num_negatives=3)
    make_training_file(place / "bare.jsonl", 12, num_negatives=0)
    if "{headless}" in given:
        make_model(place / "headless", "llama")
    if "{chat}" in given:
        make_classifier(place / "chat", "llama")
        (place / "chat" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    places = dict(
        plain=place / "plain.jsonl", bare=place / "bare.jsonl", headless=place / "headless", chat=place / "chat"
    )
    words = [str(word).format(**places, query="{query}", document="{document}") for word in given]
    with pytest.raises(UserError, match=message):
        load_recipe("train_reranker").main(in_place(flags_of(place, "listwise"), words))


def in_place(flags, words):
    """The flags, and behind them these words instead of those of the same flag."""
    flags = list(map(str, flags))
    at = flags.index(words[0]) if words[0] in flags else len(flags)
    return flags[:at] + flags[at + 2 :] + words


def test_a_reranker_is_no_embedder(place):
    from ds_embed import Embedder

    if not (place / "listwise-1" / "model").exists():
        train(place, 1, "listwise", "listwise-1")
    with pytest.raises(UserError, match="is a reranker's, which makes no vectors"):
        Embedder.from_pretrained(place / "listwise-1")


@pytest.mark.parametrize("name", ["listwise", "template"])
def test_an_export_is_compared_with_cross_encoder_before_it_has_its_name(place, tmp_path, capsys, name):
    from sentence_transformers import CrossEncoder

    run, export = place / f"{name}-1", load_recipe("export").main
    if not (run / "model").exists():
        train(place, 1, name, f"{name}-1")
    export(["--run", str(run), "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "checked CrossEncoder in float32: " in printed and f"written to {tmp_path / 'out'}" in printed
    texts = [(sentence(random.Random(i), 1, 9), sentence(random.Random(i + 50), 1, 60)) for i in range(20)]
    expected = CrossEncoder(str(tmp_path / "out"), device="cpu").predict(texts)
    np.testing.assert_allclose(score(run, texts), expected, atol=1e-5)
    for heading in ("With sentence-transformers", "With transformers alone"):
        code = (tmp_path / "out" / "README.md").read_text().split(f"{heading}:\n\n```python\n")[1].split("```")[0]
        with contextlib.chdir(tmp_path):
            exec(code, {})
    export(["--run", str(run), "--output_dir", str(tmp_path / "half"), "--dtype", "float16"])
    assert "checked weights rounded to float16: correlation 0.99" in capsys.readouterr().out
    assert score(tmp_path / "half", texts) == pytest.approx(expected, abs=0.1)
    last = max((run / "checkpoints").glob("step_*"))
    with pytest.raises(UserError, match="is a checkpoint; make a model of it first, by ds-embed export --run .*step_"):
        score(last, texts)
    for number, given in enumerate((["--run", str(last)], ["--run", str(run), "--step", last.name.split("_")[1]])):
        export([*given, "--output_dir", str(tmp_path / f"last{number}")])
        np.testing.assert_allclose(score(tmp_path / f"last{number}", texts), expected, atol=1e-4)
        shutil.rmtree(tmp_path / f"last{number}")
    # A folder that CrossEncoder would read in another way: it puts a sigmoid behind the scores.
    broken = shutil.copytree(run / "model", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["sentence_transformers"]["activation_fn"] = "torch.nn.modules.activation.Sigmoid"
    (broken / "config.json").write_text(json.dumps(config))
    for given, message in (
        (
            ["--run", str(broken)],
            "CrossEncoder gives other scores than the run .largest difference .*nothing was written",
        ),
        (["--run", str(run), "--format", "adapter"], "is a reranker, which is a whole model"),
        (["--run", str(run), "--step", "2000"], "--step 2000: .* has no checkpoint of that step"),
    ):
        with pytest.raises(UserError, match=message):
            export([*given, "--output_dir", str(tmp_path / "none")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "half", "out"]


def test_a_pair_format_needs_a_word_between(place):
    tokenizer = load_tokenizer(find_reranker(str(place / "bert")), False)
    form = PairFormat.of(tokenizer, 20)
    assert form.head == (2,) and form.middle == (3,) and form.tail == (3,) and form.has_types


def test_words_score_as_their_logits_at_the_start(place):
    from reranking import start
    from transformers import AutoModelForCausalLM

    run = start(World.alone(), flags_of(place, "words", "--deepspeed", "zero0"))
    scorer, batch = run._load_encoder().eval(), run.batch(0)
    ids, lengths, first = map(torch.from_numpy, run.card.pair_format.collate(run.store, batch.texts))
    with torch.no_grad():
        scores = scorer(ids, lengths, True, first)[:, 0]
        logits = AutoModelForCausalLM.from_pretrained(place / "llama")(input_ids=ids).logits
    last = logits[torch.arange(len(ids)), lengths - 1]
    words = run.tokenizer.convert_tokens_to_ids(["w5", "w6"])
    np.testing.assert_allclose(scores, last[:, words[0]] - last[:, words[1]], atol=1e-4)


@pytest.fixture(scope="module")
def found(place):
    """Queries, documents, a run file of 20 documents for each of 200 queries, and a reranker that is not trained."""
    from reranking import start

    rng = random.Random(8)
    for name, key, number in (("queries", "query", 200), ("docs", "pos_doc", 300)):
        ids = {"queries": "query_id", "docs": "doc_id"}[name]
        lines = [json.dumps({key: sentence(rng, 2), ids: f"{name[0]}{i}"}) for i in range(number)]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    lines = [f"q{q} Q0 d{d} {i} {20 - i} x" for q in range(200) for i, d in enumerate(rng.sample(range(300), 20))]
    (place / "run.trec").write_text("\n".join(lines) + "\n")
    run = start(World.alone(), flags_of(place, "listwise", "--deepspeed", "zero0"))
    scorer = run._load_encoder()
    (place / "untrained" / "model").mkdir(parents=True)
    save_reranker(scorer, dict(scorer.state_dict()), run.tokenizer, run.card, place / "untrained" / "model")
    return place


def rerank_flags(root, output, *more):
    flags = ["--model_name_or_path", root / "untrained", "--run_file", root / "run.trec", "--top_k", 12]
    flags += ["--query_files", root / "queries.jsonl", "--doc_files", root / "docs.jsonl"]
    return [str(word) for word in [*flags, "--output_file", output, *more]]


def test_rerank_goes_on_after_a_kill(found, tmp_path):
    """Scores are CrossEncoder's, of the best 12 of the run file; killed on 2 ranks, one process goes on to the same bytes."""
    from sentence_transformers import CrossEncoder

    from ds_embed.vectors.metrics import load_run

    check(launch(0, "recipes/rerank.py", *rerank_flags(found, tmp_path / "whole.trec")))
    got, before = load_run(tmp_path / "whole.trec"), load_run(found / "run.trec")
    texts = [{r[key]: r[text] for r in map(json.loads, open(found / name))} for name, (key, text) in TEXTS]
    theirs = CrossEncoder(str(found / "untrained" / "model"), device="cpu")
    for query in ("q0", "q77", "q199"):
        best = sorted(before[query], key=before[query].get, reverse=True)[:12]
        assert got[query].keys() == set(best)
        expected = theirs.predict([(texts[0][query], texts[1][name]) for name in best])
        np.testing.assert_allclose([got[query][name] for name in best], expected, atol=1e-4)

    output = tmp_path / "killed.trec"
    slow = ["--micro_batch_tokens", 32]
    job = start(2, "recipes/rerank.py", *rerank_flags(found, output, *slow), log=tmp_path / "log")
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("killed.trec.work/chunk_*")):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    assert not output.exists()
    changed = launch(0, "recipes/rerank.py", *rerank_flags(found, output, *slow, "--top_k", 9))
    assert changed.returncode == 2 and "top_k was 12 and is 9" in changed.stderr
    again = check(launch(0, "recipes/rerank.py", *rerank_flags(found, output, *slow)))
    assert "going on with what" in again.stderr
    check(launch(0, "recipes/rerank.py", *rerank_flags(found, tmp_path / "slow.trec", *slow)))
    assert output.read_bytes() == (tmp_path / "slow.trec").read_bytes() and not list(tmp_path.glob("*.work"))


TEXTS = (("queries.jsonl", ("query_id", "query")), ("docs.jsonl", ("doc_id", "pos_doc")))


@pytest.mark.parametrize(
    "given, message",
    [
        (["--output_file", "{root}/run.trec"], "--output_file .*: exists; remove"),
        (["--doc_files", "{root}/queries.jsonl"], "pos_doc is missing"),
        (["--query_files", "{root}/one.jsonl"], "--query_files: 199 of the 200 ids to rerank have no text"),
        (["--embeddings", "{root}"], "give either --run_file or --embeddings"),
        (["--model_name_or_path", "{root}/bert"], "has no trained classifier"),
        (["--max_length", 500], "--max_length 500: the model has positions for 128 tokens"),
        (["--top_k", 0], "--top_k 0: must be greater than 0"),
    ],
)
def test_what_rerank_refuses(found, tmp_path, given, message):
    (found / "one.jsonl").write_text(open(found / "queries.jsonl").readline())
    words = [str(word).format(root=found) for word in given]
    with pytest.raises(UserError, match=message):
        load_recipe("rerank").main(in_place(rerank_flags(found, tmp_path / "out.trec"), words))


def test_mining_takes_the_run(found, tmp_path):
    from ds_embed.vectors.cross_encoder import CrossEncoder

    flags = ["--method", "bm25", "--train_files", found / "train.jsonl", "--output_file", tmp_path / "mined.jsonl"]
    flags += ["--cross_encoder", found / "untrained", "--num_negatives", 2]
    check(launch(0, "recipes/mine_negatives.py", *flags))
    records = [json.loads(line) for line in open(tmp_path / "mined.jsonl")]
    pairs = [(record["query"], record["pos_doc"]) for record in records]
    scores = CrossEncoder(World.alone(), str(found / "untrained")).score(pairs)
    np.testing.assert_allclose([record["pos_score"] for record in records], scores, atol=1e-5)
