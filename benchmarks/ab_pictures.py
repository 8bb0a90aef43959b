"""Renew docs/ab.md's tables and draw its charts, from benchmarks/results/ab_tables.json.

python benchmarks/ab_pictures.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

import ab_tables
import pictures as drawings
from packscore.plot import (
    CELL_INK,
    INK,
    ITEM_COLOURS,
    PADDING_COLOUR,
    PREFIX_COLOUR,
    QUIET,
    WHITE_INK,
)

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "ab.md"
DENSE_COLOUR = ITEM_COLOURS[0]
MASK_COLOURS = {"dense": DENSE_COLOUR, "segment": PREFIX_COLOUR}
PARTS = {  # of a program's time: their names in the results, and their colours
    "attention": (("attention",), PREFIX_COLOUR),
    "other matmuls": (("matmuls",), ITEM_COLOURS[4]),
    "norms, rope, embedding, head": (("rest", "once"), ITEM_COLOURS[1]),
    "steps of grids": (("grid steps",), DENSE_COLOUR),
}
SPREAD = ("min", "max")
TABLE = r"(<!-- table: {} -->\n).*?(<!-- end -->)"

Bar = tuple[str, float, str]  # label, length, colour


def page(text: str, results: dict[str, Any]) -> str:
    """The page with every table between its marks made anew."""
    for name, table in ab_tables.tables(results).items():
        pattern = re.compile(TABLE.format(re.escape(name)), re.DOTALL)
        text = pattern.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    return text


def pictures(results: dict[str, Any]) -> dict[str, Figure]:
    """Every chart by its file name."""
    return {
        "ab_predicted.svg": predicted(results),
        "ab_parts.svg": parts(results),
        "ab_measured.svg": measured(results),
    }


def predicted(results: dict[str, Any]) -> Figure:
    """Items a second of every row, beside what others published, on a logarithmic scale."""
    by_chip = {
        chip: [
            (f"{row['mask']}, {row['flow']}", row["items_per_s"], MASK_COLOURS[row["mask"]])
            for row in results["predicted"][chip]["rows"]
            if "ms" in row
        ]
        for chip in ab_tables.CHIPS
    }
    *others, limit = results["published"]
    heights = [len(others), *map(len, by_chip.values())]
    figure = _figure(7.6, 0.31 * sum(heights) + 1.6)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=heights)
    published = [(one["system"], one["items_per_s"], PADDING_COLOUR) for one in others]
    _bars(axes[0], published, "published: measured by others, one v6e chip")
    for chart, (chip, bars) in zip(axes[1:], by_chip.items(), strict=True):
        _bars(chart, bars, f"packscore's programs, predicted, one {chip} chip")
    for chart in axes[:2]:
        chart.axvline(limit["items_per_s"], color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    axes[0].annotate(
        f"arithmetic limit of v6e\n{limit['items_per_s']:,}",
        (limit["items_per_s"], 0.5),
        xycoords=("data", "axes fraction"),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=QUIET,
    )
    axes[0].set(xscale="log", xlim=(20, 60_000))
    axes[2].set_xlabel("items a second (logarithmic)", color=QUIET, fontsize=9)
    axes[2].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return figure


def parts(results: dict[str, Any]) -> Figure:
    """What the milliseconds of every row go to."""
    figure = _figure(7.6, 3.6)
    charts = figure.subplots(2, 1)
    for chart, chip in zip(charts, ab_tables.CHIPS, strict=True):
        rows = [row for row in results["predicted"][chip]["rows"] if "ms" in row]
        for at, row in enumerate(rows):
            left = 0.0
            for names, colour in PARTS.values():
                width = sum(row["parts_ms"][name] for name in names)
                chart.barh(at, width, left=left, color=colour, height=0.66)
                left += width
            _label(chart, at, left, f"{left:.0f}", 4, INK)
        longest = max(row["ms"] for row in rows)
        chart.set(xlim=(0, 1.08 * longest))
        _axis(chart, [f"{row['mask']}, {row['flow']}" for row in rows])
        chart.set_title(f"one {chip} chip, predicted ms", loc="left", fontsize=9, color=INK)
    handles = [Patch(facecolor=colour, label=name) for name, (_, colour) in PARTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def measured(results: dict[str, Any]) -> Figure:
    """How many times as fast as one by one (dashed), on the CPU, with the range over rounds."""
    workloads = results["measured"]["results"]
    figure = _figure(7.6, 1.0 + 1.35 * len(workloads))
    charts = figure.subplots(len(workloads), 1, sharex=True, squeeze=False)[:, 0]
    for chart, one in zip(charts, workloads, strict=True):
        rows = [row for row in one["rows"] if row["scaled_from_items"] is None]
        for at, row in enumerate(rows):
            times, spread = row["times_one_by_one"], [row[f"times_one_by_one_{x}"] for x in SPREAD]
            chart.barh(at, times, color=MASK_COLOURS[row["system"].split()[0]], height=0.66)
            chart.plot(spread, [at, at], color=INK, linewidth=1.2, solid_capstyle="butt")
            _label(chart, at, spread[1], f"{times:.1f} x", 4, INK)
        _axis(chart, [row["system"] for row in rows])
        chart.axvline(1, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
        title = f"query {one['prefix_len']:,}, {one['num_items']} items x {one['item_len']}"
        chart.set_title(f"{title}, measured on a CPU", loc="left", fontsize=9, color=INK)
    longest = max(row["times_one_by_one_max"] for one in workloads for row in one["rows"])
    charts[0].set_xlim(0, 1.1 * longest)
    charts[-1].set_xlabel("times as fast as one by one (dashed)", color=QUIET, fontsize=9)
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _bars(chart: Axes, bars: list[Bar], title: str) -> None:
    for at, (_, length, colour) in enumerate(bars):
        chart.barh(at, length, color=colour, height=0.66)
        # inside the bar, where no line crosses it
        ink = "white" if colour in WHITE_INK else CELL_INK
        _label(chart, at, length, f"{length:,.0f}", -4, ink)
    _axis(chart, [label for label, _, _ in bars])
    chart.set_title(title, loc="left", fontsize=9, color=INK)


def _label(chart: Axes, at: int, x: float, text: str, points: float, ink: str) -> None:
    """A number beside the end of a bar."""
    side = "right" if points < 0 else "left"
    offset = {"xytext": (points, 0), "textcoords": "offset points"}
    chart.annotate(text, (x, at), **offset, ha=side, va="center", fontsize=8, color=ink)


def _axis(chart: Axes, labels: list[str]) -> None:
    chart.set_yticks(range(len(labels)), labels, fontsize=8, color=INK)
    chart.set_ylim(len(labels) - 0.45, -0.55)
    chart.tick_params(axis="y", length=0)
    chart.tick_params(axis="x", colors=QUIET, labelsize=8, length=2)
    for side in chart.spines.values():
        side.set_visible(False)


def main() -> None:
    """Write the page and the charts."""
    results = ab_tables.load()
    PAGE.write_text(page(PAGE.read_text(), results))
    drawings.save(pictures(results), DOCS / "pictures")


if __name__ == "__main__":
    main()
