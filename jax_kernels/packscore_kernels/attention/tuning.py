"""Which tiles: explicit, else the tuned table, else a heuristic, else an error."""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp

from packscore_kernels.attention.refs import ONES
from packscore_kernels.attention.types import BlockSizes
from packscore_kernels.errors import ArgumentError
from packscore_kernels.hardware import CHIPS, LANES, align_to, chip_of

ROWS = 2048  # of all q heads of a group in one tile: the matrix unit's columns stay filled
SCORED_KEYS = 512
CHUNK_KEYS = 2048
MAX_SLOTS = 6
VMEM_SHARE = 0.8  # of a core's memory for what we count; the rest is the compiler's


def vmem_bytes(group_size: int, head_dim: int, itemsize: int, blocks: BlockSizes) -> int:
    """An upper estimate of the kernel's VMEM: its buffers, and the scores in flight."""
    d = align_to(head_dim, LANES)
    rows = group_size * blocks.block_q
    slots = (blocks.num_slots + 1) * blocks.chunk_kv * (3 * d + ONES) * itemsize
    tiles = 2 * itemsize * d * (2 * rows + 2 * (blocks.block_q + LANES))
    state = 4 * rows * (d + 24)
    # Scores of some blocks run ahead of their softmax, whose exponentials are in flight too.
    flight = 4 * blocks.block_q * blocks.block_kv * 4 + 4 * rows * d
    return slots + tiles + state + flight


@functools.cache
def tuned_rows(chip: str) -> list[dict[str, Any]]:
    """The rows of a chip's table: head_dim, group_size, dtype, the block sizes and their cycles."""
    file = resources.files(__package__) / "tuned" / f"{chip}.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else []
    return rows


def _fits(blocks: BlockSizes, num_tokens: int, page_size: int) -> bool:
    tokens = align_to(num_tokens, LANES)
    pages = not page_size or blocks.block_kv % page_size == 0
    # The rows were tuned on 12 thousand tokens: of few tokens a large last tile wastes too much.
    return pages and 4 * blocks.block_q <= tokens and tokens % blocks.block_kv == 0


def _heuristic(
    group_size: int, head_dim: int, itemsize: int, num_tokens: int, page_size: int, vmem: int
) -> BlockSizes:
    tokens = align_to(max(num_tokens, 1), LANES)
    block_q = max(LANES, min(ROWS // group_size, ROWS // 2, tokens) // LANES * LANES)
    if page_size > SCORED_KEYS or SCORED_KEYS % max(page_size, 1):
        raise ArgumentError(f"{page_size=} must divide {SCORED_KEYS}")
    block_kv = SCORED_KEYS
    while block_kv > max(LANES, page_size) and (block_kv > tokens or tokens % block_kv):
        block_kv //= 2
    chunk_kv = max(CHUNK_KEYS // block_kv * block_kv, block_kv)
    slots = MAX_SLOTS
    while True:
        blocks = BlockSizes(block_q, block_kv, chunk_kv, slots)
        if vmem_bytes(group_size, head_dim, itemsize, blocks) <= vmem * VMEM_SHARE:
            return blocks
        if slots > 3:
            slots -= 1
        elif chunk_kv > 2 * block_kv:
            chunk_kv //= 2
        elif block_q > LANES and block_q * group_size > ROWS // 4:
            block_q = max(LANES, block_q // 2 // LANES * LANES)
        elif block_kv > max(LANES, page_size):
            block_kv //= 2
            chunk_kv = max(chunk_kv // block_kv, 1) * block_kv
        elif slots > 2:
            slots -= 1
        elif block_q > LANES:
            block_q = max(LANES, block_q // 2 // LANES * LANES)
        else:
            raise ArgumentError(f"{head_dim=} with {group_size=} does not fit {vmem} bytes of VMEM")


def resolve_block_sizes(
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: Any,
    num_tokens: int,
    page_size: int = 0,
    chip: str | None = None,
) -> BlockSizes:
    """Good tiles for a chip: the tuned table's where it has a row that fits, else a heuristic's.

    Args:
      num_q_heads: q heads of one layer on this chip.
      num_kv_heads: kv heads of one layer on this chip.
      head_dim: of one head.
      dtype: of q, k and v.
      num_tokens: the bucket.
      page_size: tokens a page; 0 without pages.
      chip: a name in `hardware.CHIPS`; default: the first device's, v6e where it is no TPU.

    Returns:
      The block sizes.

    Raises:
      ArgumentError: no tiles fit.
    """
    if chip is None:
        chip = chip_of(jax.devices()[0]) or "v6e"
    if chip not in CHIPS:
        raise ArgumentError(f"{chip=} must be one of {sorted(CHIPS)}")
    group_size = num_q_heads // num_kv_heads
    dtype = jnp.dtype(dtype)
    for row in tuned_rows(chip):
        key = (row["head_dim"], row["group_size"], row["dtype"])
        if key == (head_dim, group_size, dtype.name):
            blocks = BlockSizes(**row["block_sizes"])
            if _fits(blocks, num_tokens, page_size):
                return blocks
    return _heuristic(
        group_size, head_dim, dtype.itemsize, num_tokens, page_size, CHIPS[chip].vmem_bytes
    )
