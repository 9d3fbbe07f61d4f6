"""Reading vectors and their ids back; every broken file is named with its cure.

Shapes: n rows, D dimensions.
"""

import json
import warnings

import numpy as np
import pytest

from ds_embed.vectors.search import search
from ds_embed.vectors.vectors import Ids, read_embeddings, read_vectors


def test_ids_are_a_sequence_and_sort_like_bytes():
    rng = np.random.default_rng(8)
    alphabet = ["a", "b", "\t", "\x01", "é", "z", "😀", "文", "0", "aaaaaaaa", "prefix-of-some-length-"]
    names = {"".join(rng.choice(alphabet, rng.integers(1, 6))) for _ in range(3000)}
    names = list(names)
    rng.shuffle(names)
    ids = Ids.from_strings(names)
    assert len(ids) == len(names) and list(ids) == names
    assert ids[0] == names[0] and ids[-1] == names[-1] and names[5] in ids
    with pytest.raises(IndexError):
        ids[len(names)]
    assert list(ids.take(np.array([4, 2]))) == [names[4], names[2]]
    expected = sorted(range(len(names)), key=lambda i: names[i].encode())
    assert ids.sorted_rows[0].tolist() == expected
    assert not ids.sorted_rows[1].any()
    assert [names[i] for i in np.argsort(ids.ranks)] == sorted(names)
    assert len(Ids(b"")) == 0 and Ids(b"").ranks.tolist() == []


def test_ids_find_repeats_and_white_space():
    ids = Ids.from_strings(["b", "a-long-identifier", "b", "a-long-identifiers", "a-long-identifier", "b"])
    order, same = ids.sorted_rows
    assert order.tolist() == [1, 4, 3, 0, 2, 5]  # rows of one id in file order
    assert same.tolist() == [False, True, False, False, True, True]
    assert ids.first_with_white_space() is None
    assert Ids.from_strings(["文", "é"]).first_with_white_space() is None
    assert Ids.from_strings(["a", "New York", "b c"]).first_with_white_space() == "New York"
    assert Ids.from_strings(["a", "thin\u00a0space"]).first_with_white_space() == "thin\u00a0space"


def write_vectors(folder, kind, rows, ids):
    subfolder = folder / {"query": "test_queries", "doc": "test_docs"}[kind]
    subfolder.mkdir(parents=True, exist_ok=True)
    np.save(subfolder / f"{kind}.npy", rows)
    (subfolder / f"{kind}.ids").write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(9)
    folder = tmp_path / "consumed_samples0"
    write_vectors(folder, "query", rng.standard_normal((3, 4)).astype(np.float32), ["q0", "q1", "q2"])
    write_vectors(folder, "doc", rng.standard_normal((5, 4)).astype(np.float32), [f"d{i}" for i in range(5)])
    return folder


def test_read_vectors(folder):
    queries, documents = read_embeddings(folder)
    assert isinstance(documents.rows, np.memmap) and documents.rows.shape == (5, 4)
    assert list(queries.ids) == ["q0", "q1", "q2"] and len(documents) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when it is lent read-only memory
        search(queries.rows, documents.rows, 2, tie_rank=documents.ids.ranks)


def test_a_bad_row_is_named_in_whichever_block(folder, monkeypatch):
    monkeypatch.setattr("ds_embed.vectors.vectors._CHECK_BYTES", 2 * 4 * 4)  # two rows
    spoil_value(folder)
    with pytest.raises(ValueError, match=r"row 3 \(id 'd3'\)"):
        read_vectors(folder, "doc")


def test_older_folder_name_and_missing_last_line_end(folder):
    (folder / "test_docs").rename(folder / "test_doc")
    ids = folder / "test_doc" / "doc.ids"
    ids.write_text(ids.read_text().rstrip("\n"))
    assert list(read_vectors(folder, "doc").ids)[-1] == "d4"


def test_a_query_with_several_right_documents_is_read_once(folder):
    rows = np.random.default_rng(10).standard_normal((4, 4)).astype(np.float32)
    rows[3] = rows[1] * 1.001  # encoded twice, in other micro-batches
    write_vectors(folder, "query", rows, ["q0", "q1", "q2", "q1"])
    queries = read_vectors(folder, "query")
    assert list(queries.ids) == ["q0", "q1", "q2"]
    np.testing.assert_array_equal(queries.rows, rows[:3])
    rows[3] = -rows[1]
    write_vectors(folder, "query", rows, ["q0", "q1", "q2", "q1"])
    with pytest.raises(ValueError, match="query id 'q1' stands on lines 2 and 4"):
        read_vectors(folder, "query")


