"""recipes/benchmark.py: mteb's own measures of sentence-transformers beside it, and jobs that are killed."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from tiny import check, launch, leave_out_when_fast, load_recipe, make_model, sentence, start

from ds_embed.settings.errors import UserError

INSTRUCTION = "w7 {instruction} w8 "


@pytest.fixture(scope="module", autouse=True)
def not_when_fast():
    leave_out_when_fast()  # mteb takes seconds to import


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A sentence-transformers folder with prompts of its own."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    root = tmp_path_factory.mktemp("model")
    transformer = Transformer(str(make_model(root / "bert", "bert")), max_seq_length=64)
    modules = [transformer, Pooling(32, "mean"), Normalize()]
    prompts = {"query": "w1 w2 ", "document": "w3 ", "Classification": "w4 w5 "}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(root / "st"))
    return root / "st"


def make_beir(folder, num_documents, seed=0):
    rng = random.Random(seed)
    (folder / "qrels").mkdir(parents=True)
    documents = [(f"d{i}", sentence(rng, 1, 3) if i % 3 else "", sentence(rng, 4)) for i in range(num_documents)]
    lines = [json.dumps({"_id": name, "title": title, "text": text}) for name, title, text in documents]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    chosen = documents[::4][:40]
    lines = [json.dumps({"_id": f"q{name}", "text": " ".join(text.split()[:3])}) for name, _, text in chosen]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    judged = [f"q{name}\t{name}\t1" for name, *_ in chosen]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return folder


def local_tasks():
    """A retrieval task with instructions for both sides, one of pairs, one of labels: of types with and without sides."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks.classification import AbsTaskClassification
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    rng = random.Random(3)
    texts = [sentence(rng, 3) for _ in range(60)]

    def about(name, kind, measure, **more):
        place = {"path": "none", "revision": "1"}
        rest = {"description": "of this test", "eval_splits": ["test"], "eval_langs": ["eng-Latn"]}
        return TaskMetadata(name=name, type=kind, main_score=measure, dataset=place, **rest, **more)

    class Local(AbsTaskRetrieval):
        metadata = about("Local", "Retrieval", "ndcg_at_10", prompt={"query": "w10 w11", "document": "w12"})

        def load_data(self, *_, **unused):
            rows = [{"id": f"d{i}", "text": text} for i, text in enumerate(texts)]
            asked = [{"id": f"q{i}", "text": " ".join(text.split()[:2])} for i, text in enumerate(texts[::3])]
            right = {f"q{i}": {f"d{3 * i}": 1} for i in range(len(asked))}
            parts = {"queries": Dataset.from_list(asked), "corpus": Dataset.from_list(rows), "relevant_docs": right}
            self.dataset = {"default": {"test": parts | {"top_ranked": None}}}
            self.data_loaded = True

    class Pairs(AbsTaskSTS):
        metadata = about("Pairs", "STS", "cosine_spearman", prompt="w13 w14")
        min_score, max_score = 0, 5

        def load_data(self, *_, **unused):
            grades = random.Random(4)
            halves = zip(texts[:30], texts[30:])
            rows = [{"sentence1": a, "sentence2": b, "score": grades.uniform(0, 5)} for a, b in halves]
            self.dataset = DatasetDict(test=Dataset.from_list(rows))
            self.data_loaded = True

    class Labels(AbsTaskClassification):
        metadata = about("Labels", "Classification", "accuracy", prompt="w15")

        def load_data(self, *_, **unused):
            rows = [{"text": text, "label": text.split()[0] < "w4"} for text in texts]
            rows = [row | {"label": int(row["label"])} for row in rows]
            self.dataset = DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows))
            self.data_loaded = True

    return Local, Pairs, Labels


def scores_of(result):
    return {r.task_name: {k: v for k, v in r.scores["test"][0].items() if type(v) is float} for r in result}


def test_scores_are_those_of_mteb_with_sentence_transformers(model, tmp_path):
    """Instructions of the tasks, the model's prompt of a type, and a prompt for the documents of one task."""
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    from ds_embed.mteb_model import MTEBModel
    from ds_embed.tools.benchmark import measure

    tasks = local_tasks()
    ours = MTEBModel(
        str(model),
        dtype="float32",
        device="cpu",
        instruction_template=INSTRUCTION,
        prompts={"Local-document": "w20 w21 "},
    )
    table = measure(ours, [task() for task in tasks], str(tmp_path)).read_text()
    results = [mteb.results.TaskResult.from_disk(path) for path in tmp_path.glob("results/*/*/[LP]*.json")]
    prompts = {
        "Local-query": "w7 w10 w11 w8 ",
        "Local-document": "w20 w21 ",
        "Pairs": "w7 w13 w14 w8 ",
        "Labels": "w4 w5 ",
    }
    theirs = SentenceTransformerEncoderWrapper(SentenceTransformer(str(model), device="cpu"))
    theirs.model_prompts = prompts
    expected = mteb.evaluate(theirs, [task() for task in tasks], cache=None, co2_tracker=False).task_results
    got, expected = scores_of(results), scores_of(expected)
    assert got.keys() == {"Local", "Pairs", "Labels"} and 0 < got["Local"]["ndcg_at_10"] < 1
    for task, values in expected.items():
        for name, value in values.items():
            assert got[task][name] == pytest.approx(value, abs=2e-6, nan_ok=True), (task, name)
    assert f"| Local | Retrieval | ndcg_at_10 | {100 * expected['Local']['ndcg_at_10']:.2f} |" in table
    assert "| mean of 3 | all |" in table


