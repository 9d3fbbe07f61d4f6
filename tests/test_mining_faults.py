"""Mining jobs that are killed, whose inputs change or do not fit."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest
from mining_material import make_files, read_jsonl, run, write_jsonl
from tiny import leave_out_when_fast, make_model

from ds_embed.settings.errors import UserError
from ds_embed.tools.mine import job


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")
    make_files(root)
    return root


def test_killed_at_any_instant_and_started_again(place, monkeypatch):
    """kill -9 of a process that mines; what it left is gone on with, and the output is the same, byte for byte.

    Killed as soon as each part appears, and at random instants after that (KILLS=100 for more of them).
    """
    leave_out_when_fast()
    root = place
    monkeypatch.setattr(job, "CHUNK_QUERIES", 2)
    settings = {
        "embeddings": str(root / "vectors"),
        "relative_margin": 0.05,
        "sampling": "random",
        "keep_existing": True,
    }
    start = time.monotonic()
    run(root, "straight.jsonl", **settings)
    seconds = time.monotonic() - start

    def parts(name, count=1):
        return lambda: len(list(root.glob(name))) >= count

    in_work = "broken.jsonl.work/"
    instants = [parts(in_work + name) for name in ("begun.json", ".unfinished-catalog*", "catalog", "vectors.json")]
    instants += [parts(in_work + "chunk*.npz", count) for count in (1, 2, 5)]
    instants += [parts("*broken.jsonl.summary.json"), parts(".unfinished-broken.jsonl-*"), parts("broken.jsonl")]
    rng = random.Random(os.environ.get("KILLS_SEED", 2))
    instants += [None] * int(os.environ.get("KILLS", 2))
    for instant in instants:
        child = os.fork()
        if not child:
            try:
                run(root, "broken.jsonl", **settings)
            finally:
                os._exit(0)
        if instant is None:
            time.sleep(rng.uniform(0, seconds))
        else:
            while not instant() and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.0002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if (root / "broken.jsonl").exists():  # whole, or not there
            assert (root / "broken.jsonl").read_bytes() == (root / "straight.jsonl").read_bytes()
            (root / "broken.jsonl").unlink()
    run(root, "broken.jsonl", **settings)
    assert sorted(path.name for path in root.glob("*broken*")) == [
        "broken.jsonl",
        "broken.jsonl.scores.png",
        "broken.jsonl.summary.json",
    ]
    for suffix in ("", ".summary.json", ".scores.png"):
        assert (root / f"broken.jsonl{suffix}").read_bytes() == (root / f"straight.jsonl{suffix}").read_bytes()


def test_other_inputs_are_noticed(tmp_path, monkeypatch):
    root = tmp_path
    make_files(root)
    settings = {"embeddings": str(root / "vectors"), "num_negatives": 2}

    def full(*_):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(job, "write_records", full)  # as late as can be
        with pytest.raises(OSError):
            run(root, "out.jsonl", **settings)
    assert not (root / "out.jsonl").exists() and list((root / "out.jsonl.work").glob("chunk*.npz"))
    with pytest.raises(
        ValueError, match="made from something else: relative_margin was None and is 0.1. .*another --work_dir"
    ):
        run(root, "out.jsonl", relative_margin=0.1, **settings)
    text = (root / "train.jsonl").read_text()
    (root / "train.jsonl").write_text(text.replace("query 5", "query five"))
    with pytest.raises(ValueError, match="made from something else: train_files was .* and is "):
        run(root, "out.jsonl", **settings)
    (root / "train.jsonl").write_text(text)
    done, _ = run(root, "out.jsonl", **settings)
    assert run(root, "out.jsonl", **settings)[0] == done  # finished already
    with pytest.raises(
        ValueError, match="out.jsonl was made from something else: min_score was None and is -9.0. .*another --output"
    ):
        run(root, "out.jsonl", min_score=-9.0, **settings)
    (root / "mine.jsonl").write_text("precious\n")
    with pytest.raises(ValueError, match="mine.jsonl: exists and was not mined"):
        run(root, "mine.jsonl", **settings)
    with pytest.raises(ValueError, match="is no work folder of this recipe"):
        run(root, "new.jsonl", work_dir=str(root / "vectors"), **settings)


def spoiled(kind, root, change):
    folder = root / {"query": "test_queries", "doc": "test_docs"}[kind]
    rows, names = np.load(folder / f"{kind}.npy"), (folder / f"{kind}.ids").read_text().split()
    rows, names = change(rows, names)
    np.save(folder / f"{kind}.npy", rows)
    (folder / f"{kind}.ids").write_text("".join(f"{name}\n" for name in names))


BAD_VECTORS = {
    "missing": (
        "doc",
        lambda rows, names: (rows[1:], names[1:]),
        "1 of 42 texts have no vector .* doc_id 'd0'; encode",
    ),
    "unknown query": ("query", lambda rows, names: (rows[1:], names[1:]), "texts have no vector .* query_id 'q0'"),
    "dimensions": ("query", lambda rows, names: (rows[:, :4], names), "has 4 dimensions and .* 6"),
    "nan": (
        "doc",
        lambda rows, names: (np.where(rows == rows[3, 2], np.nan, rows), names),
        r"row 3 \(id 'd3'\) holds NaN",
    ),
    "empty": ("doc", lambda rows, names: (rows[:0], []), "has no rows"),
}


@pytest.mark.parametrize("case", BAD_VECTORS)
def test_bad_vectors_are_named(tmp_path, case):
    kind, change, message = BAD_VECTORS[case]
    make_files(tmp_path)
    spoiled(kind, tmp_path / "vectors", change)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "out.jsonl", embeddings=str(tmp_path / "vectors"))


BAD_SETTINGS = {
    "k": ({"num_negatives": 45}, "--num_negatives 45, --range_min 0: there are only 42 documents"),
    "range": ({"range_max": 100}, "--range_max 100: there are only 42 documents"),
    "window": ({"range_min": 5, "range_max": 6}, "--range_max 6: with --range_min 5 this leaves too few"),
    "no model": ({"embeddings": None}, "give either --model_name_or_path or --embeddings"),
    "bm25 and vectors": ({"method": "bm25"}, "--method bm25: uses no vectors"),
    "blank documents": ({"doc_files": ["BLANK"]}, "--doc_files: hold no document with a text"),
    "negatives without ids": ({"include_neg_docs": True}, "a neg_doc has no id"),
    "margin": ({"relative_margin": -0.1}, "--relative_margin -0.1: must be at least 0"),
    "no such judge": ({"cross_encoder": "/nowhere/judge"}, "--cross_encoder /nowhere/judge: no such folder"),
    "untrained judge": ({"cross_encoder": "BERT"}, "has no trained classifier"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_named(place, tmp_path, case):
    settings, message = BAD_SETTINGS[case]
    settings = {"embeddings": str(place / "vectors")} | settings
    if settings.get("cross_encoder") == "BERT":
        settings["cross_encoder"] = str(make_model(tmp_path / "bert", "bert"))
    if "doc_files" in settings:
        settings["doc_files"] = [str(write_jsonl(tmp_path / "blank.jsonl", [{"pos_doc": " ", "doc_id": "d0"}]))]
    with pytest.raises(ValueError, match=message):
        run(place, f"{case}.jsonl", work_dir=str(tmp_path / "work"), **settings)


def test_records_without_ids_need_a_model(tmp_path):
    make_files(tmp_path)
    records = read_jsonl(tmp_path / "train.jsonl")
    del records[4]["doc_id"]
    write_jsonl(tmp_path / "train.jsonl", records)
    with pytest.raises(ValueError, match="train.jsonl:5: doc_id is missing, by which --embeddings has its vector"):
        run(tmp_path, "out.jsonl", embeddings=str(tmp_path / "vectors"))
    (tmp_path / "train.jsonl").write_text("[" + ",\n".join(map(json.dumps, records)) + "]")
    run(tmp_path, "words.jsonl", method="bm25")  # needs none, and reads arrays


def test_a_job_that_met_a_bad_record_starts_afresh_when_it_is_mended(tmp_path):
    records = [{"query": f"w{i}", "pos_doc": f"w{i} x"} for i in range(6)]
    write_jsonl(tmp_path / "train.jsonl", [*records, {"query": "w9", "pos_doc": ""}])
    with pytest.raises(UserError, match="train.jsonl:7: pos_doc is blank"):
        run(tmp_path, "mined.jsonl", method="bm25", num_negatives=2)
    write_jsonl(tmp_path / "train.jsonl", records)
    mined, _ = run(tmp_path, "mined.jsonl", method="bm25", num_negatives=1)
    assert len(mined) == 6


def test_a_folder_of_files_that_were_touched_goes_on(tmp_path):
    (tmp_path / "data").mkdir()
    path = write_jsonl(tmp_path / "data" / "a.jsonl", [{"query": f"w{i}", "pos_doc": f"w{i} x"} for i in range(6)])
    settings = {"method": "bm25", "num_negatives": 2, "train_files": [str(tmp_path / "data")]}
    run(tmp_path, "mined.jsonl", **settings)
    os.utime(path, ns=(1, 1))
    run(tmp_path, "mined.jsonl", **settings)  # is there already
    write_jsonl(path, [{"query": "w1", "pos_doc": "w2"}])
    with pytest.raises(UserError, match="train_files was"):
        run(tmp_path, "mined.jsonl", **settings)
