"""The pictures of a report: curves over steps, histograms of similarities and ranks, the map of the documents.

The colours are Okabe and Ito's (2008), told apart with every kind of colour vision; lines of a second run are dashed.
"""

import base64
import io
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter

from ds_embed.tools.report.answers import Answers
from ds_embed.tools.report.run_log import RunLog

BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072b2", "#d55e00", "#009e73", "#aa4499", "#5f6771"
STYLE: dict[Any, Any] = {
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
_RANKS = ((1, 1, "1"), (2, 3, "2 to 3"), (4, 10, "4 to 10"), (11, 100, "11 to 100"), (101, np.inf, "over 100"))
# Documents of the map by the median rank at which their queries find them: above and up to which median.
_FATES = ((0, 1, "found first", BLUE), (1, 10, "in the first ten", GREEN), (10, np.inf, "later", ORANGE))


class Chart:
    """One picture; `caption` says how to read it."""

    def __init__(self, name: str, title: str, xlabel: str = "", ylabel: str = "", is_share: bool = False):
        self.name, self.title, self.caption, self.is_share = name, title, "", is_share
        self.figure = Figure(figsize=(9.6, 6) if name == "map" else (5.4, 3.2), layout="constrained")
        self.axes = self.figure.subplots()
        self.axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        self.write_numbers()

    def write_numbers(self) -> None:
        """As people write them: no offsets, no powers of ten as formulas."""
        for axis in (self.axes.xaxis, self.axes.yaxis):
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter("{x:,.7g}")
        if self.is_share:
            self.axes.yaxis.set_major_formatter(PercentFormatter(1))

    def save(self, folder: Path) -> str:
        """Write NAME.png to the folder; returns the same picture as SVG, in a URL that holds it."""
        if self.axes.get_legend_handles_labels()[1]:
            self.figure.legend(loc="outside lower center", ncols=2 if self.figure.get_figwidth() < 9 else 4)
        self.figure.savefig(folder / f"{self.name}.png", dpi=160, facecolor="white")
        file = io.BytesIO()
        self.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()

    def outline(self, groups: dict[str, np.ndarray]) -> None:
        """Histograms of shares over the same 60 bins; the last group is blue."""
        edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), 60).tolist()
        for (label, values), colour in zip(groups.items(), (GRAY, ORANGE, BLUE)[-len(groups) :]):
            weights = np.full(len(values), 1 / len(values))
            self.axes.hist(values, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.16)
            line: dict[str, Any] = {"color": colour, "linewidth": 1.6, "label": label or None}
            self.axes.hist(values, edges, weights=weights, histtype="step", **line)


class _Curves(NamedTuple):
    """A chart over steps: keys of metrics.jsonl with their labels. axis: "log" where the values span much, "share" in
    percent, from "zero"; "varies": shown only then."""

    section: str
    name: str
    title: str
    keys: dict[str, str]
    axis: str = ""
    caption: str = ""


_OF_BATCH = "Share of the batch's queries whose own document scored highest."
_COSINES = {"positive_similarity": "right document", "negative_similarity": "hardest negative"}
_CURVES = (
    _Curves("training", "loss", "Loss", {"loss": "training", "val_loss": "validation"}, "log"),
    _Curves(
        "training",
        "accuracy",
        "Accuracy in the batch",
        {"accuracy": "training", "val_accuracy": "validation"},
        "share",
        _OF_BATCH,
    ),
    _Curves("training", "similarity_in_batch", "Similarity in the batch", _COSINES, caption="Mean cosine to a query."),
    _Curves("training", "learning_rate", "Learning rate", {"learning_rate": ""}, "zero"),
    _Curves("training", "grad_norm", "Gradient norm", {"grad_norm": ""}, "log", "Before clipping."),
    _Curves("training", "temperature", "Learned temperature", {"temperature": ""}, "varies"),
    _Curves("speed", "tokens_per_second", "Real tokens per second", {"tokens_per_second": ""}, "zero", "Of all ranks."),
    _Curves("speed", "seconds", "Seconds per step", {"seconds": ""}, "zero"),
    _Curves("speed", "padding_share", "Share of padding", {"padding_share": ""}, "share", "Of all tokens computed."),
)


