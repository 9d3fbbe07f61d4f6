"""Comparing two runs: p-values and intervals against scipy and against every assignment, written out."""

import itertools
import json

import numpy as np
import pytest
import scipy.stats

from ds_embed.vectors.significance import compare_runs, describe_comparisons, read_per_query


def per_query(values, measures=("nDCG@10",)):
    return {f"q{i}": dict(zip(measures, np.atleast_1d(row))) for i, row in enumerate(values)}


def test_equals_scipy_and_all_assignments():
    rng = np.random.default_rng(0)
    this, other = rng.random((11, 2)), rng.random((11, 2))
    this[:, 0] += 0.25
    other[3] = this[3]
    measures = ["nDCG@10", "R@100"]
    compared = compare_runs(per_query(this, measures), per_query(other, measures), measures, "OTHER")
    for m, comparison in enumerate(compared):
        differences = this[:, m] - other[:, m]
        assert comparison.measure == measures[m]
        assert (comparison.this, comparison.other) == pytest.approx((this[:, m].mean(), other[:, m].mean()))
        assert comparison.difference == pytest.approx(differences.mean())
        assert comparison.t_test_p == pytest.approx(scipy.stats.ttest_rel(this[:, m], other[:, m]).pvalue)
        means = [abs(np.mean(differences * signs)) for signs in itertools.product((-1, 1), repeat=11)]
        exact = np.mean(np.array(means) >= abs(differences.mean()) - 1e-12)
        assert comparison.randomization_p == pytest.approx(exact, abs=0.015)  # 3 standard errors of 10,000 draws
        bootstrap = scipy.stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=20_000, rng=1)
        assert comparison.interval == pytest.approx(tuple(bootstrap.confidence_interval), abs=0.02)
        counts = (differences > 0).sum(), (differences == 0).sum(), (differences < 0).sum()
        assert (comparison.better, comparison.equal, comparison.worse) == counts and comparison.equal == 1
    again = compare_runs(per_query(this, measures), per_query(other, measures), measures, "OTHER")
    assert again == compared
    turned = compare_runs(per_query(other, measures), per_query(this, measures), measures, "OTHER")
    assert [c.difference for c in turned] == pytest.approx([-c.difference for c in compared])
    header, *lines = describe_comparisons(compared)
    assert (
        "randomization p" in header
        and lines[0].startswith("nDCG@10  ")
        and f"{compared[0].difference:+.4f}" in lines[0]
    )


def test_the_order_of_queries_does_not_matter_and_alike_runs_do_not_differ():
    this = per_query([0.5, 0.25, 1.0])
    (same,) = compare_runs(this, dict(reversed(this.items())), ["nDCG@10"], "OTHER")
    assert (same.difference, same.interval, same.t_test_p, same.randomization_p) == (0, (0, 0), 1, 1)
    (shifted,) = compare_runs(this, per_query([0.25, 0.0, 0.75]), ["nDCG@10"], "OTHER")
    assert shifted.t_test_p == 0 and shifted.randomization_p == pytest.approx(2 / 8, abs=0.02)
    (single,) = compare_runs(per_query([1.0]), per_query([0.5]), ["nDCG@10"], "OTHER")
    assert (single.t_test_p, single.randomization_p) == (1, 1)


def test_a_false_alarm_is_as_rare_as_it_says():
    rng = np.random.default_rng(3)
    alarms = np.zeros(3)
    for _ in range(40):
        values = rng.random((20, 10))
        measures = [f"m{i}" for i in range(10)]
        for c in compare_runs(
            per_query(values, measures), per_query(rng.random((20, 10)), measures), measures, "OTHER"
        ):
            alarms += [c.t_test_p < 0.05, c.randomization_p < 0.05, not c.interval[0] <= 0 <= c.interval[1]]
    assert (abs(alarms / 400 - 0.05) < 0.035).all()


def test_other_queries_and_broken_files_are_named(tmp_path):
    this, other = per_query([1.0, 1.0, 1.0]), per_query([1.0, 1.0]) | {"x1": {"nDCG@10": 1.0}}
    with pytest.raises(ValueError, match=r"--compare OTHER: .*it lacks 1 \('q2'\) and has in addition 1 \('x1'\)"):
        compare_runs(this, other, ["nDCG@10"], "OTHER")
    with pytest.raises(ValueError, match="has no per_query.jsonl"):
        read_per_query(tmp_path, ["nDCG@10"])
    path = tmp_path / "per_query.jsonl"
    path.write_text(json.dumps({"query_id": "q0", "nDCG@10": 1}) + "\n")
    assert read_per_query(tmp_path, ["nDCG@10"]) == {"q0": {"nDCG@10": 1.0}}
    with pytest.raises(ValueError, match="per_query.jsonl:1: has no RR@10, only nDCG@10; give both the same --meas"):
        read_per_query(tmp_path, ["nDCG@10", "RR@10"])
    for line in ("{", "[1]", '{"query": "q0"}'):
        path.write_text(line + "\n")
        with pytest.raises(ValueError, match="per_query.jsonl:1: no line of ds-embed evaluate"):
            read_per_query(tmp_path, ["nDCG@10"])
