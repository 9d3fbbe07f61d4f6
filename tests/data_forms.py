"""One small data set in the forms and containers of every framework, each written as its makers document it."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet

# query, its positives, its negatives
ROWS = [
    ("w1 w2", ["w3 w4"], ["w5", "w6 w7"]),
    ("w8", ["w9 w10 w11"], ["w12 w13", "w14"]),
    ("w15 w16 w17", ["w18"], ["w19", "w20"]),
    ("w21", ["w22 w23"], ["w24 w25 w26", "w27"]),
]
OWN = [{"query": q, "pos_doc": p[0], "neg_doc": n} for q, p, n in ROWS]


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def passages(texts: list[str], first: int) -> list[dict]:
    """Tevatron's: a title and a text, which it puts together with a space."""
    split = [text.partition(" ") for text in texts]
    return [
        {"docid": str(first + i), "title": head if tail else "", "text": tail or head}
        for i, (head, _, tail) in enumerate(split)
    ]


def write_forms(folder: Path) -> dict[str, tuple[str, dict]]:
    """{name: (entry of train_files, further settings)} of the same texts in every form."""
    made: dict[str, tuple[str, dict]] = {}

    def add(name: str, rows: list, **settings) -> None:
        made[name] = str(jsonl(folder / f"{name}.jsonl", rows)), settings

    add("own", OWN)
    add("own_null", [{**row, "query_id": None, "doc_id": None, "pos_score": None, "neg_scores": None} for row in OWN])
    add("own_unknown_keys", [{**row, "source": "x", "meta": {"a": [1]}} for row in OWN])
    add("flag_embedding", [{"query": q, "pos": p, "neg": n} for q, p, n in ROWS])
    scored = [
        {"query": q, "pos": p, "neg": n, "pos_scores": [1.0], "neg_scores": [0.5, 0.25], "prompt": "", "type": "normal"}
        for q, p, n in ROWS
    ]
    add("flag_embedding_scored", scored)
    add("gritlm", [{"query": ["", q], "pos": [["", t] for t in p], "neg": [["", t] for t in n]} for q, p, n in ROWS])
    tevatron = [
        {
            "query_id": str(i),
            "query": q,
            "positive_passages": passages(p, 10 * i),
            "negative_passages": passages(n, 10 * i + 5),
        }
        for i, (q, p, n) in enumerate(ROWS)
    ]
    add("tevatron1", tevatron)
    ids = [
        {
            "query_id": row["query_id"],
            "query_text": row["query"],
            "query_image": None,
            "positive_document_ids": [passage["docid"] for passage in row["positive_passages"]],
            "negative_document_ids": [passage["docid"] for passage in row["negative_passages"]],
        }
        for row in tevatron
    ]
    corpus = [p for row in tevatron for p in row["positive_passages"] + row["negative_passages"]]
    add("tevatron2", ids, corpus_files=[str(jsonl(folder / "tevatron_corpus.jsonl", corpus))])
    add("automodel_lists", [{"query": q, "pos_doc": p, "neg_doc": n} for q, p, n in ROWS])
    objects = [{"question": q, "pos_doc": {"text": p[0]}, "neg_doc": [{"text": t} for t in n]} for q, p, n in ROWS]
    add("automodel_objects", objects)
    made["automodel_data"] = str(folder / "automodel_data.json"), {}
    (folder / "automodel_data.json").write_text(json.dumps({"data": objects}, indent=1))
    (folder / "corpus").mkdir()
    (folder / "corpus" / "merlin_metadata.json").write_text('{"class": "TextQADataset", "corpus_id": "c"}')
    texts = sorted({text for _, p, n in ROWS for text in p + n})
    table = pyarrow.table({"id": [str(i) for i in range(len(texts))], "text": texts})
    pyarrow.parquet.write_table(table, folder / "corpus" / "train.parquet")
    named = [
        {
            "question_id": f"q{i}",
            "question": q,
            "corpus_id": "c",
            "pos_doc": [{"id": str(texts.index(t))} for t in p],
            "neg_doc": [{"id": str(texts.index(t))} for t in n],
        }
        for i, (q, p, n) in enumerate(ROWS)
    ]
    for name, content in (
        ("automodel_corpus", {"corpus": [{"path": "corpus"}], "data": named}),
        ("automodel_corpus_last", {"data": named, "corpus": {"path": str(folder / "corpus")}}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
        made[name] = str(folder / f"{name}.json"), {}
    numbered = [{"anchor": q, "positive": p[0], "negative_1": n[0], "negative_2": n[1]} for q, p, n in ROWS]
    add("sentence_transformers", numbered)
    add("sentence_transformers_late", [{"negative_2": None, "negative_10": None, **row} for row in numbered])
    add(
        "question_context", [{"question": q, "context": p[0], "negative": n[0], "negative_2": n[1]} for q, p, n in ROWS]
    )
    add("query_answer", [{"query": q, "answer": p[0], "negative": n, "label": 1} for q, p, n in ROWS])
    add("ms_swift", [{"query": q, "response": p[0], "rejected_response": n} for q, p, n in ROWS])
    messages = [
        {
            "messages": [{"role": "user", "content": q}],
            "positive_messages": [[{"role": "user", "content": t}] for t in p],
            "negative_messages": [[{"role": "user", "content": t}] for t in n],
        }
        for q, p, n in ROWS
    ]
    add("ms_swift_messages", messages)
    f2llm = [{"query": q, "passage": p[0], "negative_1": n[0], "negative_2": n[1]} for q, p, n in ROWS]
    f2llm = [row | {f"negative_{k}": None for k in range(3, 25)} for row in f2llm]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(f2llm), folder / "f2llm.parquet")
    made["f2llm"] = str(folder / "f2llm.parquet"), {}
    other = [{"ask": q, "good": p[0], "bad": n[0], "worse": [n[1]]} for q, p, n in ROWS]
    add("columns", other, columns=["query=ask", "pos_doc=good", "neg_doc=bad,worse"])
    plain = [[q, p[0], *n] for q, p, n in ROWS]
    with open(folder / "ordered.csv", "w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c", "d"], *plain])
    made["in_order"] = str(folder / "ordered.csv"), {"columns": ["in_order"]}
    return made


