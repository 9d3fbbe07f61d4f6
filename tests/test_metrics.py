"""Measures against hand-written ones and against pytrec_eval itself; judgments and run files."""

import errno
import io
import math

import ir_measures
import numpy as np
import pytest
import pytrec_eval

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.settings.errors import UserError
from ds_embed.vectors.metrics import (
    SearchRun,
    evaluate,
    load_run,
    match_qrels,
    parse_measures,
    read_qrels,
    read_qrels_from_queries,
    skip_unknown,
    write_results,
    write_run_lines,
)


def plain_measures(run, qrels):
    """nDCG@10 and RR@10 of every judged query, written out; equal scores rank by descending id."""
    values = {}
    for query_id, judged in qrels.items():
        # Two stable sorts: the second key first.
        ranked = sorted(run.get(query_id, {}), reverse=True)
        ranked = sorted(ranked, key=lambda name: -run[query_id][name])[:10]
        gains = [max(0, judged.get(name, 0)) for name in ranked]
        ideal = sorted((max(0, gain) for gain in judged.values()), reverse=True)[:10]
        dcg, best = (sum(g / math.log2(i + 2) for i, g in enumerate(row)) for row in (gains, ideal))
        first = next((i for i, gain in enumerate(gains) if gain > 0), None)
        ndcg, reciprocal = dcg / best if best else 0.0, 0.0 if first is None else 1 / (first + 1)
        values[query_id] = {"nDCG@10": ndcg, "RR@10": reciprocal}
    return values


def random_case(rng):
    names = [f"d{i}" for i in range(int(rng.integers(15, 60)))]
    run, qrels = {}, {}
    for q in range(int(rng.integers(1, 30))):
        retrieved = rng.choice(names, int(rng.integers(1, len(names))), replace=False)
        judged = rng.choice(names, int(rng.integers(1, 15)), replace=False)
        if rng.random() < 0.8 or q == 0:
            run[f"q{q}"] = {str(name): float(rng.integers(0, 6)) / 4 for name in retrieved}  # many ties
        if rng.random() < 0.8 or q == 0:
            qrels[f"q{q}"] = {str(name): int(rng.integers(-1, 4)) for name in judged}
    return run, qrels


def test_equal_hand_written_measures_and_pytrec_eval():
    rng = np.random.default_rng(0)
    names = {"nDCG@10": "ndcg_cut_10", "R@1": "recall_1", "R@10": "recall_10", "R@100": "recall_100"}
    for _ in range(200):
        run, qrels = random_case(rng)
        result = evaluate(run, qrels)
        assert list(result.means) == ["nDCG@10", "RR@10", "R@1", "R@10", "R@100"]
        assert list(result.per_query) == list(qrels)
        expected = plain_measures(run, qrels)
        direct = pytrec_eval.RelevanceEvaluator(qrels, set(names.values())).evaluate(run)
        for query_id, values in result.per_query.items():
            assert list(values) == list(result.means)
            for name, value in expected[query_id].items():
                assert values[name] == pytest.approx(value, abs=1e-12)
            for name, trec_name in names.items():
                assert values[name] == direct.get(query_id, {trec_name: 0.0})[trec_name]
        for name in ("nDCG@10", "RR@10"):
            mean = sum(values[name] for values in expected.values()) / len(qrels)
            assert result.means[name] == pytest.approx(mean, abs=1e-12)


def test_every_family_equals_trec_eval_on_graded_negative_and_missing_judgments():
    # All but RR with a cutoff, which trec_eval doesn't have: that one is written out above.
    names = ["nDCG", "nDCG@3", "RR", "RR(rel=2)", "R@5", "R(rel=2)@5", "P@5", "P(rel=3)@5", "AP", "AP(rel=2)@20"]
    names += ["Success@5", "Success(rel=2)@1", "Rprec"]
    measures = [ir_measures.parse_measure(name) for name in names]
    rng = np.random.default_rng(5)
    for _ in range(40):
        run, qrels = random_case(rng)
        qrels["judged but not relevant"] = {"d1": 0, "d2": -1}
        run["judged but not relevant"] = {"d1": 1.0}
        result = evaluate(run, qrels, names)
        reference = ir_measures.pytrec_eval.iter_calc(measures, qrels, run)
        expected = {query_id: {str(measure): 0.0 for measure in measures} for query_id in qrels}
        for metric in reference:
            expected[metric.query_id][str(metric.measure)] = metric.value
        assert result.per_query == expected
        assert sum(any(values.values()) for values in expected.values()) < len(qrels)  # some count 0
        for name in result.means:
            assert result.means[name] == pytest.approx(np.mean([values[name] for values in expected.values()]))