def draw_curves(section: str, run: RunLog, other: RunLog | None) -> list[Chart]:
    """The section's charts of values over steps, of those that the run has; `other` is laid over, dashed."""
    measures = {name: name for name in run.measures}
    wanted = [curves for curves in _CURVES if curves.section == section]
    if section == "retrieval":
        wanted = [_Curves(section, "retrieval", "Retrieval on the validation set", measures)]
    values = {curves.name: np.concatenate([[], *(run.series(k)[1] for k in curves.keys)]) for curves in wanted}
    wanted = [c for c in wanted if len(values[c.name]) and (c.axis != "varies" or np.ptp(values[c.name]) > 0)]
    return [_draw(run, other, curves) for curves in wanted]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean (n,) over the `window` (odd) values (n,) around each; at both ends over those of them that exist."""
    first, ones = window // 2, np.ones(window)
    sums, counts = (np.convolve(each, ones)[first : first + len(values)] for each in (values, np.ones(len(values))))
    return sums / counts


def _draw(run: RunLog, other: RunLog | None, curves: _Curves) -> Chart:
    chart = Chart(curves.name, curves.title, "step", is_share=curves.axis == "share")
    axes, extremes = chart.axes, []
    chart.caption = curves.caption
    for each in (run, other) if other else (run,):
        for (key, label), colour in zip(curves.keys.items(), cycle((BLUE, ORANGE, GREEN, PURPLE, GRAY))):
            steps, values = each.series(key)
            if not len(values):
                continue
            extremes += [values.min(), values.max()]
            shown = np.unique(np.linspace(0, len(values) - 1, _MOST_POINTS).astype(int))
            if len(values) >= 30:
                axes.plot(steps[shown], values[shown], color=colour, linewidth=0.8, alpha=0.35)
                window = 2 * (len(values) // 80) + 3
                values = smooth(values, window)
                if each is run and key == next(iter(curves.keys)):
                    chart.caption += f" Bold: mean of {window:,} logged steps."
            line: dict[str, Any] = {"color": colour, "linestyle": "-" if each is run else "--", "markersize": 4}
            line |= {"label": ", ".join(filter(None, (label, each.name if other else "")))}
            axes.plot(steps[shown], values[shown], marker="o" if len(values) < 12 else None, **line)
    for number, step in enumerate(run.restarts):
        axes.axvline(step, color=GRAY, linestyle=":", linewidth=1.1, label=None if number else "restart")
    if curves.axis == "log" and 0 < _SMALLEST_LOG_RATIO * min(extremes) < max(extremes):
        axes.set_yscale("log")  # which sets locators and formatters of its own
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        chart.write_numbers()
        chart.caption += " Logarithmic axis."
    elif curves.axis in ("zero", "share"):
        axes.set_ylim(bottom=0)
    steps_axis: Any = axes.xaxis.get_major_locator()
    steps_axis.set_params(integer=True)
    return chart


def charts_of_similarity(answers: Answers) -> list[Chart]:
    """A query's score with the right, a random and the hardest wrong document; the margin; the right one's rank."""
    has_other = np.isfinite(answers.hardest_score)
    scores = {"random document": answers.random_score, "hardest wrong document": answers.hardest_score[has_other]}
    scores = {name: values for name, values in scores.items() if len(values)} | {"right document": answers.right_score}
    similarity = Chart("similarity", "Similarity to the query", answers.score_name, "share of pairs", is_share=True)
    similarity.outline(scores)
    similarity.caption = "Medians: " + ", ".join(f"{name} {np.median(of):.3f}" for name, of in scores.items()) + "."
    charts = [similarity]

    margin = (answers.right_score - answers.hardest_score)[has_other]
    if len(margin):
        label = f"{answers.score_name} of the right minus the hardest wrong document"
        charts.append(
            Chart("margin", "Margin over the hardest wrong document", label, "share of queries", is_share=True)
        )
        charts[-1].outline({"": margin})
        charts[-1].axes.axvline(0, color="black", linewidth=0.9)
        charts[-1].caption = (
            f"The right document is ahead for {(margin > 0).mean():.1%} of {len(margin):,} queries; "
            f"median margin {np.median(margin):+.3f}."
        )

    bins = [of for of in _RANKS if of[0] <= len(answers.document_ids)]
    shares = [((answers.rank >= low) & (answers.rank <= high)).mean() for low, high, _ in bins]
    title, label = "Where the right document ranks", "rank of the right document"
    ranks = Chart("ranks", title, label, "share of queries", is_share=True)
    bars = ranks.axes.bar(range(len(bins)), shares, color=BLUE)
    ranks.axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2)
    ranks.axes.set_xticks(range(len(bins)), [name for *_, name in bins])
    ranks.caption = f"Median rank {np.median(answers.rank):.0f} of {len(answers.document_ids):,} documents."
    return [*charts, ranks]


def chart_of_documents(answers: Answers, rows: np.ndarray, points: np.ndarray, how: str) -> Chart:
    """The map: documents `rows` (m,) at `points` (m, 2), by how their queries fare."""
    ranks: dict[int, list[int]] = {}
    for row, rank in zip(answers.right.tolist(), answers.rank.tolist()):
        ranks.setdefault(row, []).append(rank)
    medians = np.array([np.median(ranks.get(row, [np.nan])) for row in rows.tolist()])
    chart = Chart("map", "Map of the documents")
    groups = [("no query", np.isnan(medians), GRAY)]
    groups += [(label, (medians > above) & (medians <= limit), colour) for above, limit, label, colour in _FATES]
    for label, chosen, colour in groups:
        if chosen.any():
            dots: dict[str, Any] = {
                "s": 14,
                "c": colour,
                "alpha": 0.6,
                "linewidths": 0,
                "label": f"{label} ({chosen.sum():,})",
            }
            chart.axes.scatter(*points[chosen].T, **dots)
    chart.axes.set_aspect("equal", adjustable="datalim")
    chart.axes.set(xticks=[], yticks=[])
    chart.caption = f"{len(rows):,} of {len(answers.document_ids):,} documents, by the median rank at which their "
    chart.caption += f"queries find them. {how}"
    return chart
