"""The quickstart's data is the same everywhere, clean, and split so that the test says something."""

import ast
import collections
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

RECIPE_PATH = Path(__file__).parents[1] / "recipes" / "quickstart" / "make_pairs.py"
DATA_FILES = ("train.jsonl", "test_queries.jsonl", "test_docs.jsonl", "counts.json")


# For scripts that tests run in a process of their own.
LOAD_PAIRS_RECIPE = f"""
import sys
sys.path.insert(0, {str(RECIPE_PATH.parent)!r})
import make_pairs as recipe
"""

from ds_embed.settings.errors import UserError  # noqa: E402

sys.path.insert(0, str(RECIPE_PATH.parent))
import function_pairs  # noqa: E402
import make_pairs as pairs_recipe  # noqa: E402


def function(name, docstring, body="    total = 1\n    return total + {n}\n", n=0):
    return f'def {name}(x):\n    """{docstring}"""\n{body.format(n=n)}\n\n'


def package_files():
    """A made-up package: 12 files of 3 distinct functions, and one of everything that must be left out."""
    files = {}
    for i in range(12):
        text = "".join(function(f"f{k}", f"Compute thing {k} of module {i}.", n=f"1{i}{k}") for k in range(3))
        files[f"part{i % 3}/mod{i}.py"] = text
    shared = function("copied", "Copied from one file to the next.")
    files["copies_a.py"] = shared + function("same_query", "A query of two functions.", n=91)
    files["copies_b.py"] = shared + function("same_query", "A query of two functions", n=92)
    files["broken.py"] = "def f(:\n"
    files["null.py"] = "x = 1\0\n"
    files["tests/cases.py"] = function("hidden", "A test that nobody should find.", n=93)
    files["test_more.py"] = function("hidden", "Another test that nobody should find.", n=94)
    return files


