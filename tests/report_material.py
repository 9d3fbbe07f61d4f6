"""A run and its vectors for reports, written by tests in the formats of training and generate."""

import json

import numpy as np

from ds_embed.settings import ReportArguments
from ds_embed.tools.report.build import build_report

EVIL = "<script>document.title='broken'</script> \"&' $x$"


def write_run(folder, num_steps=60, validated=(), **changes):
    """A run's folder as training leaves it, with a loss that falls from about 200 to 1."""
    rng = np.random.default_rng(num_steps)
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, num_steps + 1):
        line = {"step": step, "loss": 200 ** (1 - step / num_steps) * rng.uniform(0.9, 1.1), "accuracy": step / 100}
        line |= {"positive_similarity": 0.5, "negative_similarity": 0.4, "temperature": 0.02, "learning_rate": 1e-4}
        line |= {"grad_norm": rng.uniform(1, 2), "consumed_samples": 8 * step, "seconds": 0.5}
        lines.append(line | {"tokens_per_second": 1000.0, "padding_share": 0.1})
        if step in validated:
            place = {"step": step, "consumed_samples": 8 * step, "seconds": 2.0}
            measures = {"nDCG@10": step / 120, "RR@10": 0.4, "val_loss": 3 + step / 60, "val_accuracy": 0.25}
            lines.append(place | measures)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"model_name_or_path": "models/tiny", "train_files": ["a.jsonl"], "global_batch_size": 8}
    settings |= {"hard_negatives": 1, "lora_rank": 0, "grad_cache": False, "max_steps": num_steps} | changes
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    (folder / "ds_config.json").write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    return folder


def write_retrieval(folder, num_queries=40, num_documents=300):
    """Vectors, queries and documents: query i is near document i; q0 is opposite to it. Texts are evil."""
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(num_documents, 8))
    queries = documents[:num_queries] + rng.normal(size=(num_queries, 8))
    queries[0] = -documents[0]
    for kind, rows in (("doc", documents), ("query", queries)):
        names = [f"{kind[0]}{i}" for i in range(len(rows))]
        subfolder = folder / {"query": "test_queries", "doc": "test_docs"}[kind]
        subfolder.mkdir(parents=True)
        np.save(subfolder / f"{kind}.npy", (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32))
        (subfolder / f"{kind}.ids").write_text("".join(f"{name}\n" for name in names))
    lines = [{"query": f"query {i} {EVIL}", "query_id": f"q{i}", "doc_id": f"d{i}"} for i in range(num_queries)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"pos_doc": f"document {i} {EVIL}", "doc_id": f"d{i}"} for i in range(num_documents)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {"query_files": [str(folder / "queries.jsonl")], "doc_files": [str(folder / "docs.jsonl")]}
    return {"embeddings": str(folder)} | files


def report(run, **flags):
    path, _ = build_report(ReportArguments(run=str(run), **flags))
    return path.read_text(encoding="utf-8")