def test_judgments_below_0_never_reach_trec_eval(monkeypatch):
    """Its arrays begin at 0: a query that has none but these made it hang."""
    given, make = [], ir_measures.pytrec_eval.evaluator
    monkeypatch.setattr(
        ir_measures.pytrec_eval, "evaluator", lambda measures, qrels: given.append(qrels) or make(measures, qrels)
    )
    run = {"q": {"a": 2.0, "b": 1.0}, "r": {"a": 1.0}}
    names = ["nDCG@10", "RR@10", "RR(judged_only=True)", "R@1"]
    means = evaluate(run, {"q": {"a": -1, "b": 1}, "r": {"a": -2}}, names).means
    assert list(means.values()) == pytest.approx([0.5 / np.log2(3), 0.25, 0.5, 0.0])
    assert given and all(qrels == {"q": {"b": 1}, "r": {}} for qrels in given)


def test_ties_rank_by_descending_id_for_every_measure():
    # ir-measures' own RR@10 comes from another provider and would say 1.0 for the first.
    run = {"q": {"a": 1.0, "b": 1.0}}
    measures = ["RR", "RR@10", "RR@1", "R@1", "nDCG@1"]
    assert list(evaluate(run, {"q": {"a": 1}}, measures).means.values()) == [0.5, 0.5, 0.0, 0.0, 0.0]
    assert list(evaluate(run, {"q": {"b": 1}}, measures).means.values()) == [1.0] * 5
    # trec_eval compares scores as float32, ids as UTF-8 bytes.
    nearly = {"q": {"a": 1.0 + 1e-9, "b": 1.0}}
    assert evaluate(nearly, {"q": {"a": 1}}, ["RR@10", "RR@1"]).means == {"RR@10": 0.5, "RR@1": 0.0}
    foreign = {"q": {"z": 1.0, "é": 1.0, "😀": 1.0}}
    assert evaluate(foreign, {"q": {"é": 1}}, ["RR@10"]).means == {"RR@10": 0.5}


def test_missing_queries_count_zero_and_unjudged_ones_do_not_count():
    run = {f"unjudged{i}": {"a": 1.0} for i in range(2500)} | {"q1": {"a": 1.0}, "q3": {}}
    result = evaluate(run, {"q1": {"a": 1}, "q2": {"a": 1}, "q3": {"b": 1}, "q4": {"b": 0}}, ["R@1"])
    values = {query_id: values["R@1"] for query_id, values in result.per_query.items()}
    assert values == {"q1": 1.0, "q2": 0.0, "q3": 0.0, "q4": 0.0}
    assert result.means == {"R@1": 0.25}


def test_graded_measures_with_parameters():
    run = {"q": {"a": 3.0, "b": 2.0, "c": 1.0}}
    qrels = {"q": {"a": 1, "b": 2}}
    means = evaluate(run, qrels, ["RR(rel=2)@10", "RR@10", "R(rel=2)@1", "P@2", "AP", "MRR@10"]).means
    assert means == {"RR(rel=2)@10": 0.5, "RR@10": 1.0, "R(rel=2)@1": 0.0, "P@2": 1.0, "AP": 1.0}


def test_bad_measures_and_runs():
    for name in ("nDCG10", "recall", "nDCG@x", "NumRet", "RR(judged_only=True)@10", "ERR@10"):
        with pytest.raises(ValueError, match="measure '.*': not known"):
            parse_measures([name])
    with pytest.raises(ValueError, match="R@100 looks at 100 documents but top_k keeps 99"):
        parse_measures(["R@10", "R@100"], depth=99)
    assert len(parse_measures(["AP", "R@100"], depth=100)) == 2
    with pytest.raises(ValueError, match="no measures"):
        parse_measures([])
    with pytest.raises(ValueError, match="'q' has a NaN score"):
        evaluate({"q": {"a": math.nan}}, {"q": {"a": 1}})
    with pytest.raises(ValueError, match="no query of the run has judgments"):
        evaluate({"p": {"a": 1.0}}, {"q": {"a": 1}})
    twice = SearchRun(["q", "q"], ["a"], np.ones((2, 1), np.float32), np.zeros((2, 1), np.int64))
    with pytest.raises(ValueError, match="'q' stands twice"):
        evaluate(twice, {"q": {"a": 1}})


