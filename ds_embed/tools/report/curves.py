"""Charts of a run over its steps, from metrics.jsonl: loss, rate, similarities, retrieval, speed.

A second run may be laid over each: dashed, and orange where the first is blue.
"""

from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes

from ds_embed.tools.report.run_log import RunLog
from ds_embed.tools.report.style import BLUE, GREEN, MUTED, ORANGE, PURPLE, SERIES, Chart, draw, legend, plain_ticks

_LOG_RATIO = 20  # a series whose largest value is this many times its smallest gets a logarithmic axis
_MOST_POINTS = 2000  # drawn of one line: more can't be seen, and would make the page large


@dataclass(frozen=True)
class Line:
    """One curve: values (n,) at steps (n,); `label` None leaves it out of the legend."""

    steps: np.ndarray
    values: np.ndarray
    colour: str
    label: str | None = None
    dashed: bool = False
    marker: str | None = None  # given: few, single measurements; else a long series that is smoothed


def smoothing_window(num_values: int) -> int:
    """Values in the running mean of a series: odd, about a fortieth of it, 1 (no smoothing) for short ones."""
    return 1 if num_values < 30 else 2 * (num_values // 80) + 3


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` (odd) values around each; at both ends over those of them that exist."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    first = np.maximum(np.arange(len(values)) - window // 2, 0)
    last = np.minimum(np.arange(len(values)) + window // 2 + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def training_charts(run: RunLog, other: RunLog | None) -> list[Chart]:
    """Loss, learning rate, gradient norm, accuracy, similarities and, where it is learned, temperature."""
    similar = []
    for each, _ in _runs(run, other):
        for key, colour, label in (
            ("positive_similarity", BLUE, "right document"),
            ("negative_similarity", ORANGE, "hardest negative"),
        ):
            label = label if each is run else f"{label}, {each.name}"
            similar.append(Line(*each.series(key), colour, label, dashed=each is not run))
    charts = [
        _chart(run, "loss", "Loss", _both(run, other, "loss", "val_loss"), may_be_log=True, size="wide"),
        _chart(
            run,
            "accuracy",
            "Accuracy in the batch",
            _both(run, other, "accuracy", "val_accuracy"),
            "Share of the batch's queries whose own document scored highest.",
            is_share=True,
        ),
        _chart(run, "similarity_in_batch", "Similarity in the batch", similar, "Mean cosine to a query."),
        _chart(
            run, "learning_rate", "Learning rate", _both(run, other, "learning_rate"), is_smooth=True, from_zero=True
        ),
        _chart(
            run,
            "grad_norm",
            "Gradient norm",
            _both(run, other, "grad_norm"),
            f"Before clipping at {clip:g}." if (clip := run.config.get("max_grad_norm")) else "",
            may_be_log=True,
        ),
    ]
    if any(len(set(each.series("temperature")[1].tolist())) > 1 for each, _ in _runs(run, other)):
        lines = _both(run, other, "temperature")
        charts.append(_chart(run, "temperature", "Learned temperature", lines, is_smooth=True))
    return [chart for chart in charts if chart is not None]


def retrieval_chart(run: RunLog, other: RunLog | None) -> Chart | None:
    """The validation's retrieval measures over steps; None where there are none."""
    lines = []
    for each, _ in _runs(run, other):
        for (colour, marker), name in zip(cycle(SERIES), run.measures):
            label = name if each is run else f"{name}, {each.name}"
            lines.append(Line(*each.series(name, each.validation), colour, label, each is not run, marker))
    return _chart(run, "retrieval", "Retrieval on the validation set", lines, size="wide")


def speed_charts(run: RunLog, other: RunLog | None) -> list[Chart]:
    """Tokens per second, seconds per step, padding."""
    charts = [
        _chart(
            run,
            "tokens_per_second",
            "Real tokens per second",
            _both(run, other, "tokens_per_second"),
            "All ranks together; padding does not count.",
            from_zero=True,
            size="wide",
        ),
        _chart(run, "seconds", "Seconds per step", _both(run, other, "seconds"), from_zero=True),
        _chart(
            run,
            "padding_share",
            "Share of padding",
            _both(run, other, "padding_share"),
            "Of all token places computed.",
            from_zero=True,
            is_share=True,
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _runs(run: RunLog, other: RunLog | None) -> list[tuple[RunLog, str]]:
    return [(run, BLUE)] + ([] if other is None else [(other, ORANGE)])


def _both(run: RunLog, other: RunLog | None, key: str, validation_key: str | None = None) -> list[Line]:
    """The training lines of a key for each run and, where there are any, those of its validations."""
    lines = []
    for each, colour in _runs(run, other):
        of_run = f", {each.name}" if other else ""
        measured = each.series(validation_key, each.validation) if validation_key else ((), ())
        label = f"training{of_run}" if len(measured[0]) else of_run.lstrip(", ") or None
        lines.append(Line(*each.series(key), colour, label, dashed=each is not run))
        if len(measured[0]):
            lines.append(Line(*measured, GREEN if each is run else PURPLE, f"validation{of_run}", each is not run, "o"))
    return lines


def _chart(
    run: RunLog,
    name: str,
    title: str,
    lines: list[Line],
    caption: str = "",
    *,
    may_be_log: bool = False,
    is_smooth: bool = False,
    from_zero: bool = False,
    is_share: bool = False,
    size: str = "half",
) -> Chart | None:
    """One chart of lines over steps, with the restarts; None when no line has a value."""
    lines = [line for line in lines if len(line.values)]
    if not lines:
        return None
    low, high = (extreme([extreme(line.values) for line in lines]) for extreme in (min, max))
    is_log = may_be_log and low > 0 and high > _LOG_RATIO * low
    window = smoothing_window(max(len(line.values) for line in lines))
    if is_smooth or all(line.marker for line in lines):
        window = 1

    def paint(axes: Axes) -> None:
        for line in lines:
            _paint_line(axes, line, window)
        for number, step in enumerate(run.restarts):
            axes.axvline(step, color=MUTED, linestyle=":", linewidth=1.1, label=None if number else "restart")
        if is_log:
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis, is_share)
        if any(line.label for line in lines) or run.restarts:
            legend(axes)

    notes = [caption] if caption else []
    if window > 1:
        many = any(len(line.values) > _MOST_POINTS for line in lines)
        thin = f"{_MOST_POINTS:,} of the logged steps" if many else "as logged"
        notes.append(f"Thin: {thin}. Bold: mean of {window:,} logged steps.")
    if is_log:
        notes.append("Logarithmic axis.")
    alt = f"{title} over steps. " + " ".join(_in_words(line, window) for line in lines)
    return draw(name, title, paint, alt=alt, caption=" ".join(notes), size=size)


def _paint_line(axes: Axes, line: Line, window: int) -> None:
    chosen = np.unique(np.linspace(0, len(line.values) - 1, _MOST_POINTS).astype(int))
    style = {"color": line.colour, "linestyle": (0, (4, 2)) if line.dashed else "-"}
    if line.marker is not None:
        axes.plot(line.steps, line.values, marker=line.marker, markersize=4.5, label=line.label, **style)
        return
    if window > 1:
        axes.plot(line.steps[chosen], line.values[chosen], color=line.colour, linewidth=0.8, alpha=0.35)
    values = smooth(line.values, window)
    marker = "o" if len(values) < 12 else None
    axes.plot(line.steps[chosen], values[chosen], label=line.label, marker=marker, markersize=4, **style)


def _in_words(line: Line, window: int) -> str:
    values = smooth(line.values, 1 if line.marker else window)
    who = f"{line.label}: " if line.label else ""
    return (
        f"{who}{values[0]:.3g} at step {line.steps[0]}, {values[-1]:.3g} at step {line.steps[-1]}, "
        f"between {values.min():.3g} and {values.max():.3g}."
    )
