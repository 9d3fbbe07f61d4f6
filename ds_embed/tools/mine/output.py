"""The output of a mining job: records with their negatives, a summary, and a plot of the scores.

Shapes: R records, K negatives per record, E existing negatives that are kept.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from ds_embed.artifact.durable import replaced_when_whole
from ds_embed.data.forms import TrainingFile
from ds_embed.settings.errors import UserError
from ds_embed.settings.tool_arguments import MiningArguments
from ds_embed.tools.mine.catalog import Catalog, reading
from ds_embed.tools.mine.rules import RULES

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True)
class Mined:
    """The mined negatives of all records; row -1 and score -inf where a record has fewer than K."""

    rows: np.ndarray  # (R, K) documents
    scores: np.ndarray  # (R, K)
    positive_scores: np.ndarray  # (R,)
    existing_scores: np.ndarray  # (E,) in the order of Catalog.existing.values
    num_dropped: np.ndarray  # candidates removed by each of RULES, summed over records
    num_candidates: int  # in all pools

    @property
    def counts(self) -> np.ndarray:
        """Number of negatives mined for each record, (R,)."""
        return (self.rows >= 0).sum(axis=1)


def summary_path(output_file: Path) -> Path:
    return output_file.with_name(f"{output_file.name}.summary.json")


def plot_path(output_file: Path) -> Path:
    return output_file.with_name(f"{output_file.name}.scores.png")


def summarise(mined: Mined, catalog: Catalog, arguments: MiningArguments, counts: dict[str, int]) -> dict:
    """Statistics of the job; `counts` are those of the catalog."""
    num_existing = np.diff(catalog.existing.first)
    without = int(((mined.counts + num_existing) == 0).sum())
    scores = mined.scores[mined.rows >= 0]
    return {
        **counts,
        "records_written": counts["records"] - (without if arguments.drop_without_negatives else 0),
        "records_with_fewer": int((mined.counts < arguments.num_negatives).sum()),
        "records_without_negatives": without,
        "negatives_mined": len(scores),
        "negatives_kept": int(num_existing.sum()),
        "candidates_considered": mined.num_candidates,
        "dropped": dict(zip(RULES, mined.num_dropped.tolist())),
        "positive_scores": _statistics(mined.positive_scores),
        "negative_scores": _statistics(scores),
    }


def describe(summary: dict, arguments: MiningArguments) -> list[str]:
    """What a user wants to know of a summary first, in lines."""
    kept = f", {summary['negatives_kept']:,} kept" if summary["negatives_kept"] else ""
    lines = [
        f"records    {summary['records_written']:,} of {summary['records']:,} written, {summary['queries']:,} queries",
        f"negatives  {summary['negatives_mined']:,} mined{kept}; {summary['records_with_fewer']:,} records have fewer than "
        f"{arguments.num_negatives}, {summary['records_without_negatives']:,} have none",
    ]
    dropped = [f"{name} {count:,}" for name, count in summary["dropped"].items() if count]
    lines.append(
        f"candidates {summary['candidates_considered']:,} considered; left out: {', '.join(dropped) or 'none'}"
    )
    for name in ("positive", "negative"):
        if scores := summary[f"{name}_scores"]:
            spread = f"5% to 95%: {scores['p5']:.3f} to {scores['p95']:.3f}"
            lines.append(f"scores     of {name}s: median {scores['p50']:.3f} ({spread})")
    return lines


def _statistics(scores: np.ndarray) -> dict[str, float]:
    if not len(scores):
        return {}
    values = np.percentile(scores.astype(np.float64), _QUANTILES)
    quantiles = {f"p{quantile}": round(float(value), 6) for quantile, value in zip(_QUANTILES, values)}
    return {"mean": round(float(scores.mean(dtype=np.float64)), 6)} | quantiles


def write_records(output_file: Path, mined: Mined, catalog: Catalog, arguments: MiningArguments) -> None:
    """Write the records in order as JSONL. Our own form keeps all but neg_doc, pos_score and neg_scores, which are set.

    Records in other forms or with several positives are converted to our own form, one record for each positive.

    A record without negatives has neither neg_doc nor neg_scores, or is omitted (drop_without_negatives). UserError if
    the number of records in the training files has changed.
    """
    number = -1
    with replaced_when_whole(output_file, binary=True) as file:
        for path in arguments.train_files:
            source = TrainingFile(path, reading(arguments), output_file.parent)
            for _, row, samples in source.read():
                for sample in samples:
                    number += 1
                    if number >= len(mined.rows):
                        break
                    record = row if source.is_own and len(samples) == 1 else sample.as_json()
                    if (
                        _set_negatives(record, sample.neg_docs, number, mined, catalog)
                        or not arguments.drop_without_negatives
                    ):
                        file.write(orjson.dumps(record, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        if number != len(mined.rows) - 1:
            raise UserError("--train_files: changed while negatives were mined; start again once they are whole")


def _set_negatives(record: dict, existing: tuple[str, ...], number: int, mined: Mined, catalog: Catalog) -> bool:
    """Set the record's negatives and scores, and return whether it has any negatives."""
    kept = slice(*catalog.existing.first[number : number + 2])
    rows = mined.rows[number][mined.rows[number] >= 0]
    negatives = [*(existing if kept.start < kept.stop else ()), *(catalog.documents[row] for row in rows)]
    scores = np.concatenate([mined.existing_scores[kept], mined.scores[number, : len(rows)]])
    record |= {"neg_doc": negatives, "pos_score": mined.positive_scores[number], "neg_scores": scores}
    if not negatives:
        del record["neg_doc"], record["neg_scores"]
    return bool(negatives)


def plot_scores(output_file: Path, mined: Mined, unit: str) -> None:
    """Plot a histogram of the scores of positives and mined negatives."""
    from matplotlib.figure import Figure

    negatives = mined.scores[mined.rows >= 0]
    bins = np.histogram_bin_edges(
        np.concatenate([mined.positive_scores, negatives]).astype(np.float64), bins=60
    ).tolist()
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, scores in (("positives", mined.positive_scores), ("mined negatives", negatives)):
        weights = np.full(len(scores), 1 / max(1, len(scores)))
        axes.hist(scores, bins=bins, weights=weights, alpha=0.6, label=f"{name} ({len(scores):,})")
    axes.set(xlabel=unit, ylabel="share")
    axes.legend()
    with replaced_when_whole(plot_path(output_file), binary=True) as file:
        figure.savefig(file, format="png", dpi=120)
