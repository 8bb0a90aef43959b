"""Pictures of what packing does: who sees whom, and which tiles the kernel visits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from packscore.errors import InputError, MissingPackageError
from packscore.inputs import short
from packscore_kernels.attention.layout import PAD_SEGMENT, PREFIX_SEGMENT, SegmentLayout

try:
    from matplotlib.axes import Axes
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.ticker import StrMethodFormatter
except ImportError as error:
    raise MissingPackageError("packscore.plot", "plot") from error

if TYPE_CHECKING:
    from packscore_kernels.attention.types import BlockSizes, SegmentSchedule

# Okabe and Ito's colours, which stay apart for every kind of colour blindness: the prefix, and the
# items in turn.
PREFIX_COLOUR = "#0072B2"
ITEM_COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
PADDING_COLOUR, HIDDEN_COLOUR, INK, QUIET = "#C8C8C8", "#F4F4F2", "#222222", "#6B6B6B"
WHITE_INK = (PREFIX_COLOUR, "#009E73", "#D55E00")  # colours on which white reads better
CELL_INK = "#1C1C1C"  # on the others; it stays dark where a picture's own ink turns light
FULL_COLOUR, MASKED_COLOUR, WINDOW_COLOUR = PREFIX_COLOUR, "#56B4E9", "#E69F00"

MAX_DRAWN_TOKENS = 96  # beyond it, tokens are too small to see
SKIPPED, WINDOW, MASKED, FULL = range(4)  # what the kernel does with a tile

Boxes = list[tuple[float, float, float, float]]  # (left, top, width, height) in tokens


def layout(
    layout_or_lens: SegmentLayout | tuple[int, Sequence[int]], *, title: str | None = None
) -> Figure:
    """Draw packed tokens with their segments and positions, and below them who sees whom.

    Args:
      layout_or_lens: a `SegmentLayout`, or (prefix_len, item_lens), of at most 96 tokens.
      title: a line above the picture.

    Returns:
      A matplotlib figure; `figure.savefig("layout.svg")` keeps it.

    Raises:
      InputError: too many tokens to draw, none, or tokens in pages.
    """
    found = _as_layout(layout_or_lens)
    count = found.num_tokens
    if not 0 < count <= MAX_DRAWN_TOKENS:
        raise InputError(
            f"layout has {count} tokens and must have 1 to {MAX_DRAWN_TOKENS} to be drawn one by "
            "one; packscore.plot.tiles draws long ones"
        )
    side = max(3.2, 0.9 + 0.19 * count)
    figure = Figure(figsize=(side, side + 0.7), facecolor="white", layout="constrained")
    # one pair of axes for both, so that a token stays above its column
    axes = figure.subplots()
    _draw_tokens(axes, found)
    _draw_mask(axes, found)
    axes.set(xlim=(0, count), ylim=(count, -3.6), aspect="equal", xticks=[], yticks=[])
    _plain(axes)
    if title:
        figure.suptitle(title, color=INK, fontsize=11)
    return figure


def tiles(
    layout_or_lens: SegmentLayout | tuple[int, Sequence[int]],
    *,
    block_sizes: BlockSizes | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the tiles of scores that the kernel computes whole, computes with a mask, and skips.

    It is drawn from the schedule that the kernel itself runs by (`build_schedule`).

    Args:
      layout_or_lens: a `SegmentLayout`, or (prefix_len, item_lens).
      block_sizes: the kernel's tiles; None takes 512 x 512.
      title: a line above the picture.

    Returns:
      A matplotlib figure.

    Raises:
      InputError: no tokens, or tokens in pages.
    """
    # imported here: the schedule brings jax
    from packscore_kernels.attention.schedule import build_schedule
    from packscore_kernels.attention.types import BlockSizes

    found = _as_layout(layout_or_lens)
    if not found.num_real_tokens:
        raise InputError("layout has no tokens, and must have 1 at least to be drawn")
    blocks = block_sizes or BlockSizes(block_q=512, block_kv=512, chunk_kv=1024)
    schedule = build_schedule(found, block_sizes=blocks)
    figure = Figure(figsize=(6.4, 6.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    _draw_tiles(axes, found, schedule)
    axes.set_title(title or _counts(schedule, found), color=INK, fontsize=10, loc="left")
    return figure


def tile_kinds(schedule: SegmentSchedule) -> npt.NDArray[np.int8]:
    """What the kernel does with each tile of `block_q` queries and `block_kv` keys.

    Args:
      schedule: of a layout without pages.

    Returns:
      i8[num_q_tiles, num_kv_blocks] of SKIPPED, WINDOW (the tokens just before each row, which the
      kernel always reads), MASKED and FULL (seen whole by every row, no mask arithmetic).
    """
    from packscore_kernels.attention.uses import HERE, LOAD_FIELDS, USE_FIELDS, Load, Use

    blocks = schedule.block_sizes
    num_blocks = -(-schedule.num_tokens // blocks.block_kv)
    kinds = np.full((schedule.num_q_tiles, num_blocks), SKIPPED, np.int8)
    for top, left, width, height in window_boxes(schedule):
        keys = slice(int(left) // blocks.block_kv, -(-int(left + width) // blocks.block_kv))
        kinds[int(top) // blocks.block_q : -(-int(top + height) // blocks.block_q), keys] = WINDOW
    loads = [Load(*row) for row in schedule.loads.reshape(-1, LOAD_FIELDS).tolist()]
    uses = [Use(*row) for row in schedule.uses.reshape(-1, USE_FIELDS).tolist()]
    for tile, (first, last) in enumerate(
        zip(schedule.use_starts, schedule.use_starts[1:], strict=False)
    ):
        for use in uses[first:last]:
            begin = use.base if use.kind == HERE else loads[use.load].start
            start = begin // blocks.block_kv
            kinds[tile, start + use.first_block : start + use.last_block] = MASKED
            whole = min(use.last_full + use.closes, use.last_key // blocks.block_kv)
            kinds[tile, start + use.first_full : start + max(whole, use.last_full)] = FULL
    return kinds


def window_boxes(schedule: SegmentSchedule) -> Boxes:
    """(top, left, width, height) of the scores that each group of rows computes near its diagonal.

    A group of 128 rows reads its own keys and those before it: 128, or 32 where no item of the
    tile reaches further back.
    """
    from packscore_kernels.attention.uses import NARROW
    from packscore_kernels.hardware import LANES

    boxes: Boxes = []
    for top in range(0, int(schedule.counts[0]), LANES):
        narrow = schedule.narrow[top // schedule.block_sizes.block_q]
        left = max(0, top - (NARROW if narrow else LANES))
        end = min(top + LANES, schedule.num_tokens)
        boxes.append((top, left, end - left, end - top))
    return boxes


def _as_layout(layout_or_lens: Any) -> SegmentLayout:
    found = layout_or_lens
    if not isinstance(found, SegmentLayout):
        try:
            lens = np.array([found[0], *found[1]])
        except (TypeError, IndexError, ValueError):
            lens = np.array([-1])
        if lens.dtype.kind != "i" or lens.min() < 0 or len(found) != 2:
            raise InputError(
                f"layout_or_lens={short(found)} must be a SegmentLayout or (prefix_len, item_lens)"
            )
        found = SegmentLayout.single(int(lens[0]), lens[1:])
    if any(group.cached_len for group in found.groups):
        raise InputError("layout has tokens in pages, which are no packed tokens; draw one without")
    return found


def _colours(found: SegmentLayout) -> list[str]:
    """The colour of every token."""
    colours = []
    shift = 0  # of the items' colours, so that neighbours of two groups differ
    for group, segment in zip(found.group_ids.tolist(), found.segment_ids.tolist(), strict=True):
        if segment == PAD_SEGMENT:
            colours.append(PADDING_COLOUR)
        elif segment == PREFIX_SEGMENT:
            shift = group
            colours.append(PREFIX_COLOUR)
        else:
            colours.append(ITEM_COLOURS[(segment - 1 + shift) % len(ITEM_COLOURS)])
    return colours


def _draw_tokens(axes: Axes, found: SegmentLayout) -> None:
    """Above the mask, a row of tokens with their positions and the segments' names."""
    for i, (colour, position) in enumerate(
        zip(_colours(found), found.position_ids.tolist(), strict=True)
    ):
        axes.add_patch(Rectangle((i, -2), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8))
        if colour != PADDING_COLOUR:
            ink = "white" if colour in WHITE_INK else CELL_INK
            axes.text(i + 0.5, -1.5, str(position), color=ink, fontsize=7, ha="center", va="center")
    for name, start, end, colour in _runs(found):
        axes.plot([start + 0.15, end - 0.15], [-2.4, -2.4], color=colour, linewidth=1.6)
        middle = (start + end) / 2
        axes.text(middle, -2.6, name, color=INK, fontsize=8, ha="center", va="bottom")
    axes.text(-0.4, -1.5, "position", color=QUIET, fontsize=8, ha="right", va="center")


def _runs(found: SegmentLayout) -> list[tuple[str, int, int, str]]:
    """(name, start, end, colour) of every segment that has tokens."""
    ids = np.stack([found.group_ids, found.segment_ids], axis=1)
    starts = np.flatnonzero(np.r_[True, (ids[1:] != ids[:-1]).any(axis=1)]).tolist()
    colours = _colours(found)
    runs = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        segment = int(found.segment_ids[start])
        name = {PREFIX_SEGMENT: "query", PAD_SEGMENT: "padding"}.get(segment, f"item {segment}")
        if end - start < 3:
            name = name.removeprefix("item ").replace("padding", "").replace("query", "q")
        runs.append((name, start, end, colours[start]))
    return runs


def _visible(found: SegmentLayout) -> npt.NDArray[np.bool_]:
    """bool[num_tokens, num_tokens]: the rule of who sees whom, token by token."""
    segment, group = found.segment_ids, found.group_ids
    same = segment[None, :] == segment[:, None]
    shared = (same | (segment[None, :] == PREFIX_SEGMENT)) & (group[None, :] == group[:, None])
    visible: npt.NDArray[np.bool_] = np.tril(shared) & (segment[:, None] != PAD_SEGMENT)
    return visible


def _draw_mask(axes: Axes, found: SegmentLayout) -> None:
    """Who sees whom: a row for each token that attends, a column for each it may attend to."""
    count, colours = found.num_tokens, _colours(found)
    axes.add_patch(Rectangle((0, 0), count, count, facecolor=HIDDEN_COLOUR))
    rows, columns = np.nonzero(_visible(found))
    cells = [Rectangle((x, y), 1, 1) for y, x in zip(rows.tolist(), columns.tolist(), strict=True)]
    axes.add_collection(
        PatchCollection(
            cells, facecolors=[colours[x] for x in columns], edgecolors="white", linewidths=0.5
        )
    )
    axes.set_xlabel("attended token, in storage order", color=QUIET, fontsize=9)
    axes.text(
        *(-0.5, count / 2, "attending token"),
        color=QUIET,
        fontsize=9,
        rotation=90,
        ha="right",
        va="center",
    )


def _draw_tiles(axes: Axes, found: SegmentLayout, schedule: SegmentSchedule) -> None:
    blocks, count = schedule.block_sizes, found.num_tokens
    kinds = tile_kinds(schedule)
    axes.add_patch(Rectangle((0, 0), count, count, facecolor=HIDDEN_COLOUR))
    for kind, colour in ((MASKED, MASKED_COLOUR), (FULL, FULL_COLOUR)):
        boxes = [
            Rectangle(
                (column * blocks.block_kv, row * blocks.block_q), blocks.block_kv, blocks.block_q
            )
            for row, column in np.argwhere(kinds == kind).tolist()
        ]
        axes.add_collection(
            PatchCollection(boxes, facecolors=colour, edgecolors="white", linewidths=0.6)
        )
    windows = [
        Rectangle((left, top), width, height) for top, left, width, height in window_boxes(schedule)
    ]
    axes.add_collection(PatchCollection(windows, facecolors=WINDOW_COLOUR, edgecolors="none"))
    axes.set(xlim=(0, count), ylim=(count, 0), aspect="equal")
    axes.set_xlabel("attended token, in storage order", color=QUIET, fontsize=9)
    axes.set_ylabel("attending token", color=QUIET, fontsize=9)
    _plain(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(
        handles=[
            Patch(facecolor=FULL_COLOUR, label="full: no mask arithmetic"),
            Patch(facecolor=MASKED_COLOUR, label="masked"),
            Patch(facecolor=WINDOW_COLOUR, label="window: keys just before each row"),
            Patch(facecolor=HIDDEN_COLOUR, edgecolor=QUIET, linewidth=0.4, label="skipped"),
        ],
        loc="upper right",
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )


def _counts(schedule: SegmentSchedule, found: SegmentLayout) -> str:
    kinds = tile_kinds(schedule)
    count = [int((kinds == kind).sum()) for kind in (FULL, MASKED, WINDOW, SKIPPED)]
    blocks = schedule.block_sizes
    return (
        f"{found.num_real_tokens:,} tokens in tiles of {blocks.block_q} x {blocks.block_kv}: "
        f"{count[0]} full, {count[1]} masked,\n{count[2]} with a window alone, "
        f"{count[3]} of {kinds.size} skipped"
    )


def _plain(axes: Axes) -> None:
    axes.tick_params(colors=QUIET, labelsize=8, length=2)
    for side in axes.spines.values():
        side.set_visible(False)