# Judgments ------------------------------------------------------------------------------------------


def test_qrels_from_queries(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.json"
    one.write_text(
        '{"query": "x", "query_id": "q1", "doc_id": "a"}\n{"query": "y", "query_id": "q2", "doc_id": "a"}\n'
        '{"query": "x", "query_id": "q1", "doc_id": "b"}\n'
    )
    two.write_text('[{"query": "x", "query_id": "q1", "doc_id": "c"}, {"query": "z", "query_id": "q3", "doc_id": "c"}]')
    expected = {"q1": {"a": 1, "b": 1, "c": 1}, "q2": {"a": 1}, "q3": {"c": 1}}
    assert read_qrels_from_queries([one, two]) == expected
    two.write_text('{"query": "other", "query_id": "q2", "doc_id": "c"}\n')
    with pytest.raises(ValueError, match="two.json:1: query_id 'q2' names another .*one.jsonl:2"):
        read_qrels_from_queries([one, two])
    one.write_text('{"query": "x", "query_id": "q1", "doc_id": "a"}\n\n{"query": "y", "query_id": "q2"}\n')
    with pytest.raises(ValueError, match="one.jsonl:3: doc_id is missing.*--qrels"):
        read_qrels_from_queries([one])


def test_read_qrels(tmp_path):
    path = tmp_path / "qrels"
    path.write_text("q1 0 a 2\nq1 0 b 0\n\nq2\t0\tc\t-1\nq1 0 a 2\n")
    assert read_qrels(path) == {"q1": {"a": 2, "b": 0}, "q2": {"c": -1}}
    path.write_text("query-id\tcorpus-id\tscore\r\nq1\tNew York\t1\r\nq2\tb\t2\r\n")
    assert read_qrels(path) == {"q1": {"New York": 1}, "q2": {"b": 2}}


@pytest.mark.parametrize(
    "content, message",
    [
        ("q1 0 a 1\nq1 a 1\n", "qrels:2: 3 columns"),
        ("query-id\tcorpus-id\tscore\nq1\t0\ta\t1\n", "qrels:2: 4 columns"),
        ("q1 0 a high\n", "qrels:1: relevance 'high'"),
        ("q1 0 a 1\nq1 0 a 2\n", "qrels:2: document 'a' has relevance 2 for query 'q1' and had 1"),
        ("", "judges no document relevant"),
        ("q1 0 a 0\n", "judges no document relevant"),
        (b"q1 0 \xff 1\n", "not UTF-8"),
    ],
)
def test_bad_qrels_are_named(tmp_path, content, message):
    path = tmp_path / "qrels"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_qrels(path)
    with pytest.raises(ValueError, match="nowhere: no such file"):
        read_qrels(tmp_path / "nowhere")


def test_match_qrels():
    qrels = {"q1": {"a": 1, "gone": 0}, "q2": {"b": 2}}
    assert match_qrels(qrels, ["q0", "q1", "q2"], ["a", "b", "c"], "FILE") == ["q0"]
    with pytest.raises(ValueError, match="FILE: 1 of 2 relevant document ids .*such as 'b'"):
        match_qrels(qrels, ["q1", "q2"], ["a", "c"], "FILE")
    with pytest.raises(ValueError, match="FILE: 1 of 2 judged queries were not searched for, such as 'q2'"):
        match_qrels(qrels, ["q1"], ["a", "b"], "FILE")
    with pytest.raises(ValueError, match="FILE: none of its 2 queries"):
        match_qrels(qrels, ["q3"], ["a", "b"], "FILE")


def test_unknown_ids_may_be_skipped():
    qrels = {"q1": {"a": 1, "b": 2}, "q2": {"b": 1}, "q3": {"c": 1, "d": 0}}
    known, counts = skip_unknown(qrels, ["q1", "q3", "q9"], ["a", "c"])
    assert known == {"q1": {"a": 1, "b": 2}, "q3": {"c": 1, "d": 0}}
    assert counts == {"num_judged_queries_without_vector": 1, "num_relevant_documents_without_vector": 1}
    assert match_qrels(known, ["q1", "q3", "q9"], None, "FILE") == ["q9"]
    # A relevant document that is not in the corpus stays in the ideal ranking and in recall, as in trec_eval.
    assert evaluate({"q1": {"a": 1.0}, "q3": {"c": 1.0}}, known, ["R@10"]).means == {"R@10": 0.75}
    known, _ = skip_unknown(qrels, ["q9"], ["a"])
    with pytest.raises(ValueError, match="FILE: none of its 3 queries, such as 'q1', was searched for"):
        match_qrels(known, ["q9"], None, "FILE")


def test_load_run(tmp_path):
    path = tmp_path / "run.trec"
    path.write_text("q1 Q0 a 1 0.5 bm25\nq1 Q0 b 2 -1e-3 bm25\n\nq2\tQ0\ta\t1\t3\tx\n")
    assert load_run(path) == {"q1": {"a": 0.5, "b": -0.001}, "q2": {"a": 3.0}}
    for line, message in (
        ("q1 Q0 a 1 0.5", "run.trec:2: 5 columns; expected 'query-id Q0 doc-id rank score tag'"),
        ("q1 Q0 b 1 nan x", "run.trec:2: score 'nan', expected a finite number"),
        ("q1 Q0 a 1 0.5 x", "run.trec:2: document 'a' stands twice for query 'q1'"),
    ):
        path.write_text(f"q1 Q0 a 1 0.5 x\n{line}\n")
        with pytest.raises(ValueError, match=message):
            load_run(path)
    with pytest.raises(ValueError, match="none.trec: no such file; give a TREC run file"):
        load_run(tmp_path / "none.trec")


# Files ----------------------------------------------------------------------------------------------


def test_run_file_reads_back_to_the_same_scores_and_measures(tmp_path):
    rng = np.random.default_rng(1)
    scores = -np.sort(-rng.standard_normal((20, 15)).astype(np.float32) * np.float32(1e-3), axis=1)
    scores[:, 4:9] = scores[:, 4:5]  # ties must stay ties
    indices = np.stack([rng.permutation(40)[:15] for _ in range(20)])
    run = SearchRun([f"q{i}" for i in range(20)], [f"d{i}" for i in range(40)], scores, indices)
    qrels = {f"q{i}": {f"d{i}": 1, f"d{i + 1}": 2} for i in range(20)}
    result = evaluate(run, qrels)
    paths = write_results(tmp_path / "new", run, result, {"num_queries": 20})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)

    lines = [line.split(" ") for line in paths[2].read_text().splitlines()]
    assert [line[3] for line in lines] == [str(rank) for _ in range(20) for rank in range(1, 16)]
    assert (np.array([line[4] for line in lines], dtype=np.float32) == scores.ravel()).all()
    for start in range(0, 300, 15):  # the ranks that we print are those that trec_eval would give
        ranked = [(np.float32(line[4]), line[2]) for line in lines[start : start + 15]]
        assert ranked == sorted(ranked, reverse=True)
    read_back: dict = {}
    for line in ir_measures.read_trec_run(str(paths[2])):
        read_back.setdefault(line.query_id, {})[line.doc_id] = line.score
    assert evaluate(read_back, qrels) == result


def test_write_run_refuses_white_space():
    run = {"q": {"New York": 1.0}}
    with pytest.raises(ValueError, match="'New York' holds white space"):
        write_run_lines(io.StringIO(), run)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    result = evaluate({"q": {"a": 1.0}}, {"q": {"a": 1}})
    write_results(tmp_path, {"q": {"a": 1.0}}, result, {})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3

    class Failing(dict):
        def items(self):
            yield "q", {"other": 1.0}
            raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(UserError, match="could not be written .no space left; .* are free there"):
        write_results(tmp_path, Failing(), evaluate({"q": {"b": 1.0}}, {"q": {"a": 1}}), {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(KeyboardInterrupt), replaced_when_whole(tmp_path / "metrics.json") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
