"""Two steps on two ranks: the losses of a file in any form are those of the same data in our own form."""

import json

from data_forms import ROWS, jsonl, write_containers, write_forms
from tiny import launch, make_model, make_tokenizer


def test_losses_are_those_of_our_own_form(tmp_path):
    model = make_model(tmp_path / "model", "bert")
    make_tokenizer(model, bert=True)
    for folder in ("forms", "containers"):
        (tmp_path / folder).mkdir()
    forms, containers = write_forms(tmp_path / "forms"), write_containers(tmp_path / "containers")
    chosen = ("own", "flag_embedding", "tevatron1", "tevatron2", "automodel_corpus", "sentence_transformers")
    chosen += ("ms_swift_messages", "f2llm", "columns", "in_order")
    cases = {name: ([forms[name][0]], forms[name][1]) for name in chosen}
    cases |= {name: ([containers[name]], {}) for name in ("lines.jsonl.zst", "table.tsv", "folder", "saved_split")}
    # Siblings: two positives of one record, with and without a query_id.
    sibling = [{"query": q, "pos": [*p, f"w3{i}"], "neg": n} for i, (q, p, n) in enumerate(ROWS)]
    apart = [
        {"query": row["query"], "pos_doc": positive, "neg_doc": row["neg"], "query_id": i}
        for i, row in enumerate(sibling)
        for positive in row["pos"]
    ]
    cases["siblings"] = [str(jsonl(tmp_path / "siblings.jsonl", sibling))], {}
    cases["siblings_apart"] = [str(jsonl(tmp_path / "apart.jsonl", apart))], {}
    cases["siblings_random"] = cases["siblings"][0], {"positives": "random"}
    work = {"model": str(model), "cache": str(tmp_path / "cache"), "cases": cases}
    (tmp_path / "cases.json").write_text(json.dumps(work))
    done = launch(2, "tests/workers/forms.py", tmp_path / "cases.json", tmp_path / "losses.json")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads((tmp_path / "losses.json").read_text())
    siblings, siblings_apart = losses.pop("siblings"), losses.pop("siblings_apart")
    assert siblings == siblings_apart
    assert losses.pop("siblings_random") != siblings
    assert losses["own"][0] > losses["own"][1] > 0
    assert all(values == losses["own"] for values in losses.values()), losses
