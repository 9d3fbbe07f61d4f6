"""recipes/search.py: a query typed by hand finds the document whose vector it has."""

import json

from tiny import check, launch, make_model


def test_typed_query_finds_its_document(tmp_path):
    make_model(tmp_path / "llama", "llama")
    documents = [f"w{i} w{i + 1} w{2 * i}" for i in range(20)]
    lines = [json.dumps({"pos_doc": text, "doc_id": f"d{i}"}) + "\n" for i, text in enumerate(documents)]
    (tmp_path / "docs.jsonl").write_text("".join(lines))
    prefixes = ["--query_prefix", "", "--doc_prefix", "", "--model_name_or_path", tmp_path / "llama"]
    check(
        launch(
            0,
            "recipes/generate.py",
            "--doc_files",
            tmp_path / "docs.jsonl",
            "--output_prefix",
            tmp_path / "out",
            "--cache_dir",
            tmp_path / "cache",
            *prefixes,
        )
    )
    found = check(
        launch(
            0,
            "recipes/search.py",
            documents[7],
            "--embeddings",
            tmp_path / "out" / "consumed_samples0",
            "--doc_files",
            tmp_path / "docs.jsonl",
            "--top_k",
            2,
            *prefixes,
        )
    ).stdout
    assert "1. d7  (cosine 1.000)" in found and documents[7] in found and "\n2. " in found and "\n3. " not in found

    result = launch(0, "recipes/search.py", "w1", "--embeddings", tmp_path / "absent", *prefixes)
    assert result.returncode != 0 and "no such folder" in result.stderr and "Traceback" not in result.stderr