def flags(model, root, *more):
    return ["--model_name_or_path", model, "--bf16", "false", "--output_dir", root / "out", *more]


def test_killed_and_resumed_on_other_ranks(model, tmp_path):
    """Done tasks are left alone, the rest is measured, all as one uninterrupted process does; changed data are noticed."""
    small, large = make_beir(tmp_path / "small", 80), make_beir(tmp_path / "large", 6000, seed=1)
    own = ["--query_files", small / "queries.jsonl", "--doc_files", small / "corpus.jsonl"]
    own += ["--qrels", small / "qrels" / "test.tsv", "--task_name", "mine", "--micro_batch_tokens", 128]
    words = flags(model, tmp_path, "--tasks", small, large, *own)
    job = start(2, "recipes/benchmark.py", *words, log=tmp_path / "log")
    deadline = time.monotonic() + 300
    while not (found := list(tmp_path.glob("out/results/*/*/small.json"))):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    (done,) = found
    assert not done.with_name("large.json").exists()
    before = done.stat().st_mtime_ns
    again = check(launch(2, "recipes/benchmark.py", *words))
    assert "small: measured before" in again.stderr and "large: measuring" in again.stderr
    assert done.stat().st_mtime_ns == before
    alone = flags(model, tmp_path / "alone", "--tasks", small, large, *own)
    check(launch(0, "recipes/benchmark.py", *alone))
    folders = [done.parent, next((tmp_path / "alone" / "out" / "results").glob("*/*"))]
    assert folders[0].name == folders[1].name
    for name in ("small", "large", "mine"):
        one, other = (json.loads((folder / f"{name}.json").read_text())["scores"] for folder in folders)
        assert one == other
    assert (folders[0] / "table.md").read_text() == (folders[1] / "table.md").read_text()
    scores = [json.loads((folders[0] / f"{name}.json").read_text())["scores"] for name in ("small", "mine")]
    assert scores[0] == scores[1]  # a folder, and its files one by one

    shutil.rmtree(small)
    make_beir(small, 80, seed=5)
    changed = check(launch(0, "recipes/benchmark.py", *alone))
    assert "small: its data set has changed" in changed.stderr and "large: measured before" in changed.stderr
    assert json.loads((folders[1] / "small.json").read_text())["scores"] != scores[0]


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "nothing to measure: give --tasks"),
        (["--tasks", "SciFacts"], "--tasks SciFacts: is not a folder, .* Did you mean: 'SciFact'"),
        (["--tasks", "no/such"], "--tasks no/such: no such folder"),
        (["--tasks", "{small}", "{small}"], "two tasks are called small"),
        (["--tasks", "{small}", "--split", "dev"], "--split dev: there is no .*the splits here are test"),
        (["--tasks", "{small}", "--prompts", "STS"], "--prompts STS: expected KEY=TEXT"),
        (["--tasks", "{small}", "--prompts", "Similar=x"], "--prompts Similar=...: is neither one of the tasks"),
        (["--tasks", "{small}", "--instruction_template", "Instruct: "], "must contain {instruction}"),
        (["--query_files", "{small}/queries.jsonl"], "give --doc_files too"),
        (["--tasks", "{small}", "--qrels", "{small}"], "--qrels .*: has no effect without --query_files"),
        (["--tasks", "{bad}"], "document 'd999' is not among the texts"),
        (["--tasks", "{asked}"], "queries.jsonl:4: brings a prompt of its own, and mteb encodes all queries of a task"),
    ],
)
def test_what_is_refused(model, tmp_path, given, message):
    small, bad = make_beir(tmp_path / "small", 12), make_beir(tmp_path / "bad", 12)
    with open(bad / "qrels" / "test.tsv", "a") as file:
        file.write("qd0\td999\t1\n")
    asked = make_beir(tmp_path / "asked", 12)
    with open(asked / "queries.jsonl", "a") as file:
        file.write('{"_id": "more", "text": "w1", "prompt": "w2 "}\n')
    words = [str(word).format(small=small, bad=bad, asked=asked, instruction="{instruction}") for word in given]
    with pytest.raises(UserError, match=message):
        load_recipe("benchmark").main([str(word) for word in flags(model, tmp_path, *words)])
