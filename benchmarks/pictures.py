"""Draw the pictures of the documentation into docs/pictures, the same bytes each time.

python benchmarks/pictures.py
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from packscore import plot
from packscore_kernels import Group, SegmentLayout

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
RESULTS = Path(__file__).parent / "results"
# Colours of the light site (Material's, whose page is white) and what stands for them in its dark
# one. Everything else reads on both.
PAGE = ("#ffffff", "#1e2129")
DARK = {
    plot.INK: "#e2e4e9",
    plot.QUIET: "#a3a8b4",
    plot.HIDDEN_COLOUR: "#2e323d",
    plot.PADDING_COLOUR: "#7d828e",
}


def pictures() -> dict[str, Figure]:
    """Every picture by its file name."""
    return {
        "layout.svg": plot.layout((8, [5, 3, 6, 4])),
        "two_queries.svg": plot.layout(two_queries()),
        "tiles.svg": plot.tiles((2_000, [20] * 500)),
        "tiles_mixed.svg": plot.tiles((1_200, [1_900, 640, *[60] * 40, *[12] * 60])),
        "cpu_bfloat16.svg": peers("bfloat16"),
        "cpu_float32.svg": peers("float32"),
    }


def two_queries() -> SegmentLayout:
    """Two queries with items of their own in one launch, and padding."""
    first, second = np.array([2, 3], np.int32), np.array([4, 1, 2], np.int32)
    return SegmentLayout((Group(4, first), Group(3, second)), num_tokens=22)


def peers(dtype: str) -> Figure:
    """What benchmarks/cpu_peers.py measured: a panel for each workload of several items."""
    found = json.loads((RESULTS / f"cpu_peers_{dtype}.json").read_text())
    results = [r for r in found["results"] if len(r["workload"]["item_lens"]) > 1]
    # one below the other, so that a phone shows them in a size to read
    figure = Figure(figsize=(5.4, 0.5 + 1.85 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 1, sharex=True, squeeze=False)[:, 0]
    for axes, result in zip(panels, results, strict=True):
        _draw_peers(axes, result)
        axes.invert_yaxis()
    panels[0].set_xlim(0, 12.5)
    figure.suptitle(
        f"Times that of packscore, {dtype}, one CPU thread, {found['date']}",
        color=plot.INK,
        fontsize=10,
    )
    return figure


def _draw_peers(axes: Axes, result: dict[str, Any]) -> None:
    """A bar for each system: the median, and a line from the smallest to the largest."""
    rows, lens = result["rows"], result["workload"]["item_lens"]
    names = [row["system"].removeprefix("HF ") for row in rows]
    ratios = np.array([row["ratio"] for row in rows])
    low, high = (np.array([row[f"ratio_{end}"] for row in rows]) for end in ("min", "max"))
    own = [name.startswith("packscore") for name in names]
    colours = [plot.FULL_COLOUR if mine else plot.WINDOW_COLOUR for mine in own]
    axes.barh(names, ratios, color=colours, height=0.7)
    axes.hlines(names, low, high, color=plot.INK, linewidth=1)
    for name, ratio, end in zip(names, ratios, high, strict=True):
        axes.text(end + 0.25, name, f"{ratio:.2f}", va="center", fontsize=8, color=plot.INK)
    each = f"{lens[0]}" if min(lens) == max(lens) else f"{min(lens)} to {max(lens)}"
    title = f"query {result['workload']['prefix_len']}, {len(lens)} items of {each}"
    title += f"; packscore: {rows[0]['median_seconds']:.2f} s"
    axes.set_title(title, fontsize=9, loc="left", color=plot.INK)
    axes.set_xticks([0, 5, 10])
    axes.tick_params(axis="x", colors=plot.QUIET, labelsize=8, length=2)
    axes.tick_params(axis="y", labelcolor=plot.INK, labelsize=9, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def save(figures: dict[str, Figure], folder: Path) -> None:
    """Save each as an SVG, the same bytes each time, in the colours of the reader's scheme."""
    folder.mkdir(exist_ok=True)
    # ids and dates inside an SVG differ from run to run otherwise
    matplotlib.rcParams["svg.hashsalt"] = "packscore"
    for name, figure in figures.items():
        drawn = io.StringIO()
        # no background of its own: the style below has one for each scheme
        figure.savefig(drawn, format="svg", metadata={"Date": None}, transparent=True)
        head, end, rest = drawn.getvalue().partition("<defs>")
        (folder / name).write_text(f"{head}{_style()}{end}{rest}")


def _style() -> str:
    """A style sheet that a picture brings along, also where it is shown by itself."""
    light, dark = PAGE
    rules = [f"svg {{background: {dark}}}"]
    # the gaps between cells are lines of the page's colour
    for part, colours in (("fill", DARK), ("stroke", {**DARK, light: dark})):
        rules += [
            f'[style*="{part}: {old.lower()}"] {{{part}: {new} !important}}'
            for old, new in colours.items()
        ]
    dark_rules = "\n  ".join(rules)
    return (
        f"<style>\n svg {{background: {light}}}\n"
        f" @media (prefers-color-scheme: dark) {{\n  {dark_rules}\n }}\n</style>\n "
    )


def main(folder: Path = FOLDER) -> None:
    """Save them."""
    save(pictures(), folder)


if __name__ == "__main__":
    main()