def write_tree(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return pairs_recipe.Source("pkg", root, "1.0")


def make(tmp_path, files, num_test=5, name="data", **more):
    source = write_tree(tmp_path / f"{name}_source", files)
    pairs_recipe.make_pairs(tmp_path / name, [source], num_test=num_test, **more)
    return tmp_path / name


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def document_of(source, name="f"):
    """The document of function `name` in a source text."""
    source = textwrap.dedent(source)
    found = dict(function_pairs.functions_of(ast.parse(source)))
    return function_pairs.judge(found[name], source.split("\n"))


def file_of(record):
    return record["doc_id"].rsplit(":", 1)[0]


def test_two_runs_write_the_same_bytes(tmp_path):
    # Another absolute path, files created in another order, another hash seed, another number of processes.
    script = LOAD_PAIRS_RECIPE + (
        "source = recipe.Source('pkg', recipe.Path(sys.argv[1]), '1.0')\n"
        "recipe.make_pairs(sys.argv[2], [source], num_test=5, num_workers=int(sys.argv[3]))\n"
    )
    files = package_files()
    write_tree(tmp_path / "one", files)
    write_tree(tmp_path / "deeper" / "two", dict(reversed(files.items())))
    for root, out, workers in (("one", "a", "1"), ("deeper/two", "b", "2")):
        command = [sys.executable, "-c", script, str(tmp_path / root), str(tmp_path / out), workers]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": workers}, timeout=600)
    for name in DATA_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    names = {path.name for path in tmp_path.iterdir()} - {".a.lock", ".b.lock"}
    assert names == {"a", "b", "deeper", "one"}  # no leftovers


def test_file_order_is_not_the_disks(tmp_path, monkeypatch):
    source = write_tree(tmp_path, package_files())
    real_walk = os.walk
    listings = []
    for backwards in (False, True):

        def walk(root, backwards=backwards):
            for folder, subfolders, names in real_walk(root):
                subfolders.sort(reverse=backwards)
                yield folder, subfolders, sorted(names, reverse=backwards)

        monkeypatch.setattr(pairs_recipe.os, "walk", walk)
        listings.append(pairs_recipe.list_files(source))
    assert listings[0] == listings[1] and len(listings[0]) == 16


def test_records_split_and_leaks(tmp_path):
    out = make(tmp_path, package_files())
    train, queries, docs = (read_jsonl(out / name) for name in DATA_FILES[:3])
    assert len(queries) == len(docs) == 5
    assert set(train[0]) == {"query", "pos_doc", "query_id", "doc_id"}
    assert set(queries[0]) == {"query", "query_id", "doc_id"}
    assert set(docs[0]) == {"pos_doc", "doc_id"}
    assert [query["doc_id"] for query in queries] == [doc["doc_id"] for doc in docs]
    # Two files were held out for the five: their sixth pair is in neither half.
    assert {file_of(doc) for doc in docs}.isdisjoint(file_of(record) for record in train)
    assert len({file_of(doc) for doc in docs}) == 2
    assert len(train) == 12 * 3 + 1 - 6
    assert {doc["pos_doc"] for doc in docs}.isdisjoint(record["pos_doc"] for record in train)
    assert {query["query"] for query in queries}.isdisjoint(record["query"] for record in train)
    everything = train + docs
    assert len({record["doc_id"] for record in everything}) == len(everything)
    assert len({record["query_id"] for record in train + queries}) == len(everything)
    assert not any("hidden" in record["doc_id"] for record in everything)


def test_repeated_documents_and_queries(tmp_path):
    out = make(tmp_path, package_files())
    queries = [record["query"] for name in DATA_FILES[:2] for record in read_jsonl(out / name)]
    assert queries.count("Copied from one file to the next.") == 1
    assert not [query for query in queries if query.startswith("A query of two functions")]
    counts = json.loads((out / "counts.json").read_text())
    assert counts["dropped: document seen before"] == 1
    assert counts["dropped: query of several functions"] == 2


def test_no_file_dominates_the_test(tmp_path):
    files = {
        f"big{i}.py": "".join(function(f"f{k}", f"Compute {k} in {i} now.", n=f"1{i}_{k}") for k in range(30))
        for i in range(6)
    }
    docs = read_jsonl(make(tmp_path, files, num_test=25) / "test_docs.jsonl")
    assert sorted(collections.Counter(map(file_of, docs)).values()) == [5, 10, 10]


def test_unparsable_files_are_counted(tmp_path, capsys):
    out = make(tmp_path, package_files())
    assert json.loads((out / "counts.json").read_text())["files that do not parse"] == 2
    assert "2  files that do not parse" in capsys.readouterr().out


def test_too_few_pairs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--num_test 37: all files together hold 37 pairs"):
        make(tmp_path, package_files(), num_test=37)
    assert not (tmp_path / "data").exists()


def test_manifest_reuse(tmp_path, capsys):
    out = make(tmp_path, package_files())
    before = {name: (out / name).stat().st_mtime_ns for name in DATA_FILES}
    source = pairs_recipe.Source("pkg", tmp_path / "data_source", "1.0")
    capsys.readouterr()
    assert pairs_recipe.make_pairs(out, [source], num_test=5) is False
    assert "is complete" in capsys.readouterr().out
    assert {name: (out / name).stat().st_mtime_ns for name in DATA_FILES} == before
    with pytest.raises(UserError, match="num_test was 5 and is 6.*remove"):
        pairs_recipe.make_pairs(out, [source], num_test=6)
    with pytest.raises(UserError, match=r"packages was pkg 1\.0 and is pkg 2\.0"):
        pairs_recipe.make_pairs(out, [source._replace(version="2.0")], num_test=5)
    content = (out / "train.jsonl").read_bytes()
    (out / "train.jsonl").write_bytes(content.replace(b"q", b"p", 1))
    with pytest.raises(UserError, match="train.jsonl was changed"):
        pairs_recipe.make_pairs(out, [source], num_test=5)
    (out / "train.jsonl").write_bytes(content + b"{}\n")
    with pytest.raises(UserError, match="train.jsonl has .* bytes and was written with"):
        pairs_recipe.make_pairs(out, [source], num_test=5)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json is missing"):
        pairs_recipe.make_pairs(out, [source], num_test=5)


@pytest.mark.parametrize(
    "docstring, expected",
    [
        ("Sort the rows. Then rest.", "Sort the rows."),
        ("Sort rows\n    of a table,\n    keeping ties. More.", "Sort rows of a table, keeping ties."),
        ("Sort the rows", "Sort the rows"),
        ("Sort the rows\n\n    Second paragraph.", "Sort the rows"),
        ("Join words, e.g. Nouns, i.e. Names. More.", "Join words, e.g. Nouns, i.e. Names."),
        ("Join words (cf. Smith et al. 2017). More.", "Join words (cf. Smith et al. 2017)."),
        ("Handle lists, tuples, etc. Others fail.", "Handle lists, tuples, etc."),
        ("Call numpy.sort on version 2.4 of it. Done.", "Call numpy.sort on version 2.4 of it."),
        ("Call numpy. then stop. More.", "Call numpy. then stop."),
        ("Is it sorted? Say so.", "Is it sorted?"),
        ('Say "no." Then leave.', 'Say "no."'),
        ("Sort rows\n    Args:\n        x: a table", "Sort rows"),
        ("Sort rows\n    :param x: a table", "Sort rows"),
        ("Sort rows\n    - one way\n    - another", "Sort rows"),
        ("Args:\n        x: a table", ""),
        ("x (`torch.Tensor`, *optional*): The table. It is long.", ""),
        (".. deprecated:: 2.0", ""),
        ("relu(x, inplace=False) -> Tensor\n\n    Clip below zero. More.", "Clip below zero."),
        ("Like :func:`~torch.sort`, with ``x`` as `y`. More.", "Like torch.sort, with x as y."),
    ],
)
def test_first_sentence(docstring, expected):
    assert function_pairs.first_sentence(docstring) == expected


def test_docstring_is_cut_out():
    query, document, dropped_by = document_of(
        '''
        class A:
            @decorated("text")
            def f(self, x: str = "é") -> int:
                r"""Weigh the é of x.

                UNWANTED details.
                """  # noqa

                y = """kept
        at the margin"""
                # also kept
                return y
        ''',
        "A.f",
    )
    assert dropped_by is None
    assert query == "Weigh the é of x."
    assert document == (
        'def f(self, x: str = "é") -> int:\n    y = """kept\nat the margin"""\n    # also kept\n    return y'
    )


def test_form_feeds_do_not_shift_lines(tmp_path):
    path = tmp_path / "old.py"
    path.write_text("x = 1\n\x0c\ny = 'a\x0cb'\n" + function("f", "Compute the old thing."), encoding="utf-8")
    pairs, _ = function_pairs.read_file(("pkg/old.py", path))
    assert [pair.document for pair in pairs] == ["def f(x):\n    total = 1\n    return total + 0"]


@pytest.mark.parametrize(
    "body, reason",
    [
        ("    pass", "only passes"),
        ("    ...", "only passes"),
        ("    raise NotImplementedError(\n        'later'\n    )", "only passes"),
        ("    y = x\n" * 2000, "document too long"),
    ],
)
def test_empty_bodies_are_dropped(body, reason):
    assert reason in document_of(f'def f(x):\n    """Do the usual thing."""\n{body}\n')[2]


def test_other_dropped_functions():
    two_lines = "    y = x\n    return y\n"
    assert "shares a line" in document_of('def f(x): "Do the usual thing."; y = x; return y\n')[2]
    assert document_of("def f(x):\n" + two_lines)[2] == "no docstring"
    assert "too short" in document_of('def f(x):\n    """See torch.lu"""\n' + two_lines)[2]
    assert "not prose" in document_of('def f(x):\n    """Do the odd \\ud800 thing."""\n' + two_lines)[2]
    assert "query too long" in document_of(f'def f(x):\n    """{"word " * 41}"""\n' + two_lines)[2]


def test_names_of_functions(tmp_path):
    path = tmp_path / "names.py"
    text = """
        try:
            import fast
        except ImportError:
            def fallback(x):
                '''Fall back to slow.'''
                def inner(y):
                    '''Not found on its own.'''
                    y += 1
                    return y
                return inner(x)
        class A:
            class B:
                @property
                def size(self):
                    '''Get the size here.'''
                    n = 1
                    return n
                @size.setter
                def size(self, value):
                    '''Set the size here.'''
                    self.n = value
                    self.m = value
        """
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    pairs, counts = function_pairs.read_file(("pkg/names.py", path))
    assert [pair.doc_id for pair in pairs] == [
        "pkg/names.py:fallback",
        "pkg/names.py:A.B.size",
        "pkg/names.py:A.B.size#2",
    ]
    assert counts["functions"] == 3


def test_packages_are_found_but_not_imported():
    script = LOAD_PAIRS_RECIPE + (
        "sources = recipe.find_sources()\n"
        "assert all(source.root.is_dir() for source in sources) and len(sources) == 5\n"
        "assert not {'torch', 'numpy', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
    with pytest.raises(ValueError, match="--packages no_such_package: no package of that name"):
        pairs_recipe.find_sources(["stdlib", "no_such_package"])


def test_command_line_reports_mistakes(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        pairs_recipe.main(["--output_dir", str(tmp_path / "x"), "--packages", "stdlib", "--num_test", "0"])
    assert stopped.value.code == 2
    assert "--num_test 0 must be at least 1" in capsys.readouterr().err
