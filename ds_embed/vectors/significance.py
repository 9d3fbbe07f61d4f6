"""Is one run better than another, or were the queries kind to it? Paired tests over the queries that both measured.

Shapes: N queries, M measures, B resamples of the queries.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ds_embed.settings.errors import UserError

NUM_RESAMPLES = 10_000
_SEED = 0
_NUMBERS_AT_ONCE = 4_000_000
_NAMES_SHOWN = 5

PerQuery = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Comparison:
    """One measure of this run against another: means, difference of means (this - other), and how sure it is.

    interval: 95 % of the bootstrap's differences lie in it. t_test_p, randomization_p: two-sided, paired.
    better, equal, worse: queries on which this run's value is larger, the same, smaller.
    """

    measure: str
    this: float
    other: float
    difference: float
    interval: tuple[float, float]
    t_test_p: float
    randomization_p: float
    better: int
    equal: int
    worse: int


def read_per_query(folder: str | os.PathLike, measures: Sequence[str]) -> dict[str, dict[str, float]]:
    """{query id: {measure: value}} of the per_query.jsonl that recipes/evaluate.py wrote to a folder.

    UserError: no such file, a line that isn't one of ours, or one that lacks a measure.
    """
    path = Path(folder) / "per_query.jsonl"
    if not path.is_file():
        raise UserError(f"--compare {folder}: has no per_query.jsonl; give the results folder of ds-embed evaluate")
    values: dict[str, dict[str, float]] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                entry = json.loads(line)
                query_id = entry.pop("query_id")
            except (ValueError, AttributeError, KeyError, TypeError):
                raise UserError(f"{path}:{number}: no line of ds-embed evaluate; evaluate that run again") from None
            for name in measures:
                if type(entry.get(name)) not in (int, float):
                    only = ", ".join(entry)
                    raise UserError(f"{path}:{number}: has no {name}, only {only}; give both the same --measures")
            values[query_id] = {name: float(entry[name]) for name in measures}
    return values


def compare_runs(this: PerQuery, other: PerQuery, measures: Sequence[str], source: str) -> list[Comparison]:
    """Compare measure by measure; `source` names the other run in errors. The same numbers at every call.

    The randomization test flips the sign of each query's difference (Smucker et al. 2007), the bootstrap
    draws N queries with replacement; both B = NUM_RESAMPLES times. UserError: not the same queries.
    """
    _check_same_queries(this, other, source)
    ours, theirs = (np.array([[run[q][name] for name in measures] for q in this]) for run in (this, other))
    differences = ours - theirs
    randomization_p, lower, upper = _resample(differences)
    return [
        Comparison(
            measure=name,
            this=float(ours[:, m].mean()),
            other=float(theirs[:, m].mean()),
            difference=float(differences[:, m].mean()),
            interval=(float(lower[m]), float(upper[m])),
            t_test_p=_paired_t_test(differences[:, m]),
            randomization_p=float(randomization_p[m]),
            better=int((differences[:, m] > 0).sum()),
            equal=int((differences[:, m] == 0).sum()),
            worse=int((differences[:, m] < 0).sum()),
        )
        for m, name in enumerate(measures)
    ]


def describe_comparisons(comparisons: Sequence[Comparison]) -> list[str]:
    """A table, one line a measure under a header."""
    width = max(len(comparison.measure) for comparison in comparisons)
    names = "  this   other  difference  95% interval        t-test p  randomization p  better/equal/worse"
    lines = [f"{'':<{width}}  {names}"]
    for c in comparisons:
        interval = f"[{c.interval[0]:+.4f}, {c.interval[1]:+.4f}]"
        lines.append(
            f"{c.measure:<{width}}  {c.this:.4f}  {c.other:.4f}     {c.difference:+.4f}  {interval}    "
            f"{c.t_test_p:.4f}           {c.randomization_p:.4f}  {c.better}/{c.equal}/{c.worse}"
        )
    return lines


def _check_same_queries(this: PerQuery, other: PerQuery, source: str) -> None:
    parts = []
    for what, names in (("lacks", this.keys() - other.keys()), ("has in addition", other.keys() - this.keys())):
        if names:
            shown = ", ".join(f"'{name}'" for name in sorted(names)[:_NAMES_SHOWN])
            parts.append(f"{what} {len(names)} ({shown}{', ...' if len(names) > _NAMES_SHOWN else ''})")
    if parts:
        odd = f"it {' and '.join(parts)}; evaluate both runs on the same judgments"
        raise UserError(f"--compare {source}: measured other queries: {odd}")


def _paired_t_test(differences: np.ndarray) -> float:
    """p of the two-sided paired t-test; 1 when no query differs, or when one query is all there is."""
    if len(differences) < 2 or not differences.any():
        return 1.0
    if (differences == differences[0]).all():
        return 0.0  # t is infinite
    import scipy.stats

    return float(scipy.stats.ttest_1samp(differences, 0.0).pvalue)


def _resample(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Randomization p (M,), and the bounds (M,) of the bootstrap's 95 % interval, of differences (N, M)."""
    num_queries, num_measures = differences.shape
    rng = np.random.default_rng(_SEED)
    observed = np.abs(differences.sum(axis=0))
    # Sums of the same numbers in another order differ in their last bits.
    threshold = observed - 1e-12 * np.abs(differences).sum(axis=0)
    as_extreme = np.zeros(num_measures, np.int64)
    means = np.empty((NUM_RESAMPLES, num_measures))
    block = max(1, _NUMBERS_AT_ONCE // num_queries)
    for start in range(0, NUM_RESAMPLES, block):
        count = min(block, NUM_RESAMPLES - start)
        signs = rng.integers(0, 2, (count, num_queries), dtype=np.int8) * 2.0 - 1.0
        as_extreme += (np.abs(signs @ differences) >= threshold).sum(axis=0)
        drawn = rng.integers(0, num_queries, (count, num_queries))
        for m in range(num_measures):
            means[start : start + count, m] = differences[:, m][drawn].mean(axis=1)
    lower, upper = np.quantile(means, [0.025, 0.975], axis=0)
    # The observed assignment is one of those that were possible, so p is never 0.
    return (as_extreme + 1) / (NUM_RESAMPLES + 1), lower, upper
