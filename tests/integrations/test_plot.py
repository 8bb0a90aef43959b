"""The pictures: drawn from the layout and the schedule, and nothing left out of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure

import pictures
from packscore import InputError, plot
from packscore_kernels import BlockSizes, Group, SegmentLayout, build_schedule

ROOT = Path(__file__).resolve().parents[2]


def group(prefix_len: int, item_lens: list[int], **cached: Any) -> Group:
    return Group(prefix_len, np.array(item_lens, np.int32), **cached)


# (query, item 1 of one token, item 2 of two): who sees whom, written out
SMALL = """
    x....
    xx...
    xxx..
    xx.x.
    xx.xx
"""


def drawn_cells(figure: Figure) -> set[tuple[int, int]]:
    """(row, column) of the cells of the mask."""
    (axes,) = figure.axes
    (cells,) = (c for c in axes.collections if isinstance(c, PatchCollection))
    corners = [path.vertices.min(axis=0) for path in cells.get_paths()]
    return {(round(y), round(x)) for x, y in corners}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_small_layout_is_drawn_token_by_token() -> None:
    figure = plot.layout((2, [1, 2]), title="a title")
    rows = SMALL.split()
    expected = {(y, x) for y, row in enumerate(rows) for x, c in enumerate(row) if c == "x"}
    assert drawn_cells(figure) == expected
    shown = texts(figure)
    assert shown[:5] == ["0", "1", "2", "2", "3"]
    assert figure.get_suptitle() == "a title"


def test_groups_and_padding_keep_apart() -> None:
    found = SegmentLayout((group(3, [2, 0]), group(0, [3])), 10)
    cells = drawn_cells(plot.layout(found))
    assert max(max(cell) for cell in cells) == 7  # the two tokens of padding see nothing
    assert {x for y, x in cells if y >= 5} == {5, 6, 7}
    shown = texts(plot.layout(found))
    assert shown[:8] == ["0", "1", "2", "3", "4", "0", "1", "2"]
    assert "query" in shown
    assert "item 1" in shown


LAYOUTS = {
    "P300-N3-long": SegmentLayout.single(300, [700, 20, 513]),
    "P1000-N40-short": SegmentLayout.single(1_000, [20] * 40),
    "P1-N1-tiny": SegmentLayout.single(1, [1]),
    "P0-N2-no-prefix": SegmentLayout.single(0, [300, 200], 640),
    "G3-mixed-padded": SegmentLayout(
        (group(257, [129, 1, 64]), group(0, [130]), group(511, [3] * 50)), 1_536
    ),
}
BLOCKS = {
    "128x128": BlockSizes(block_q=128, block_kv=128, chunk_kv=128),
    "256x128": BlockSizes(block_q=256, block_kv=128, chunk_kv=256),
    "128x256": BlockSizes(block_q=128, block_kv=256, chunk_kv=512),
}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("found", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tiles_hold_every_visible_pair_and_full_ones_nothing_else(
    found: SegmentLayout, blocks: BlockSizes
) -> None:
    schedule = build_schedule(found, block_sizes=blocks)
    visible = plot._visible(found)
    kinds = plot.tile_kinds(schedule)
    by_token = np.repeat(np.repeat(kinds, blocks.block_q, 0), blocks.block_kv, 1)
    by_token = by_token[: found.num_tokens, : found.num_tokens]
    computed = by_token >= plot.MASKED
    for top, left, width, height in plot.window_boxes(schedule):
        computed[int(top) : int(top + height), int(left) : int(left + width)] = True
    assert not (visible & ~computed).any()
    assert not (visible & (by_token == plot.SKIPPED)).any()
    real = slice(0, found.num_real_tokens)
    whole = (by_token == plot.FULL)[real, real]
    assert (visible[real, real] | ~whole).all()


def test_long_layouts_skip_most_tiles() -> None:
    found = SegmentLayout.single(2_000, [20] * 500)
    blocks = BlockSizes(block_q=512, block_kv=512, chunk_kv=1024)
    kinds = plot.tile_kinds(build_schedule(found, block_sizes=blocks))
    assert (kinds == plot.SKIPPED).mean() > 0.75
    assert (kinds[4:, :3] == plot.FULL).all()
    title = plot.tiles(found).axes[0].get_title(loc="left")
    assert f"{(kinds == plot.FULL).sum()} full, {(kinds == plot.MASKED).sum()} masked" in title
    assert f"{(kinds == plot.SKIPPED).sum()} of {kinds.size} skipped" in title
    assert plot.tiles(found, title="mine").axes[0].get_title(loc="left") == "mine"


def test_what_cannot_be_drawn_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="layout has 97 tokens and must have 1 to 96"):
        plot.layout((90, [7]))
    with pytest.raises(InputError, match="layout has 0 tokens"):
        plot.layout((0, []))
    with pytest.raises(InputError, match="layout has no tokens"):
        plot.tiles((0, []))
    cached = group(0, [3], cached_len=16, page_indices=np.zeros(1, np.int32))
    for draw in (plot.layout, plot.tiles):
        with pytest.raises(InputError, match="layout has tokens in pages"):
            draw(SegmentLayout((cached,), 3))
    for bad in (3, "ab", (1, 2), (1, [-2]), (1.5, [2]), None):
        with pytest.raises(InputError, match=r"layout_or_lens=.* must be a SegmentLayout or"):
            plot.layout(bad)  # type: ignore[arg-type]


def drawn_by(picture: bytes) -> bytes:
    return re.search(rb"Matplotlib v[\d.]+", picture)[0]


def test_the_pictures_of_the_docs_are_made_the_same_each_time(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        pictures.main(folder)
    # charts of benchmarks have a script and a test of their own
    drawn = (path.name for path in (ROOT / "docs/pictures").iterdir())
    kept = {name for name in drawn if not name.startswith("ab_")}
    made = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert kept == set(made)
    for name, content in made.items():
        assert content == (tmp_path / "b" / name).read_bytes()
        shown = (ROOT / "docs/pictures" / name).read_bytes()
        assert len(shown) < 150_000
        if drawn_by(shown) == drawn_by(content):  # another matplotlib may draw other bytes
            assert shown == content, f"{name} is not what benchmarks/pictures.py draws: run it"
        # both schemes: dark ink on a dark page is not to be read
        assert b"prefers-color-scheme: dark" in content
        assert b"fill: #ffffff" not in content.partition(b'id="patch_1"')[2][:400]
    # and every one of them is shown somewhere
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    assert set(re.findall(r"\(pictures/(?!ab_)([^)]+)\)", pages)) == kept