def write_containers(folder: Path) -> dict[str, str]:
    """{name: entry of train_files} of OWN in every container."""
    import datasets

    datasets.disable_progress_bars()
    text = "".join(json.dumps(row) + "\n" for row in OWN).encode()
    half = text.index(b"\n", len(text) // 2) + 1
    files = {
        "array.json": json.dumps(OWN, indent=2).encode(),
        "lines.jsonl.gz": gzip.compress(text[:half]) + gzip.compress(text[half:]),  # as `cat a.gz b.gz` makes it
        "lines.jsonl.bz2": bz2.compress(text),
        "lines.jsonl.xz": lzma.compress(text),
        "lines.jsonl.zst": pyarrow.compress(text, codec="zstd", asbytes=True),
        "packed_array_without_a_name": gzip.compress(json.dumps(OWN).encode()),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    made = {name: str(folder / name) for name in files}
    rows = [{"query": q, "positive": p[0], "negative_1": n[0], "negative_2": n[1]} for q, p, n in ROWS]
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "table.csv.gz").write_bytes(gzip.compress((folder / "table.csv").read_bytes()))
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    (folder / "table.tsv").write_text("\n".join(lines) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(OWN), folder / "table.parquet")
    made |= {name: str(folder / name) for name in ("table.csv", "table.csv.gz", "table.tsv", "table.parquet")}
    for name in ("shards", "splits"):
        (folder / name).mkdir()
    (folder / "shards" / "README.md").write_text("# no data")
    jsonl(folder / "shards" / "0.jsonl", OWN[:1])
    (folder / "shards" / "1.jsonl.gz").write_bytes(gzip.compress(json.dumps(OWN[1]).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(OWN[2:]), folder / "shards" / "2.parquet")
    made |= {"folder": str(folder / "shards"), "pattern": str(folder / "shards" / "[0-9]*")}
    data = datasets.Dataset.from_list(OWN)
    data.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(folder / "saved_splits")
    made |= {"saved": str(folder / "saved"), "saved_split": f"{folder / 'saved_splits'}:train"}
    return made
