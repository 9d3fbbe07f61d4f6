"""Training files with everything that mining has to tell apart, their vectors, and a plain reference."""

import json

import numpy as np

from ds_embed.job.ranks import World
from ds_embed.settings import ModelArguments, TextArguments
from ds_embed.settings.tool_arguments import MiningArguments
from ds_embed.tools.mine.job import mine

ONE_PROCESS = World.alone()


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_vectors(folder, queries, documents):
    """A folder as recipes/generate.py writes it, from {id: vector}."""
    for kind, subfolder, vectors in (("query", "test_queries", queries), ("doc", "test_docs", documents)):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
        np.save(folder / subfolder / f"{kind}.npy", np.array(list(vectors.values()), dtype=np.float32))
        (folder / subfolder / f"{kind}.ids").write_text("".join(f"{name}\n" for name in vectors))
    return folder


def run(root, output, model=None, text=None, world=ONE_PROCESS, **settings):
    """Mine in this process; `model` is a folder. Returns the records that were written, and the summary."""
    settings = {"train_files": [str(root / "train.jsonl")], "output_file": str(root / output)} | settings
    arguments = MiningArguments(**settings)
    model = ModelArguments("" if model is None else str(model))
    mine(world, model, text or TextArguments(), arguments)
    assert not (root / f"{output}.work").exists()
    return read_jsonl(root / output), json.loads((root / f"{output}.summary.json").read_text())


def unit(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def make_files(root, seed=0):
    """60 records: queries on several records, one query_id with two texts, copies of documents in other
    case and spacing, one doc_id on two texts, a document that is a query's text, extra fields; and vectors."""
    rng = np.random.default_rng(seed)
    names = [f"Document {i} about w{i % 7}" for i in range(40)]
    documents = [(name, f"d{i}") for i, name in enumerate(names)]
    documents += [(f"  {names[i].upper()}\n", f"copy{i}") for i in range(5)]
    documents += [("another text of document 6", "d6"), ("QUERY  3", "selfish")]
    records = []
    for number in range(60):
        text, doc_id = documents[number % len(documents)]
        query = number % 23
        record = {"source": {"n": number}, "query": f"query {query}", "pos_doc": text, "doc_id": doc_id}
        record["query_id"] = "q0" if query == 1 else f"q{query}"
        if number % 3 == 0:
            record["neg_doc"] = [names[(number + 7) % 40], names[(number + 11) % 40].lower()]
            record["neg_scores"], record["pos_score"] = [9, 9], 9
        if number % 3 == 1:
            record["neg_doc"] = names[(number + 9) % 40]
        record["tail"] = 1.5
        records.append(record)
    write_jsonl(root / "train.jsonl", records)
    query_vectors = {record["query_id"]: unit(rng.standard_normal(6)) for record in records}
    document_vectors = {doc_id: unit(rng.standard_normal(6)) for _, doc_id in documents}
    document_vectors |= {"selfish": query_vectors["q3"], "d6": query_vectors["q6"]}  # so that they would be found
    write_vectors(root / "vectors", query_vectors, document_vectors)
    return records, query_vectors, document_vectors


def same(text):
    return " ".join(text.casefold().split())


def reference(records, query_vectors, document_vectors, arguments, corpus=None):
    """Per record: allowed (text, score) best first; positive score; how many candidates each rule took out.

    corpus: (text, id) of the documents to choose from. Scores are float64 inner products, rounded once.
    """
    corpus = corpus or [(record["pos_doc"], record["doc_id"]) for record in records]
    first, ids_of = {}, {}
    for text, doc_id in corpus:
        first.setdefault(same(text), (text, doc_id))
        ids_of.setdefault(same(text), set()).add(doc_id)
    candidates = set(first)
    for record in records:  # positives that are no candidates have vectors too
        first.setdefault(same(record["pos_doc"]), (record["pos_doc"], record["doc_id"]))
        ids_of.setdefault(same(record["pos_doc"]), set()).add(record["doc_id"])
    order = {key: place for place, key in enumerate(first)}

    def score(record, key):
        query, document = query_vectors[record["query_id"]], document_vectors[first[key][1]]
        return float(np.float32(np.dot(query.astype(np.float64), document.astype(np.float64))))

    results = []
    for record in records:
        ids, texts = {record["query_id"]}, {record["query"]}
        for _ in records:  # queries that share a text or an id, however far
            ids |= {r["query_id"] for r in records if r["query"] in texts}
            texts |= {r["query"] for r in records if r["query_id"] in ids}
        group = [r for r in records if r["query"] in texts]
        positives = {same(r["pos_doc"]) for r in group}
        doc_ids = {r["doc_id"] for r in group}
        excluded = positives | {key for key in first if ids_of[key] & doc_ids} | {same(text) for text in texts}
        pool = sorted((key for key in candidates - excluded), key=lambda key: (-score(record, key), order[key]))
        pool = pool[: arguments.num_candidates]
        lowest = min(score(record, key) for key in positives)
        existing = record.get("neg_doc", []) if arguments.keep_existing else []
        existing = {same(text) for text in ([existing] if isinstance(existing, str) else existing)}
        dropped = dict.fromkeys(
            ["absolute_margin", "relative_margin", "max_score", "min_score", "existing", "range_min"], 0
        )
        allowed = []
        for key in pool:
            value = score(record, key)
            if arguments.absolute_margin is not None and value > lowest - arguments.absolute_margin:
                dropped["absolute_margin"] += 1
            elif arguments.relative_margin is not None and value > lowest - abs(lowest) * arguments.relative_margin:
                dropped["relative_margin"] += 1
            elif arguments.max_score is not None and value > arguments.max_score:
                dropped["max_score"] += 1
            elif arguments.min_score is not None and value < arguments.min_score:
                dropped["min_score"] += 1
            elif key in existing:
                dropped["existing"] += 1
            else:
                allowed.append((first[key][0], value))
        dropped["range_min"] = min(arguments.range_min, len(allowed))
        results.append((allowed[arguments.range_min :], score(record, same(record["pos_doc"])), dropped))
    return results
