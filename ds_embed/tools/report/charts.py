"""The pictures of a report: curves over steps, histograms of similarities and ranks, the map of the documents.

The colours are Okabe and Ito's (2008), told apart with every kind of colour vision; lines of a second run are dashed.
"""

import base64
import io
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from ds_embed.tools.report.answers import Answers
from ds_embed.tools.report.run_log import RunLog

BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#5f6771"
STYLE = {
    "font.size": 9,
    "text.parse_math": False,  # a dollar sign in a run's name is one
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e2e5e9",
    "legend.frameon": False,
    "svg.hashsalt": "report",
    "svg.fonttype": "none",  # text stays text: a third of the size
}
_SMALLEST_LOG_RATIO = 20  # of the largest to the smallest value of a logarithmic axis
_MOST_POINTS = 2000  # drawn of one line: more can't be seen, and would make the page large
_RANKS = ((1, 1), (2, 3), (4, 10), (11, 100), (101, None))
# Documents of the map by the median rank at which their queries find them: above and up to which median.
_FATES = ((0, 1, "found first", BLUE), (1, 10, "in the first ten", GREEN), (10, np.inf, "later", ORANGE))


class Chart(NamedTuple):
    """One picture; `caption` says how to read it."""

    name: str
    title: str
    figure: Figure
    caption: str = ""

    def save(self, folder: Path) -> str:
        """Write NAME.png to the folder; returns the same picture as SVG, in a URL that holds it."""
        self.figure.savefig(folder / f"{self.name}.png", dpi=160, facecolor="white")
        file = io.BytesIO()
        self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


# Charts over steps: section, name, title, keys of metrics.jsonl with their labels, caption, kind of axis: "log" where the
# values span much, "share" in percent, from "zero"; "varies": shown only then.
_CURVES: tuple[tuple[str, str, str, dict[str, str], str, str], ...] = (
    ("training", "loss", "Loss", {"loss": "training", "val_loss": "validation"}, "", "log"),
    (
        "training",
        "accuracy",
        "Accuracy in the batch",
        {"accuracy": "training", "val_accuracy": "validation"},
        "Share of the batch's queries whose own document scored highest.",
        "share",
    ),
    (
        "training",
        "similarity_in_batch",
        "Similarity in the batch",
        {"positive_similarity": "right document", "negative_similarity": "hardest negative"},
        "Mean cosine to a query.",
        "",
    ),
    ("training", "learning_rate", "Learning rate", {"learning_rate": ""}, "", "zero"),
    ("training", "grad_norm", "Gradient norm", {"grad_norm": ""}, "Before clipping.", "log"),
    ("training", "temperature", "Learned temperature", {"temperature": ""}, "", "varies"),
    ("speed", "tokens_per_second", "Real tokens per second", {"tokens_per_second": ""}, "Of all ranks.", "zero"),
    ("speed", "seconds", "Seconds per step", {"seconds": ""}, "", "zero"),
    ("speed", "padding_share", "Share of padding", {"padding_share": ""}, "Of all tokens computed.", "share"),
)


