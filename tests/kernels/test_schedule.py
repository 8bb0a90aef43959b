"""The work list: least number of blocks, static shapes, refusals, and speed."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from layouts import MAX_GROUPS, MAX_PAGES, NUM_PAGES, drawn, edges
from oracle import attention, rows

from packscore_kernels import (
    ArgumentError,
    BlockSizes,
    Group,
    LayoutError,
    SegmentLayout,
    UnsupportedError,
    build_schedule,
    resolve_block_sizes,
    segment_paged_attention,
)
from packscore_kernels.attention.launch import segment_attention_pallas
from packscore_kernels.attention.schedule import visited_blocks
from packscore_kernels.attention.tuning import VMEM_SHARE, tuned_rows, vmem_bytes
from packscore_kernels.hardware import CHIPS, LANES, align_to
from tolerances import assert_close

BLOCKS = BlockSizes(256, 128, 256)


def least_blocks(layout: SegmentLayout, blocks: BlockSizes) -> list[int]:
    """Per q tile the blocks that hold a key which some row sees and its window does not."""
    need: list[set[tuple]] = [set() for _ in range(-(-layout.num_tokens // blocks.block_q))]
    for row, group, keys in rows(layout):
        tile, window = row // blocks.block_q, row // 128 * 128 - 128
        in_prefix = group.prefix_len and row < keys[0] + group.prefix_len
        if in_prefix:  # a prefix row's window begins in its own tile
            window = max(window, tile * blocks.block_q)
        key = ("pages", id(group))
        need[tile] |= {(*key, b) for b in range(-(-group.cached_len // blocks.block_kv))}
        prefix = keys[: group.prefix_len]
        far = [k for k in (keys if in_prefix else prefix) if not in_prefix or k < window]
        need[tile] |= {("prefix", id(group), k // blocks.block_kv) for k in far}
        if not in_prefix:
            own = [k for k in keys[len(prefix) :] if k < window]
            need[tile] |= {("own", k // blocks.block_kv) for k in own}
    return [len(blocks) for blocks in need]


def all_layouts() -> list[SegmentLayout]:
    return [layout for _, layout in edges(16)] + [drawn(seed, 16) for seed in range(60)]


def test_visited_blocks_are_the_fewest_possible() -> None:
    for layout in all_layouts():
        schedule = build_schedule(layout, block_sizes=BLOCKS, page_size=16)
        seen, masked = visited_blocks(schedule)
        assert seen.tolist() == least_blocks(layout, BLOCKS)
        assert (masked <= seen).all()


def test_the_kernel_visits_what_the_schedule_says() -> None:
    run = jax.jit(
        lambda q, k, v, pages, schedule: segment_attention_pallas(
            q, k, v, pages, schedule, sm_scale=0.125,
            interpret=pltpu.InterpretParams(), count_visits=True,
        )[1]
    )  # fmt: skip
    q, k, v = (jnp.ones((2, 512, 64)) for _ in range(3))
    pages = jnp.ones((NUM_PAGES, 2, 2, 16, 64))
    for layout in all_layouts()[::8]:
        schedule = build_schedule(
            layout, block_sizes=BLOCKS, page_size=16, max_groups=MAX_GROUPS, max_pages=MAX_PAGES
        )
        visits = run(q, k, v, pages, schedule)
        for head in range(2):
            assert visits[head].tolist() == visited_blocks(schedule)[0].tolist()


def test_nothing_above_the_diagonal_and_nothing_between_prefix_and_item() -> None:
    blocks = BlockSizes(128, 128, 512)
    layout = SegmentLayout.single(128, [128 * 6, 128 * 2], 1408)
    seen, masked = visited_blocks(build_schedule(layout, block_sizes=blocks))
    # Tile by tile: the prefix (1 block), and own blocks beyond the window of two.
    assert seen.tolist() == [0, 1, 1, 2, 3, 4, 5, 1, 1, 0, 0]
    assert masked.tolist() == [0, 0, 0, 1, 2, 3, 4, 0, 0, 0, 0]


def test_whole_prefix_blocks_are_not_masked() -> None:
    blocks = BlockSizes(1024, 512, 2048, 3)
    layout = SegmentLayout.single(2000, [20] * 500, 12288)
    seen, masked = visited_blocks(build_schedule(layout, block_sizes=blocks))
    assert seen.tolist() == [2] + [4] * 11
    # The first two tiles hold prefix rows; of the last block all items' rows see the same keys.
    assert masked.tolist() == [2, 2] + [0] * 10


def test_shapes_depend_on_the_bucket_alone() -> None:
    shapes = set()
    for layout in all_layouts():
        schedule = build_schedule(
            layout, block_sizes=BLOCKS, page_size=16, max_groups=MAX_GROUPS, max_pages=MAX_PAGES
        )
        shapes.add(tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(schedule)))
    assert len(shapes) == 1


NONE = np.zeros(0, np.int32)


def two(first: np.ndarray, second: np.ndarray) -> SegmentLayout:
    return SegmentLayout((Group(0, NONE, 16, first), Group(0, NONE, 16, second)), 64)


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        (
            SegmentLayout.single(100, [30], 128),
            {},
            r"hold 130 tokens, more than layout.num_tokens=128",
        ),
        (SegmentLayout.single(5, [-1, 4]), {}, r"group 0 has a negative length"),
        (SegmentLayout.single(5, [4]), {"max_groups": 0}, r"1 groups, more than max_groups=0"),
        (
            SegmentLayout((Group(0, NONE, 20, np.array([1], np.int32)),), 64),
            {"page_size": 16},
            r"group 0 has 1 page_indices; .* must have 2",
        ),
        (
            SegmentLayout((Group(0, NONE, 5, np.array([9], np.int32)),), 64),
            {"page_size": 16, "num_pages": 8},
            r"lie in 9..9; they must lie in 0..7",
        ),
        (
            SegmentLayout((Group(0, NONE, 20, np.array([1, 1], np.int32)),), 64),
            {"page_size": 16},
            r"name one page twice",
        ),
        (
            SegmentLayout(
                (
                    Group(0, NONE, 20, np.array([1, 2], np.int32)),
                    Group(0, NONE, 20, np.array([2, 3], np.int32)),
                ),
                64,
            ),
            {"page_size": 16},
            r"page 2 is entry 1 of group 0 and entry 0 of group 1; groups may share the start",
        ),
        (
            SegmentLayout((Group(0, NONE, 5, np.array([0], np.int32)),), 64),
            {},
            r"so page_size must be given",
        ),
        (
            two(np.array([1], np.int32), np.array([2], np.int32)),
            {"page_size": 16, "max_pages": 1},
            r"names 2 pages, more than max_pages=1",
        ),
        (SegmentLayout.single(5, [4]), {"page_size": 48}, r"must be a multiple of page_size=48"),
    ],
)
def test_wrong_layouts_are_refused(
    layout: SegmentLayout, options: dict[str, int], message: str
) -> None:
    with pytest.raises(LayoutError, match=message):
        build_schedule(layout, block_sizes=BLOCKS, **options)


@pytest.mark.parametrize(("first", "second"), [([4], [4]), ([1, 2], [1, 3])], ids=str)
def test_two_groups_may_share_the_start_of_a_prefix(first: list[int], second: list[int]) -> None:
    groups = [
        Group(3, np.array([5, 2], np.int32), 16 * len(table) - 4, np.array(table, np.int32))
        for table in (first, second)
    ]
    layout = SegmentLayout(tuple(groups), 128)
    schedule = build_schedule(layout, block_sizes=BLOCKS, page_size=16)
    assert schedule.page_indices.tolist() == [*first, *second]
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 128, 64)), jnp.float32) for _ in range(3))
    pages = jnp.asarray(rng.standard_normal((5, 1, 2, 16, 64)), jnp.float32)
    got = segment_paged_attention(q, k, v, pages, schedule, sm_scale=0.125, implementation="xla")
    assert_close(got, attention(q, k, v, layout, 0.125, pages), "float32")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((100, 128, 128), "block_q=100 must be a multiple of 128"),
        ((128, 64, 128), "block_kv=64 must be a multiple of 128"),
        ((128, 256, 384), "chunk_kv=384 must be a multiple of"),
        ((128, 128, 128, 1), "num_slots=1 must be at least 2"),
    ],
)
def test_wrong_block_sizes_are_refused(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        BlockSizes(*sizes)


def call(**changes: Any) -> jax.Array:
    x = jnp.zeros((2, 128, 64))
    arguments = {"q": x, "k": x, "v": x, "kv_pages": None, "sm_scale": 1.0}
    arguments |= {"layout": SegmentLayout.single(5, [4], 128)} | changes
    order = [arguments.pop(name) for name in ("q", "k", "v", "kv_pages", "layout")]
    return segment_paged_attention(*order, **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"q": jnp.zeros((128, 64))},
            ArgumentError,
            r"must be \[num_heads, num_tokens, head_dim\]",
        ),
        ({"v": jnp.zeros((1, 128, 64))}, ArgumentError, r"k_shape=.* must equal v_shape="),
        ({"q": jnp.zeros((2, 128, 32))}, ArgumentError, r"must agree after the heads"),
        ({"q": jnp.zeros((3, 128, 64))}, ArgumentError, r"num_q_heads=3 must be a multiple of"),
        ({"layout": SegmentLayout.single(5, [], 64)}, ArgumentError, r"q has 128 tokens"),
        (
            {"q": jnp.zeros((2, 128, 64), jnp.bfloat16)},
            ArgumentError,
            r"must all be bfloat16 or all",
        ),
        ({"kv_pages": jnp.zeros((4, 1, 2, 16, 64))}, ArgumentError, r"kv_pages has shape"),
        (
            {"kv_pages": jnp.zeros((4, 2, 2, 16, 64), jnp.bfloat16)},
            ArgumentError,
            r"kv_pages has dtype bfloat16; it must have q's, float32",
        ),
        ({"implementation": "cuda"}, ArgumentError, r"implementation='cuda' must be one of"),
        (
            {"soft_cap": 30.0},
            UnsupportedError,
            r"soft_cap=30.0 is not supported by implementation=",
        ),
        (
            {"sliding_window": 7},
            UnsupportedError,
            r"sliding_window=7 is not supported by implementation=",
        ),
        (
            {
                "layout": build_schedule(SegmentLayout.single(5, [4], 128), block_sizes=BLOCKS),
                "block_sizes": BlockSizes(128, 128, 128),
            },
            ArgumentError,
            r"must be those of the schedule",
        ),
        (
            {
                "layout": build_schedule(SegmentLayout.single(5, [4], 128), block_sizes=BLOCKS),
                "implementation": "reference",
            },
            ArgumentError,
            r"must be given a SegmentLayout",
        ),
        (
            {
                "layout": build_schedule(
                    SegmentLayout.single(5, [4], 128), block_sizes=BLOCKS, page_size=16
                )
            },
            ArgumentError,
            r"so kv_pages must be given",
        ),
    ],
)
def test_wrong_arguments_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("page_size", [0, 16, 256])
def test_block_sizes_are_found_for_every_chip_and_fit_the_bucket(chip: str, page_size: int) -> None:
    heads = [(64, "float32"), (128, "bfloat16"), (256, "float32")]
    for num_tokens, group_size, (head_dim, dtype) in itertools.product(
        (128, 300, 640, 1024, 12288), range(1, 9), heads
    ):
        blocks = resolve_block_sizes(
            num_q_heads=2 * group_size,
            num_kv_heads=2,
            head_dim=head_dim,
            dtype=dtype,
            num_tokens=num_tokens,
            page_size=page_size,
            chip=chip,
        )
        case = f"{num_tokens=} {group_size=} {head_dim=} {dtype=} {blocks}"
        tokens = align_to(num_tokens, LANES)
        assert blocks.block_q <= tokens, case
        assert blocks.chunk_kv % blocks.block_kv == 0, case
        # A page may not lie across two blocks of keys.
        assert not page_size or blocks.block_kv % page_size == 0, case
        # The op pads what is no multiple of a block of keys, by a copy: only large pages force it.
        assert tokens % blocks.block_kv == 0 or blocks.block_kv == page_size, case
        used = vmem_bytes(group_size, head_dim, jnp.dtype(dtype).itemsize, blocks)
        assert used <= VMEM_SHARE * CHIPS[chip].vmem_bytes, case


def test_unknown_chips_and_page_sizes_are_refused() -> None:
    sizes = {
        "num_q_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 64,
        "dtype": "float32",
        "num_tokens": 128,
    }
    with pytest.raises(ArgumentError, match="chip='v1' must be one of"):
        resolve_block_sizes(**sizes, chip="v1")
    with pytest.raises(ArgumentError, match="page_size=100 must divide 512"):
        resolve_block_sizes(**sizes, chip="v6e", page_size=100)


def tuned() -> list[tuple[str, dict[str, Any]]]:
    return [(chip, row) for chip in CHIPS for row in tuned_rows(chip)]


def test_every_tuned_row_is_legal_and_reached() -> None:
    assert tuned()
    for chip, row in tuned():
        found = resolve_block_sizes(
            num_q_heads=2 * row["group_size"],
            num_kv_heads=2,
            head_dim=row["head_dim"],
            dtype=row["dtype"],
            num_tokens=12288,
            page_size=128,
            chip=chip,
        )
        assert found == BlockSizes(**row["block_sizes"])
        itemsize = jnp.dtype(row["dtype"]).itemsize
        used = vmem_bytes(row["group_size"], row["head_dim"], itemsize, found)
        assert used <= VMEM_SHARE * CHIPS[chip].vmem_bytes
        assert row["chip"] == chip
        assert row["predicted_cycles"] > 0
        assert {"compiler", "date", "job"} <= set(row)


def test_a_tuned_row_that_does_not_fit_the_bucket_gives_way() -> None:
    key = {"head_dim": 128, "dtype": "bfloat16"}
    (row,) = (r for r in tuned_rows("v6e") if r["group_size"] == 2 and key.items() <= r.items())
    tuned = BlockSizes(**row["block_sizes"])

    def found(num_tokens: int) -> BlockSizes:
        return resolve_block_sizes(
            num_q_heads=2, num_kv_heads=1, **key, num_tokens=num_tokens, chip="v6e"
        )

    least = 4 * tuned.block_q
    assert found(least) == tuned
    # a bucket of few of its tiles, and one that its blocks of keys do not divide
    assert found(least - 512) == found(1024) == BlockSizes(1024, 512, 2048, 6)
    assert found(least + 128) == BlockSizes(1024, 128, 2048, 6)
    assert found(256) == BlockSizes(256, 256, 2048, 6)
