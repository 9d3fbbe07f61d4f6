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
    )
    assert not found.stderr.count("another model")
    found = found.stdout
    assert "1. d7  (cosine 1.000)" in found and documents[7] in found and "\n2. " in found and "\n3. " not in found

    # Vectors of another model, and documents that have no vectors here: said, not shown as if found.
    make_model(tmp_path / "other", "llama", seed=1)
    flags = ["--embeddings", tmp_path / "out" / "consumed_samples0", "--doc_files", tmp_path / "few.jsonl"]
    (tmp_path / "few.jsonl").write_text("".join(lines[8:]))
    result = launch(0, "recipes/search.py", documents[7], *flags, *prefixes)
    assert result.returncode == 2 and "--doc_files: have no document 'd7'" in result.stderr
    result = launch(0, "recipes/search.py", "w1", *flags[:2], *prefixes[:-1], tmp_path / "other")
    assert "come from another model than" in check(result).stderr and "(base_model " in result.stderr

    result = launch(0, "recipes/search.py", "w1", "--embeddings", tmp_path / "absent", *prefixes)
    assert result.returncode != 0 and "no such folder" in result.stderr and "Traceback" not in result.stderr
