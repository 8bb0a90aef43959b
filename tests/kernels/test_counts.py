"""The counters beside the kernels say what the kernels run, piece by piece."""

from __future__ import annotations

import functools
import sys
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from executions import Executions
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from layouts import MAX_GROUPS, MAX_PAGES, NUM_PAGES, TOKENS, drawn, edges

from packscore_kernels import (
    BlockSizes,
    Group,
    SegmentLayout,
    build_page_writes,
    build_schedule,
    gated_mlp,
    project_qkv,
    write_kv_pages,
)
from packscore_kernels.attention.counts import PIECES, count_runs, moved_bytes, pieces_of
from packscore_kernels.attention.launch import segment_attention_pallas
from packscore_kernels.attention.schedule import visited_blocks
from packscore_kernels.layer import api, mlp, projections
from packscore_kernels.layer.counts import mlp_runs, qkv_runs
from packscore_kernels.layer.walks import QkvSteps, Walk
from packscore_kernels.page_writes import write_runs

PAGE_SIZE = 16


def modules_with(name: str) -> list[ModuleType]:
    """The attention's modules that have a function by this name."""
    home = "packscore_kernels.attention."
    return [m for path, m in sys.modules.items() if path.startswith(home) and hasattr(m, name)]


def layouts() -> list[SegmentLayout]:
    # two whole blocks and a part of a third, with items that the narrow window holds
    cached = np.arange(NUM_PAGES - MAX_PAGES, dtype=np.int32)
    again = Group(0, np.full(24, 20, np.int32), PAGE_SIZE * len(cached) - 1, cached)
    few = [layout for _, layout in edges(PAGE_SIZE)][::12]
    return [*few, *(drawn(seed, PAGE_SIZE) for seed in range(8)), SegmentLayout((again,), TOKENS)]


