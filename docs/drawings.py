"""Draws docs/pictures/step.svg and house.svg: `python docs/drawings.py` writes them anew.

Each drawing has a background of its own, so that it reads the same on a light and on a dark page.
"""

from html import escape
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
PAPER, INK, PALE, LINE, FRAME = "#fbfaf7", "#1f2933", "#52606d", "#9aa5b1", "#d8dee4"
QUERY, POSITIVE, NEGATIVE = "#2f6fb0", "#2e8b57", "#c46a1b"
# The rooms of the package, by floor from the roof down, and what lives there. A room uses rooms on floors below it.
FLOORS = [
    [("cli", "ds-embed and recipes/*.py: parse flags, build, call")],
    [("tools", "mine, convert, export, plan, report, doctor: leaves, which no room imports")],
    [("training", "the step, the loop, validation, checkpoints"), ("mteb_model", "a run as a model of MTEB")],
    [("vectors", "a corpus to vectors, Embedder, search, metrics")],
    [("models", "what a model says of itself, loading, LoRA, the DeepSpeed engine")],
    [("data", "records, tokens on disk, order, batches, plan")],
    [
        ("artifact", "whole or absent"),
        ("job", "ranks, collectives, watchdog"),
        ("losses", "vectors in, loss and gradient out"),
    ],
    [("settings", "flags, YAML, the DeepSpeed JSON, the errors a user can cure")],
]


class Drawing:
    """SVG elements, collected in the order in which they are painted. Lengths are in pixels of the drawing."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{PALE}"/></marker></defs>',
        ]
        self.box(0.5, 0.5, width - 1, height - 1, fill=PAPER, line=FRAME, round=14)

    def box(self, x, y, width, height, *, fill="#ffffff", line: str | None = LINE, round=6):
        stroke = f' stroke="{line}"' if line else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{round}" fill="{fill}"{stroke}/>'
        )

    def text(self, x, y, words: str, *, size=15, color=INK, bold=False, middle=False):
        style = (' font-weight="600"' if bold else "") + (' text-anchor="middle"' if middle else "")
        self.parts.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}"{style}>{escape(words)}</text>')

    def arrow(self, path: str):
        self.parts.append(f'<path d="{path}" fill="none" stroke="{PALE}" stroke-width="2" marker-end="url(#tip)"/>')

    def shape(self, path: str, fill: str, line: str = LINE):
        self.parts.append(f'<path d="{path}" fill="{fill}" stroke="{line}"/>')

    def __str__(self):
        return "\n".join([*self.parts, "</svg>", ""])


def step() -> str:
    """Four queries, their positives and a hard negative each, on three ranks."""
    d = Drawing(1110, 600, "A training step: plan, encode, gather, loss, backward")
    # Text by text in the order of the batch: its color and its length in tokens.
    lengths = [(QUERY, 30), (QUERY, 22), (QUERY, 38), (QUERY, 26)]
    lengths += [(POSITIVE, 96), (POSITIVE, 120), (POSITIVE, 74), (POSITIVE, 108)]
    lengths += [(NEGATIVE, 84), (NEGATIVE, 112), (NEGATIVE, 66), (NEGATIVE, 100)]
    d.text(30, 42, "A training step: the batch belongs to the job, not to the rank", size=20, bold=True)
    for x, head, below in (
        (30, "1  Plan", "the texts of the global batch"),
        (245, "2  Encode", "micro-batches of about equal length"),
        (585, "3  Gather", "every rank: one table"),
        (815, "4  Loss", "in tiles, no graph over ranks"),
    ):
        d.text(x, 84, head, size=17, bold=True)
        d.text(x, 106, below, size=14, color=PALE)
    for i, (color, length) in enumerate(lengths):
        d.box(30, 130 + 27 * i, length * 1.2, 17, fill=color, line=None, round=3)
    for y, word, color in (
        (478, "queries", QUERY),
        (500, "their documents", POSITIVE),
        (522, "hard negatives", NEGATIVE),
    ):
        d.box(30, y - 12, 14, 14, fill=color, line=None, round=3)
        d.text(52, y, word, size=14)
    # Longest first, dealt round by round; every rank has as many micro-batches.
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i][1])
    for rank in range(3):
        y = 130 + 112 * rank
        d.box(245, y, 290, 96)
        d.text(257, y + 20, f"rank {rank}", size=14, bold=True)
        for batch in range(2):
            x = 255 + 146 * batch
            d.box(x, y + 30, 128 if batch == 0 else 124, 58, fill=PAPER, line=FRAME)
            for k in range(2):
                color, length = lengths[order[6 * batch + 2 * rank + k]]
                d.box(x + 6, y + 37 + 23 * k, length * 0.95, 17, fill=color, line=None, round=3)
    for i, (color, _) in enumerate(lengths):
        for k in range(8):
            d.box(585 + 19 * k, 130 + 27 * i, 17, 22, fill=color, line=None, round=2)
    d.text(585, 478, "U texts x D dimensions, float32", size=14, color=PALE)
    # Scores of four queries against eight documents; the diagonal is right.
    for i in range(4):
        for j in range(8):
            right, own = i == j, j == 4 + i
            fill = "#bfe3cd" if right else "#f3d3b5" if own else "#e4e9ee"
            d.box(815 + 29 * j, 130 + 40 * i, 26, 36, fill=fill, line=None, round=3)
    d.text(815, 314, "a row: one query, all documents", size=14, color=PALE)
    d.text(815, 336, "each rank takes a share of the rows", size=14, color=PALE)
    d.text(815, 376, "out: the loss, and G, its gradient", size=14)
    d.text(815, 398, "for each row of the table", size=14)
    for x, end in ((182, 237), (540, 577), (742, 807)):
        d.arrow(f"M{x} 290 H{end}")
    d.arrow("M930 412 V540 H390 V476")
    d.text(425, 532, "5  Backward", size=17, bold=True)
    d.text(425, 562, "each rank drives its own vectors E with the sum of E times G;", size=14)
    d.text(425, 582, "DeepSpeed reduces the gradients of the weights", size=14)
    return str(d)


def house() -> str:
    """The rooms by floor."""
    floor, left, right, top = 62, 60, 900, 128
    d = Drawing(960, top + floor * len(FLOORS) + 44, "The rooms of ds_embed")
    d.text(30, 40, "The house: a room uses only rooms on floors below it", size=20, bold=True)
    d.shape(f"M{left - 24} {top} L{(left + right) / 2} 62 L{right + 24} {top} Z", "#e9eef3")
    for i, rooms in enumerate(FLOORS):
        y, width = top + floor * i, (right - left) / len(rooms)
        for k, (name, lives) in enumerate(rooms):
            x = left + width * k
            d.box(x, y, width, floor, round=0)
            d.text(x + 16, y + 26, name, size=17, bold=True)
            d.text(x + 16, y + 47, lives, size=14, color=PALE)
    bottom = top + floor * len(FLOORS)
    d.box(left - 24, bottom, right - left + 48, 12, fill=LINE, line=None, round=0)
    return str(d)


DRAWINGS = {"step.svg": step, "house.svg": house}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (PICTURES / name).write_text(draw(), encoding="utf-8")