def draw_curves(section: str, run: RunLog, other: RunLog | None) -> list[Chart]:
    """The section's charts of values over steps, of those that the run has; `other` is laid over, dashed."""
    if section == "retrieval":
        measures = {name: name for name in run.measures}
        return [_curves(run, other, "retrieval", "Retrieval on the validation set", measures)] if measures else []
    charts = []
    for of, *chart in _CURVES:
        values = [value for key in chart[2] for value in run.series(key)[1].tolist()]
        if of == section and values and (chart[-1] != "varies" or len(set(values)) > 1):
            charts.append(_curves(run, other, *chart))
    return charts


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean (n,) over the `window` (odd) values (n,) around each; at both ends over those of them that exist."""
    ones = np.ones(window)
    first = window // 2
    sums, counts = (np.convolve(each, ones)[first : first + len(values)] for each in (values, np.ones(len(values))))
    return sums / counts


def _curves(
    run: RunLog, other: RunLog | None, name: str, title: str, keys: dict[str, str], caption: str = "", kind: str = ""
) -> Chart:
    axes, low, high = _axes(title, "step"), np.inf, 0.0
    for each in (run, other) if other else (run,):
        for (key, label), colour in zip(keys.items(), cycle((BLUE, ORANGE, GREEN, PURPLE, GRAY))):
            steps, values = each.series(key)
            if not len(values):
                continue
            low, high = min(low, values.min()), max(high, values.max())
            style: dict[str, Any] = {"color": colour, "linestyle": "-" if each is run else "--"}
            shown = np.unique(np.linspace(0, len(values) - 1, _MOST_POINTS).astype(int))
            if len(values) >= 30:
                axes.plot(steps[shown], values[shown], color=colour, linewidth=0.8, alpha=0.35)
                window = 2 * (len(values) // 80) + 3
                values = smooth(values, window)
                caption += f" Bold: mean of {window:,} logged steps." * (each is run and key == next(iter(keys)))
            label = ", ".join(filter(None, (label, each.name if other else "")))
            marker = "o" if len(values) < 12 else None
            axes.plot(steps[shown], values[shown], label=label, marker=marker, markersize=4, **style)
    for number, step in enumerate(run.restarts):
        axes.axvline(step, color=GRAY, linestyle=":", linewidth=1.1, label=None if number else "restart")
    if kind == "log" and 0 < _SMALLEST_LOG_RATIO * low < high:
        axes.set_yscale("log")
        caption += " Logarithmic axis."
    elif kind in ("zero", "share"):
        axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return Chart(name, title, _finished(axes, kind == "share"), caption.strip())


def charts_of_similarity(answers: Answers) -> list[Chart]:
    """A query's score with the right, a random and the hardest wrong document; the margin; the right one's rank."""
    hardest = answers.hardest_score
    scores = {"random document": answers.random_score, "hardest wrong document": hardest[np.isfinite(hardest)]}
    scores = {name: values for name, values in scores.items() if len(values)} | {"right document": answers.right_score}
    medians = "Medians: " + ", ".join(f"{name} {np.median(values):.3f}" for name, values in scores.items()) + "."
    axes = _axes("Similarity to the query", answers.score_name, "share of pairs")
    _outline(axes, scores)
    charts = [Chart("similarity", "Similarity to the query", _finished(axes, True), medians)]

    margin = (answers.right_score - hardest)[np.isfinite(hardest)]
    if len(margin):
        title = "Margin over the hardest wrong document"
        axes = _axes(title, f"{answers.score_name} of the right minus the hardest wrong document", "share of queries")
        _outline(axes, {"": margin})
        axes.axvline(0, color="black", linewidth=0.9)
        caption = f"The right document is ahead for {(margin > 0).mean():.1%} of {len(margin):,} queries; "
        caption += f"median margin {np.median(margin):+.3f}."
        charts.append(Chart("margin", title, _finished(axes, True), caption))

    bins = [(low, high or np.inf) for low, high in _RANKS if low <= len(answers.document_ids)]
    shares = [((answers.rank >= low) & (answers.rank <= high)).mean() for low, high in bins]
    names = [
        f"{low}" if low == high else f"over {low - 1}" if high == np.inf else f"{low} to {high}" for low, high in bins
    ]
    axes = _axes("Where the right document ranks", "rank of the right document", "share of queries")
    axes.bar_label(axes.bar(range(len(bins)), shares, color=BLUE), [f"{share:.1%}" for share in shares], padding=2)
    figure = _finished(axes, True)
    axes.set_xticks(range(len(bins)), names)
    caption = f"Median rank {np.median(answers.rank):.0f} of {len(answers.document_ids):,} documents."
    return [*charts, Chart("ranks", "Where the right document ranks", figure, caption)]


def chart_of_documents(answers: Answers, rows: np.ndarray, points: np.ndarray, how: str) -> Chart:
    """The map: documents `rows` (m,) at `points` (m, 2), by how their queries fare."""
    ranks: dict[int, list[int]] = {}
    for row, rank in zip(answers.right.tolist(), answers.rank.tolist()):
        ranks.setdefault(row, []).append(rank)
    medians = np.array([np.median(ranks.get(row, [np.nan])) for row in rows.tolist()])
    axes = _axes("Map of the documents", size=(9.6, 6))
    groups = [("no query", np.isnan(medians), GRAY)]
    groups += [(label, (medians > above) & (medians <= limit), colour) for above, limit, label, colour in _FATES]
    for label, chosen, colour in groups:
        if chosen.any():
            label = f"{label} ({chosen.sum():,})"
            axes.scatter(*points[chosen].T, s=14, c=colour, alpha=0.6, linewidths=0, label=label)
    axes.set_aspect("equal", adjustable="datalim")
    figure = _finished(axes)
    axes.set(xticks=[], yticks=[])
    caption = f"{len(rows):,} of {len(answers.document_ids):,} documents, by the median rank at which their queries "
    return Chart("map", "Map of the documents", figure, f"{caption}find them. {how}")


def _axes(title: str, xlabel: str = "", ylabel: str = "", size: tuple[float, float] = (5.4, 3.2)) -> Axes:
    axes = Figure(figsize=size, layout="constrained").subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    return axes


def _finished(axes: Axes, is_share: bool = False) -> Figure:
    """The figure, with a legend, and with numbers as people write them: no offsets, no powers of ten as formulas."""
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:,.7g}")
    if is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside lower center", ncols=2 if axes.figure.get_figwidth() < 9 else 4)
    return axes.figure


def _outline(axes: Axes, groups: dict[str, np.ndarray]) -> None:
    """Histograms of shares over the same 60 bins; the last group is blue."""
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), 60)
    for (label, values), colour in zip(groups.items(), (GRAY, ORANGE, BLUE)[-len(groups) :]):
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.16)
        axes.hist(values, edges, weights=weights, histtype="step", color=colour, linewidth=1.6, label=label or None)