# The rows of a tile go through blocks under a mask in two parts, and in one; tiles of 384 rows have
# triangles.
@pytest.mark.parametrize("block_q", [256, 384])
def test_the_attention_runs_what_is_counted(block_q: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # every piece that multiplies matrices is one pipeline, in the order of the code
    ran = Executions(monkeypatch, "pipeline", *modules_with("pipeline"))
    copied = Executions(monkeypatch, "make_async_copy", pltpu)
    loaded = Executions(monkeypatch, "tame", *modules_with("tame"))
    run = jax.jit(
        functools.partial(
            segment_attention_pallas,
            sm_scale=0.125,
            interpret=pltpu.InterpretParams(),
            count_visits=True,
        )
    )
    x, pages = jnp.ones((1, TOKENS, 64)), jnp.ones((NUM_PAGES, 1, 2, PAGE_SIZE, 64))
    blocks = BlockSizes(block_q, 128, 128 * max(2, block_q // 128), 3)
    met = dict.fromkeys(pieces_of(blocks), 0)
    for layout in layouts():
        schedule = build_schedule(
            layout,
            block_sizes=blocks,
            page_size=PAGE_SIZE,
            max_groups=MAX_GROUPS,
            max_pages=MAX_PAGES,
        )
        runs, (_, visits) = count_runs(schedule), run(x, x, x, pages, schedule)
        *pieces, redone = ran.take()
        assert dict.fromkeys(PIECES, 0) | dict(zip(met, pieces, strict=True)) == runs.pieces, layout
        assert not redone
        # a copy is made twice: to start it, and to wait for it
        assert sum(copied.take()) == 2 * runs.copies
        # a triangle makes its lane groups ready, and the key that stands in for others
        made_ready = (block_q // 128 + 1) * runs.pieces["triangle"]
        assert sum(loaded.take()) == runs.loaded_blocks + made_ready
        assert int(visits.sum()) == visited_blocks(schedule)[0].sum()
        met = {name: met[name] + runs.pieces[name] for name in met}
    assert min(met.values()) > 0, met


def test_the_runs_of_a_small_layout() -> None:
    # three tiles: two of prefix rows, one of prefix rows and items; and one of padding
    schedule = build_schedule(
        SegmentLayout.single(300, [20, 30], 512), block_sizes=BlockSizes(128, 128, 256)
    )
    runs = count_runs(schedule)
    # the second tile reads block 0 whole and ends with it; the third finds it loaded and reads
    # blocks 0 and 1 with its window, and block 2, of which its prefix rows see a part, from another
    # chunk
    assert runs.pieces == {
        **dict.fromkeys(PIECES, 0),
        "narrow_window": 2,
        "last": 1,
        "first_turn": 1,
        "prefix_edge": 1,
    }
    assert (runs.tiles, runs.padding_tiles) == (3, 1)
    assert (runs.uses, runs.masked_parts) == (3, 1)
    assert (runs.loads, runs.loaded_blocks, runs.copies) == (2, 3, 2 * 3)
    # of 4 heads the queries and what they found; keys and values of four tiles with the 128 tokens
    # before each, and of three blocks
    moved = 2 * 4 * 512 + 2 * (512 + 4 * 128) + 2 * 3 * 128
    assert moved_bytes(schedule, runs, group_size=4, head_dim=64, itemsize=2) == moved * 64 * 2


def test_masked_parts_are_two_of_a_wide_tile() -> None:
    layout = SegmentLayout.single(300, [20, 30], 512)
    runs = count_runs(build_schedule(layout, block_sizes=BlockSizes(256, 128, 256)))
    # the second tile reads blocks 0 and 1 whole and goes through block 2, of which neither half of
    # its rows sees all; of the first half some rows are the prefix's
    assert (runs.uses, runs.masked_parts) == (2, 2)


# one tile, and three with a partial one; a step for each of q, k and v, and more for q, and for all
@pytest.mark.parametrize("num_tokens", [16, 600])
@pytest.mark.parametrize(
    ("num_q_heads", "num_kv_heads", "chunk"), [(2, 1, 2), (10, 2, 5), (6, 4, 2)]
)
def test_the_projections_run_what_is_counted(
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens, own = min(num_tokens, 256), QkvSteps.of(num_q_heads, num_kv_heads, chunk)
    monkeypatch.setattr(projections, "qkv_walk", lambda *_: Walk(tokens, chunk, True))
    multiplied = Executions(monkeypatch, "product", projections)
    normed = Executions(monkeypatch, "rms_norm", projections)
    stepped = Executions(monkeypatch, "program_id", pl)
    hidden = 128
    weights = tuple(jnp.ones((1, n * 128, hidden)) for n in (num_q_heads, *[num_kv_heads] * 2))
    rotary = (jnp.ones((num_tokens, 128)),) * 2
    project_qkv(
        jnp.ones((num_tokens, hidden)), jnp.ones(hidden), weights, (jnp.ones(128),) * 2, rotary, 0,
        eps=1e-6, implementation="pallas_interpret",
    )  # fmt: skip
    (steps,) = set(stepped.take())
    runs = qkv_runs(steps, own)
    assert runs.tiles == (1 if num_tokens == 16 else 3)
    # each piece has a product for each pair of its heads
    heads = [own.q_heads] * min(own.q, 2) + [own.kv_heads] * 2 * min(own.kv, 2)
    pieces = zip(runs.products, heads, strict=True)
    assert multiplied.take() == [n for n, of_piece in pieces for _ in range(-(-of_piece // 2))]
    # of a tile, and of every head of q and k
    assert sum(normed.take()) == runs.tiles * (1 + own.q_heads * own.q + own.kv_heads * own.kv)


# one tile, and two; one chunk, and three
@pytest.mark.parametrize("num_tokens", [16, 300])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_the_mlp_runs_what_is_counted(
    num_tokens: int, num_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, width = 128, 256
    monkeypatch.setattr(api, "mlp_walk", lambda *_: Walk(min(num_tokens, 256), width, True))
    multiplied = Executions(monkeypatch, "product", mlp)
    normed = Executions(monkeypatch, "rms_norm", mlp)
    stepped = Executions(monkeypatch, "program_id", pl)
    into, back = (1, num_chunks * width, hidden), (1, hidden, num_chunks * width)
    gated_mlp(
        jnp.ones((num_tokens, hidden)), jnp.ones(hidden),
        (jnp.ones(into), jnp.ones(into), jnp.ones(back)), 0,
        eps=1e-6, implementation="pallas_interpret",
    )  # fmt: skip
    (steps,) = stepped.take()
    runs = mlp_runs(steps, num_chunks)
    assert runs.first == (1 if num_tokens == 16 else 2)
    assert normed.take() == [runs.first]
    # gate, up and down of the first chunk, and of the others
    others = [runs.others] * 3 if num_chunks > 1 else []
    assert multiplied.take() == [runs.first] * 3 + others


def test_the_page_writer_runs_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    merging, copied = (Executions(monkeypatch, n, pltpu) for n in ("roll", "make_async_copy"))
    none = np.zeros(0, np.int32)
    layout = SegmentLayout((Group(40, none), Group(37, none, 20, np.array([9, 3], np.int32))), 96)
    tables = [np.array(table, np.int32) for table in ([2, 0, 11], [9, 3, 7, 1])]
    plan = build_page_writes(layout, tables, page_size=16, num_pages=12, max_writes=8)
    runs = write_runs(plan)
    # two whole pages and a half of one; a page that is half cached, a shifted one, a part of one
    assert runs == (2, 4, 2 * 2 * 16 + 4 * (3 * 16 + 16))
    pool, kv = jnp.zeros((12, 2, 2, 16, 64)), jnp.ones((2, 96, 64))
    write_kv_pages(pool, kv, kv, plan, implementation="pallas_interpret")
    # one for the keys and one for the values of each of two heads
    assert merging.take() == [runs.merged] * 4
    # keys and values of a whole page, to start and to wait for; those of a merged one, it and back
    assert copied.take() == [runs.whole] * 2 + [runs.merged] * 4 + [runs.whole] * 2
