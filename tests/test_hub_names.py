"""Models by hub name: a local cache stands for the hub. An adapter at a revision, on its base at another."""

import json
import shutil

import numpy as np
from test_export_bidirectional import TEXTS, make_run
from tiny import check, launch, make_model

from ds_embed import Embedder

SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType
from ds_embed import Embedder
from ds_embed.models.loading import find_model
from ds_embed.mteb_model import MTEBModel

out, texts = Path(sys.argv[1]), {texts}
rest = dict(dtype="float32", device="cpu")
source = find_model("me/adapter", revision="first")
print(source.base, source.revision, source.adapter.name[:3], source.card.query_prefix)
np.save(out / "hub.npy", Embedder.from_pretrained("me/adapter", revision="first", **rest).encode_queries(texts))

def task(name, kind, **more):
    return TaskMetadata(name=name, description="", type=kind, main_score="x", dataset=dict(path="x", revision="x"),
                        eval_splits=["test"], eval_langs=["eng-Latn"], **more)

tasks = dict(said=task("Said", "Retrieval", prompt=dict(query="w1 w2")), unsaid=task("Unsaid", "Retrieval"),
             sts=task("Same", "STS", prompt="w3"))
plain = MTEBModel("me/adapter", "first", **rest)
asked = MTEBModel("me/adapter", "first", instruction_template="w7 {{instruction}} ", **rest)
revisions = [model.mteb_model_meta.revision for model in (plain, asked, MTEBModel("me/adapter", "first", pooling="last", **rest))]
assert all(name.startswith("first-") for name in revisions) and len(set(revisions)) == 3, revisions
for name, kind in (("said", PromptType.query), ("said", PromptType.document), ("unsaid", PromptType.query), ("sts", None)):
    for which, model in (("plain", plain), ("asked", asked)):
        vectors = model.encode([dict(text=texts)], task_metadata=tasks[name], prompt_type=kind)
        np.save(out / f"{{which}}-{{name}}-{{kind.value if kind else None}}.npy", vectors)
"""


def publish(folder, repository, ref, commit, **changes):
    """The folder as what `ref` names in a repository in the cache, with changes to its adapter_config.json."""
    target = repository / "snapshots" / (commit * 40)
    shutil.copytree(folder, target)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit * 40)
    if changes:
        content = json.loads((target / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(content | changes))
    return target


def test_adapters_and_mteb_at_a_revision(tmp_path):
    run = make_run(tmp_path, "llama", lora=4)
    other = make_model(tmp_path / "other", "llama", seed=9)
    hub = tmp_path / "hub"
    publish(other, hub / "models--me--base", "main", "a")
    publish(tmp_path / "llama", hub / "models--me--base", "old", "b")
    named = dict(base_model_name_or_path="me/base", revision="old")
    target = publish(run / "model", hub / "models--me--adapter", "first", "c", **named)
    card = json.loads((target / "ds_embed.json").read_text()) | {"prompts": {"STS": "w5 w6 "}, "base_model": "me/base"}
    (target / "ds_embed.json").write_text(json.dumps(card))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(texts=TEXTS))
    result = check(launch(0, script, tmp_path, environment={"HF_HUB_CACHE": str(hub)}, fork=False))
    assert "me/base old ccc find: " in result.stdout
    local = Embedder.from_pretrained(run, dtype="float32", device="cpu")
    queries, documents = local.encode_queries(TEXTS), local.encode_documents(TEXTS)
    expected = {
        "hub": queries,
        "plain-said-query": queries,
        "plain-said-document": documents,
        "plain-unsaid-query": queries,
        "plain-sts-None": local.encode_queries(TEXTS, prefix="w5 w6 "),
        "asked-said-query": local.encode_queries(TEXTS, prefix="w7 w1 w2 "),
        "asked-unsaid-query": queries,  # no instruction anywhere
        "asked-said-document": documents,  # an instruction is the query's
        "asked-sts-None": local.encode_queries(TEXTS, prefix="w5 w6 "),  # the model's own comes before mteb's
    }
    for name, vectors in expected.items():
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), vectors, atol=1e-5, err_msg=name)


def test_a_hub_that_cant_be_reached_is_not_taken_for_an_answer(tmp_path):
    """Files that are cached are taken, and those known not to exist count as such; nothing else is."""
    folder = publish(make_model(tmp_path / "bert", "bert"), tmp_path / "hub" / "models--me--bert", "main", "a")
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom ds_embed import Embedder\ntime.sleep = lambda seconds: None  # between attempts\n"
        "try:\n    print(Embedder.from_pretrained('me/bert', device='cpu').card.pooling)\n"
        "except ValueError as error:\n    print(type(error).__name__, error)\n"
    )
    there = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    (line,) = check(launch(0, script, environment=there, fork=False)).stdout.splitlines()
    assert line.startswith(
        "UserError me/bert: no folder here, and the hub can't be reached to see whether the model has"
    )
    assert "HF_HUB_OFFLINE=1" in line
    offline = there | {"HF_HUB_OFFLINE": "1"}
    assert check(launch(0, script, environment=offline, fork=False)).stdout.split() == ["mean"]
    gone = folder.parents[1] / ".no_exist" / folder.name
    gone.mkdir(parents=True)
    for name in ("adapter_config.json", "ds_embed.json", "modules.json", "config_sentence_transformers.json"):
        (gone / name).touch()
    assert check(launch(0, script, environment=there, fork=False)).stdout.split() == ["mean"]
