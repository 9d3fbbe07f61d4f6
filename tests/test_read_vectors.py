"""Reading vectors and their ids back; every broken file is named with its cure.

Shapes: n rows, D dimensions.
"""

import json
import warnings

import numpy as np
import pytest

from ds_embed.vectors.search import search
from ds_embed.vectors.vectors import Ids, read_embeddings, read_vectors, stored_numbers


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


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_smaller_numbers_are_read_as_the_floats_they_stand_for(folder, dtype):
    """Search, a FAISS index, smaller vectors and two ranks' slices see the restored rows, never the bytes."""
    from ds_embed.settings.tool_arguments import IndexArguments
    from ds_embed.vectors.compressed import search_compressed
    from ds_embed.vectors.faiss_index import build_index, search_index

    rng = np.random.default_rng(12)
    plain = {kind: rng.standard_normal((n, 24)).astype(np.float32) for kind, n in (("query", 40), ("doc", 300))}
    plain["doc"] *= rng.uniform(0.1, 9, (300, 1)).astype(np.float32)  # not of unit length, so that scales matter
    plain["doc"][7] = 0
    for kind, rows in plain.items():
        numbers, *scales = stored_numbers(rows, dtype)
        write_vectors(folder, kind, numbers, [f"{kind[0]}{i}" for i in range(len(rows))])
        for values in scales:
            np.save(folder / {"query": "test_queries", "doc": "test_docs"}[kind] / f"{kind}.scales.npy", values)
    queries, documents = read_embeddings(folder)
    assert documents.rows.stored_dtype == dtype and documents.rows.shape == (300, 24)
    restored = {kind: np.asarray(vectors.rows) for kind, vectors in (("query", queries), ("doc", documents))}
    for kind, rows in plain.items():
        step = np.abs(rows).max(axis=1, keepdims=True) / (127 if dtype == "int8" else 1024)
        assert restored[kind].dtype == np.float32 and (abs(restored[kind] - rows) <= 0.501 * step).all()
    np.testing.assert_array_equal(documents.rows.between(10, 20)[[3, 4]], restored["doc"][[13, 14]])
    options = {"tie_rank": documents.ids.ranks, "device": "cpu"}
    expected = search(restored["query"], restored["doc"], 10, **options)
    settings = IndexArguments()
    index = build_index("flat", documents.rows, settings)
    how = {"truncate_dims": [12], "quantize": [], "rescore_multiplier": 0}
    as_stored, cut = search_compressed(queries.rows, documents.rows, 10, **how, **options)
    for found in (
        search(queries.rows, documents.rows, 10, **options),
        search_index(index, queries.rows, documents.rows, 10, settings, **options),
        as_stored[3:],
    ):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    assert as_stored[:3] == (f"{dtype}, as stored", 24, {"float16": 48, "int8": 28}[dtype])
    assert cut[:3] == ("float32", 12, 48)
    exact = search(plain["query"], plain["doc"], 10, **options)[1]
    assert (exact[:, :5] == expected[1][:, :5]).mean() > 0.9


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
    np.save(folder / "test_docs/doc.npy", np.ones((5, 4), dtype=np.float64))


def spoil_scales(scales):
    def spoil(folder):
        np.save(folder / "test_docs/doc.npy", np.ones((5, 4), dtype=np.int8))
        if scales is not None:
            np.save(folder / "test_docs/doc.scales.npy", scales)

    return spoil


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
        (spoil_dtype, "doc.npy: holds float64, expected float32, float16 or int8; save"),
        (spoil_scales(None), "doc.npy: holds int8, and its scales are not beside it: doc.scales.npy, float32"),
        (spoil_scales(np.ones(4, np.float32)), "doc.scales.npy: holds 4 float32, expected 5 float32"),
        (spoil_scales(np.ones(5)), "doc.scales.npy: holds 5 float64, expected 5 float32"),
        (spoil_scales(np.ones((5, 1), np.float32)), r"doc.scales.npy: holds shape \(5, 1\), expected one \(n,\) array"),
        (spoil_scales(np.array([1, 1, 1, np.nan, 1], np.float32)), r"doc.npy: row 3 \(id 'd3'\) holds NaN"),
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
