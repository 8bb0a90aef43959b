"""Renew docs/ab.md's tables and draw its charts, from benchmarks/results/ab_tables.json.

python docs/ab_pictures.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from packscore.plot import INK, ITEM_COLOURS, PADDING_COLOUR, PREFIX_COLOUR, QUIET

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "benchmarks"))

import ab_tables  # noqa: E402 - found through the line above

PAGE = DOCS / "ab.md"
DENSE_COLOUR = ITEM_COLOURS[0]
MASK_COLOURS = {"dense": DENSE_COLOUR, "segment": PREFIX_COLOUR}
PARTS = {  # of a program's time, and their colours
    "attention": PREFIX_COLOUR,
    "matmuls": ITEM_COLOURS[4],
    "rest": ITEM_COLOURS[0],
    "once": INK,
}
TABLE = r"(<!-- table: {} -->\n).*?(\n<!-- end -->)"

Bar = tuple[str, float, str]  # label, length, colour


def page(text: str, results: dict[str, Any]) -> str:
    """The page with every table between its marks made anew."""
    for name, table in ab_tables.tables(results).items():
        pattern = re.compile(TABLE.format(re.escape(name)), re.DOTALL)
        text = pattern.sub(lambda found, table=table: found[1] + table + found[2], text)
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
    _plain_numbers(axes[2])
    return figure


def parts(results: dict[str, Any]) -> Figure:
    """What the milliseconds of every row go to."""
    figure = _figure(7.6, 3.6)
    charts = figure.subplots(2, 1)
    for chart, chip in zip(charts, ab_tables.CHIPS, strict=True):
        rows = [row for row in results["predicted"][chip]["rows"] if "ms" in row]
        for at, row in enumerate(rows):
            left = 0.0
            for name, colour in PARTS.items():
                width = row["parts_ms"][name]
                chart.barh(at, width, left=left, color=colour, height=0.66)
                left += width
            chart.text(left, at, f"  {left:.0f}", va="center", fontsize=8, color=INK)
        longest = max(row["ms"] for row in rows)
        chart.set(xlim=(0, 1.08 * longest))
        _axis(chart, [f"{row['mask']}, {row['flow']}" for row in rows])
        chart.set_title(f"one {chip} chip, predicted ms", loc="left", fontsize=9, color=INK)
    handles = [Patch(facecolor=colour, label=name) for name, colour in PARTS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def measured(results: dict[str, Any]) -> Figure:
    """How many times as fast as one by one, on the CPU, with the spread over rounds."""
    workloads = results["measured"]["results"]
    figure = _figure(7.6, 1.0 + 1.35 * len(workloads))
    charts = figure.subplots(len(workloads), 1, sharex=True, squeeze=False)[:, 0]
    for chart, one in zip(charts, workloads, strict=True):
        rows = [row for row in one["rows"] if row["times_one_by_one"] != 1.0]
        bars = [
            (row["system"], row["times_one_by_one"], MASK_COLOURS[row["system"].split()[0]])
            for row in rows
        ]
        title = f"query {one['prefix_len']:,}, {one['num_items']} items x {one['item_len']}"
        _bars(chart, bars, f"{title}, measured on a CPU", "{:.1f} x")
        for at, row in enumerate(rows):
            spread = [row["times_one_by_one_min"], row["times_one_by_one_max"]]
            chart.plot(spread, [at, at], color=INK, linewidth=1.2, solid_capstyle="butt")
    charts[0].set(xscale="log")
    low = min(row["times_one_by_one_min"] for one in workloads for row in one["rows"])
    high = max(row["times_one_by_one_max"] for one in workloads for row in one["rows"])
    charts[0].set_xlim(min(low, 1.0), 1.6 * high)
    charts[-1].set_xlabel("times one by one (logarithmic)", color=QUIET, fontsize=9)
    _plain_numbers(charts[-1])
    return figure


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def _bars(chart: Axes, bars: list[Bar], title: str, form: str = "{:,.0f}") -> None:
    for at, (_, length, colour) in enumerate(bars):
        chart.barh(at, length, color=colour, height=0.66)
        label = f"  {form.format(length)}"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        chart.annotate(
            label, (length, at), va="center", fontsize=8, color=INK, bbox=box, xytext=(3, 0),
            textcoords="offset points",
        )  # fmt: skip
    _axis(chart, [label for label, _, _ in bars])
    chart.set_title(title, loc="left", fontsize=9, color=INK)


def _axis(chart: Axes, labels: list[str]) -> None:
    chart.set_yticks(range(len(labels)), labels, fontsize=8, color=INK)
    chart.set_ylim(len(labels) - 0.45, -0.55)
    chart.tick_params(axis="y", length=0)
    chart.tick_params(axis="x", colors=QUIET, labelsize=8, length=2)
    for side in chart.spines.values():
        side.set_visible(False)


def _plain_numbers(chart: Axes) -> None:
    chart.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    chart.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def main() -> None:
    """Write the page and the charts."""
    results = ab_tables.load()
    PAGE.write_text(page(PAGE.read_text(), results))
    # ids and dates inside an SVG differ from run to run otherwise
    matplotlib.rcParams["svg.hashsalt"] = "packscore"
    for name, figure in pictures(results).items():
        figure.savefig(DOCS / "pictures" / name, metadata={"Date": None})


if __name__ == "__main__":
    main()
