"""Charts of what the vectors do with the test queries: similarities, margins, ranks, the map of documents."""

import numpy as np
from matplotlib.axes import Axes

from ds_embed.tools.report.neighbours import Found
from ds_embed.tools.report.style import BLUE, GREEN, INK, MUTED, ORANGE, Chart, draw, legend, plain_ticks

_BINS = 60
_RANKS = ((1, 1), (2, 3), (4, 10), (11, 100), (101, None))
# How a document's queries fare, by their median rank of it: up to which median, the label, colour and marker.
_FATES = ((1, "found first", BLUE, "o"), (10, "in the first ten", GREEN, "^"), (np.inf, "later", ORANGE, "X"))


def similarity_chart(found: Found) -> Chart:
    """Histograms of a query's score with its right document, with random ones, with the hardest wrong one."""
    hardest = found.hardest_score[np.isfinite(found.hardest_score)]
    groups = [
        ("random document", found.random_score, MUTED, ":"),
        ("hardest wrong document", hardest, ORANGE, "--"),
        ("right document", found.right_score, BLUE, "-"),
    ]
    groups = [group for group in groups if len(group[1])]
    bins = _bins(np.concatenate([values for _, values, *_ in groups]))

    def paint(axes: Axes) -> None:
        for label, values, colour, dashes in groups:
            _outline(axes, values, bins, colour, dashes, label)
        axes.set_xlabel(found.score_name)
        plain_ticks(axes.xaxis)
        axes.set_ylabel("share of pairs")
        plain_ticks(axes.yaxis, is_share=True)
        legend(axes)

    medians = ", ".join(f"{label} {np.median(values):.3f}" for label, values, *_ in groups)
    return draw(
        "similarity",
        "Similarity to the query",
        paint,
        alt=f"Histograms of the {found.score_name} between queries and documents; medians: {medians}.",
        caption=f"Medians: {medians}.",
        size="wide",
    )


def margin_chart(found: Found) -> Chart | None:
    """How far the right document is ahead of the hardest wrong one; None where no wrong one was found."""
    margin = (found.right_score - found.hardest_score)[np.isfinite(found.hardest_score)]
    if not len(margin):
        return None
    ahead = float((margin > 0).mean())
    bins = _bins(margin)

    def paint(axes: Axes) -> None:
        _outline(axes, margin[margin > 0], bins, BLUE, "-", "ahead", len(margin))
        _outline(axes, margin[margin <= 0], bins, ORANGE, "--", "behind", len(margin))
        axes.axvline(0, color=INK, linewidth=0.9)
        axes.set_xlabel(f"{found.score_name} of the right document minus that of the hardest wrong one")
        plain_ticks(axes.xaxis)
        axes.set_ylabel("share of queries")
        plain_ticks(axes.yaxis, is_share=True)
        legend(axes)

    text = f"The right document is ahead for {ahead:.1%} of {len(margin):,} queries; median margin {np.median(margin):+.3f}."
    return draw("margin", "Margin over the hardest wrong document", paint, alt=f"Histogram. {text}", caption=text)


def rank_chart(found: Found) -> Chart:
    """At which rank queries find their right document."""
    names, shares = [], []
    for low, high in _RANKS:
        if low > len(found.document_ids):
            break
        names.append(str(low) if high == low else f"{low} to {high}" if high else f"over {low - 1}")
        inside = (found.rank >= low) & (found.rank <= (high or found.rank.max()))
        shares.append(float(inside.mean()))

    def paint(axes: Axes) -> None:
        bars = axes.bar(names, shares, width=0.62, color=[BLUE] + [GREEN] * 2 + [ORANGE] * (len(names) - 3))
        axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=2)
        axes.set_xlabel("rank of the right document")
        axes.set_ylabel("share of queries")
        axes.margins(y=0.12)
        plain_ticks(axes.yaxis, is_share=True)

    text = "; ".join(f"rank {name}: {share:.1%}" for name, share in zip(names, shares))
    caption = f"Median rank {np.median(found.rank):.0f} of {len(found.document_ids):,} documents."
    return draw("ranks", "Where the right document ranks", paint, alt=f"Bar chart. {text}. {caption}", caption=caption)


def map_chart(found: Found, rows: np.ndarray, points: np.ndarray, share: float, method: str) -> Chart:
    """The documents of `rows` at `points` (m, 2), marked by how the queries that ask for them fare."""
    ranks: dict[int, list[int]] = {}
    for row, rank in zip(found.right.tolist(), found.rank.tolist()):
        ranks.setdefault(row, []).append(rank)
    medians = np.array([np.median(ranks[row]) if row in ranks else np.nan for row in rows.tolist()])
    groups = [("no query", np.isnan(medians), MUTED, ".")]
    above = 0
    for limit, label, colour, marker in _FATES:
        groups.append((label, (medians > above) & (medians <= limit), colour, marker))
        above = limit
    groups = [group for group in groups if group[1].any()]

    def paint(axes: Axes) -> None:
        for label, chosen, colour, marker in groups:
            size, strength = (10, 0.45) if colour == MUTED else (20, 0.7)
            axes.scatter(
                *points[chosen].T,
                s=size,
                c=colour,
                marker=marker,
                alpha=strength,
                linewidths=0,
                label=f"{label} ({chosen.sum():,})",
            )
        axes.set(xticks=[], yticks=[])
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines["bottom"].set_visible(False)
        axes.margins(0.02)
        legend(axes)

    counts = ", ".join(f"{label} {chosen.sum():,}" for label, chosen, *_ in groups)
    number = f"{len(rows):,} of {len(found.document_ids):,} documents"
    how = {
        "pca": f"The two principal axes, which hold {share:.0%} of the variance: near here need not be near in full.",
        "tsne": "t-SNE: neighbours stay together; distances and sizes of groups mean nothing.",
    }[method]
    caption = f"{number}, by the median rank at which their queries find them. {how}"
    alt = f"Scatter plot. {counts}. {caption}"
    return draw("map", "Map of the documents", paint, alt=alt, caption=caption, size="map")


def _bins(values: np.ndarray) -> np.ndarray:
    """Edges of equal bins over all values, one of them at zero."""
    low, high = float(values.min()), float(values.max())
    width = max(high - low, 1e-3) / _BINS
    return width * np.arange(np.floor(low / width), np.floor(high / width) + 2)


def _outline(axes: Axes, values, bins, colour: str, dashes: str, label: str, total: int | None = None) -> None:
    shares = np.histogram(values, bins)[0] / (total or max(1, len(values)))
    axes.stairs(shares, bins, fill=True, color=colour, alpha=0.16)
    axes.stairs(shares, bins, color=colour, linewidth=1.6, linestyle=dashes, label=label)