def spoil_dtype(folder):
    np.save(folder / "test_docs/doc.npy", np.ones((5, 4), dtype=np.float16))


def spoil_shape(folder):
    np.save(folder / "test_docs/doc.npy", np.ones(20, dtype=np.float32))


def spoil_length(folder):
    np.save(folder / "test_docs/doc.npy", np.ones((6, 4), dtype=np.float32))


def spoil_dimensions(folder):
    np.save(folder / "test_docs/doc.npy", np.ones((5, 3), dtype=np.float32))


def spoil_value(folder):
    rows = np.ones((5, 4), dtype=np.float32)
    rows[3, 1] = np.inf
    np.save(folder / "test_docs/doc.npy", rows)


def spoil_objects(folder):
    np.save(folder / "test_docs/doc.npy", np.array([{}]), allow_pickle=True)


def cut_rows(folder):
    path = folder / "test_docs/doc.npy"
    path.write_bytes(path.read_bytes()[:-8])


def empty_file(folder):
    (folder / "test_docs/doc.npy").write_bytes(b"")


def empty_corpus(folder):
    write_vectors(folder, "doc", np.ones((0, 4), dtype=np.float32), [])


def no_dimensions(folder):
    np.save(folder / "test_docs/doc.npy", np.ones((5, 0), dtype=np.float32))


def spoil_ids(content):
    return lambda folder: (folder / "test_docs/doc.ids").write_bytes(content)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_dtype, "doc.npy: holds float16, want float32"),
        (spoil_shape, r"doc.npy: holds shape \(20,\)"),
        (spoil_length, "doc.ids has 5 ids and .*doc.npy has 6 rows"),
        (spoil_dimensions, "query.npy has 4 dimensions and .*doc.npy has 3"),
        (spoil_value, r"doc.npy: row 3 \(id 'd3'\) holds NaN or infinity"),
        (spoil_objects, "doc.npy: not a whole .npy file"),
        (cut_rows, "doc.npy: not a whole .npy file"),
        (empty_file, "doc.npy: not a whole .npy file"),
        (empty_corpus, "doc.npy has no rows"),
        (no_dimensions, "doc.npy: has vectors of 0 dimensions"),
        (spoil_ids(b"a\nb\na\nc\nd\n"), "1 document ids are repeated, such as 'a' on line 3"),
        (spoil_ids(b"a\nb\n\nc\nd\n"), "doc.ids:3: the id is empty"),
        (spoil_ids(b"\nb\nc\nd\ne\n"), "doc.ids:1: the id is empty"),
        (spoil_ids(b"a\nb\0c\nd\ne\nf\n"), "doc.ids:2: the id holds a NUL"),
        (spoil_ids(b"a\n\xff\nc\nd\ne\n"), "doc.ids: not UTF-8"),
        (spoil_ids(b""), "doc.ids has 0 ids"),
        (lambda folder: (folder / "test_docs/doc.ids").unlink(), "doc.ids: no such file"),
        (lambda folder: (folder / "test_docs/doc.npy").unlink(), "doc.npy: no such file"),
        (lambda folder: (folder / "test_docs").rename(folder / "other"), "no folder test_docs or test_doc"),
    ],
)
def test_broken_vectors_are_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        read_embeddings(folder)


def test_queries_and_documents_of_two_models_are_refused(folder):
    for kind, model in (("queries", "a"), ("docs", "b")):
        made_from = {"base_model": model, "adapter": "none"}
        (folder / f"test_{kind}/manifest.json").write_text(json.dumps({"made_from": made_from}))
    with pytest.raises(ValueError, match=r"come from different models \(base_model b, not a\); encode both with one"):
        read_embeddings(folder)


def test_the_folder_above_is_recognised(folder):
    with pytest.raises(ValueError, match="did you mean .*consumed_samples0"):
        read_embeddings(folder.parent)
    with pytest.raises(ValueError, match="no such folder"):
        read_embeddings(folder / "nowhere")
