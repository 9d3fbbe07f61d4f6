"""How every chart of a report looks, and how it becomes a picture: SVG that follows the page's colours, and PNG.

The colours are Okabe and Ito's (2008), told apart with every kind of colour vision; where two lines share a chart
they differ in dashes or markers as well. In the page each colour is a CSS variable, so that one SVG serves light,
dark and print.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1c1e21", "#5f6771", "#e2e5e9"
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#aa4499"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BLUE: "blue", ORANGE: "orange", GREEN: "green", PURPLE: "purple"}
SERIES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (MUTED, "v"), (INK, "P"))

# Inches: of the picture, and of a second one for narrow screens where the first would be too small to read.
_SIZES = {"half": ((5.0, 2.9), None), "wide": ((10.4, 3.0), (5.0, 2.9)), "map": ((10.4, 6.2), (5.0, 5.0))}
_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.parse_math": False,  # a dollar sign in a run's name is one
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.0,
    "svg.fonttype": "none",  # text stays text, in the page's own font
}


@dataclass(frozen=True)
class Chart:
    """One drawn chart; `alt` says in words what it shows, `caption` how to read it."""

    name: str
    title: str
    alt: str
    caption: str
    svg: str
    svg_narrow: str | None  # for narrow screens, of a chart that takes a whole row elsewhere
    png: bytes


def draw(
    name: str, title: str, paint: Callable[[Axes], None], *, alt: str, caption: str = "", size: str = "half"
) -> Chart:
    """Let `paint` fill the axes of a chart, and turn it into pictures; `size` is "half", "wide" or "map"."""
    inches, narrow_inches = _SIZES[size]
    with matplotlib.rc_context(_RC):
        figure = _painted(paint, inches)
        svg = _for_page(figure, name)
        # The page has its own heading; a picture that goes elsewhere takes it along.
        axes = figure.axes[0]
        above = axes.get_legend()
        axes.set_title(title, pad=8 if above is None else 12 + above.get_window_extent().height * 72 / figure.dpi)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Description": alt})
        narrow = narrow_inches and _for_page(_painted(paint, narrow_inches), f"{name}-narrow")
    return Chart(name, title, alt, caption, svg, narrow, png.getvalue())


def _painted(paint: Callable[[Axes], None], inches: tuple[float, float]) -> Figure:
    figure = Figure(figsize=inches, layout="constrained")
    paint(figure.subplots())
    return figure


def legend(axes: Axes) -> None:
    """A legend above the axes, clear of the data, in as many columns as the figure has room for."""
    handles, labels = axes.get_legend_handles_labels()
    column = 0.55 + 0.085 * max(map(len, labels))  # inches; a guess on the safe side, whatever the page's font
    num_columns = max(1, int((axes.figure.get_figwidth() - 0.6) / column))
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1.02),
        ncols=min(num_columns, len(labels)),
        columnspacing=1.2,
        handletextpad=0.5,
    )


def plain_ticks(axis, is_share: bool = False) -> None:
    """Numbers as people write them, shares in percent, without offsets or powers of ten set as formulas."""
    if axis.get_scale() == "log":
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(matplotlib.ticker.NullLocator())
    if is_share:
        axis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
    else:
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}")


def _for_page(figure: Figure, name: str) -> str:
    """A figure as SVG for use inside HTML: ids of its own, colours and font of the page."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("'DejaVu Sans'", "var(--font)")
