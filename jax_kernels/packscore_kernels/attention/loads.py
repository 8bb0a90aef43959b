"""Chunks of keys and values on their way from HBM into a ring of slots in VMEM.

Which chunk is loaded when is the host's work (`schedule._Ring`): load i goes to slot i modulo the
number of slots and is started when load i - 1 is first used, so that it flies meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.attention.pieces import sublanes, tame
from packscore_kernels.attention.refs import ONES, Refs
from packscore_kernels.attention.uses import LOAD_FIELDS, Load, Use
from packscore_kernels.hardware import LANES


def slot_of(refs: Refs, ordinal: jax.Array) -> jax.Array:
    """The slot of the ring that a load goes to."""
    return lax.rem(ordinal, refs.blocks.num_slots)


def take(refs: Refs, use: Use) -> None:
    """The load of a use, and the next one on its way."""
    finish_load(refs, use.load, slot_of(refs, use.load))

    @pl.when(use.load + 1 < refs.counts[1])
    def send() -> None:
        start_load(refs, use.load + 1, slot_of(refs, use.load + 1))


def start_load(refs: Refs, ordinal: jax.Array, slot: jax.Array) -> None:
    """Send a chunk on its way."""
    _each_copy(refs, ordinal, slot, lambda copy: copy.start())


def finish_load(refs: Refs, ordinal: jax.Array, slot: jax.Array) -> None:
    """Wait for a chunk and put it into the form the matrix unit takes."""
    _each_copy(refs, ordinal, slot, lambda copy: copy.wait())
    block = refs.blocks.block_kv
    live = refs.loads[ordinal * LOAD_FIELDS + Load._fields.index("live")]

    def prepare(b: jax.Array, _: None) -> None:
        keys = pl.ds(pl.multiple_of(b * block, LANES), block)
        k, v = tame(refs.kv_slots[slot, 0, keys], refs.kv_slots[slot, 1, keys], refs.shape.scale)
        put(refs, slot, keys, k, v, live - b * block, k[:1])

    num_blocks = refs.loads[ordinal * LOAD_FIELDS + Load._fields.index("num_blocks")]
    lax.fori_loop(0, num_blocks, prepare, None)


def put(
    refs: Refs,
    slot: jax.Array | int,
    at: Any,
    k: jax.Array,
    v: jax.Array,
    live: jax.Array,
    spare: jax.Array,
) -> None:
    """Tame keys and values into a slot, v transposed.

    Where sums come from the matrix unit, keys from the `live`-th on become the spare one, which is
    live, with a value of 0 and a weight of 0 in the row of ones: they add nothing, and what they
    weigh is finite where the spare's weight is.
    """
    d = refs.shape.head_dim
    if refs.shape.ones:
        alive = sublanes(*k.shape) < live
        k = jnp.where(alive, k.astype(jnp.float32), spare.astype(jnp.float32)).astype(k.dtype)
        v = jnp.where(alive, v.astype(jnp.float32), 0.0).astype(v.dtype)
        keys = lax.broadcasted_iota(jnp.int32, (ONES, k.shape[0]), 1)
        one = (sublanes(*keys.shape) == 0) & (keys < live)
        refs.vt_slots[slot, d:, at] = jnp.where(one, 1.0, 0.0).astype(k.dtype)
    refs.kv_slots[slot, 0, at] = k
    refs.vt_slots[slot, :d, at] = v.T


def _each_copy(refs: Refs, ordinal: jax.Array, slot: jax.Array, act: Callable[[Any], None]) -> None:
    """Start, or wait for, the copies of one load: blocks of packed tokens, or pages."""
    at = ordinal * LOAD_FIELDS
    load = Load(*(refs.loads[at + i] for i in range(LOAD_FIELDS)))
    block, page = refs.blocks.block_kv, refs.shape.page_size

    def copy_block(b: jax.Array, _: None) -> None:
        rows = pl.ds(pl.multiple_of(load.start + b * block, block), block)
        keys = pl.ds(pl.multiple_of(b * block, block), block)
        for kv, source in enumerate((refs.k_hbm, refs.v_hbm)):
            target = refs.kv_slots.at[slot, kv, keys]
            act(pltpu.make_async_copy(source.at[refs.head, rows], target, refs.sems.at[slot]))

    def copy_page(p: jax.Array, _: None) -> None:
        keys = pl.ds(pl.multiple_of(p * page, page), page)
        source = refs.kv_pages.at[refs.pages[load.start + p], refs.head]
        target = refs.kv_slots.at[slot, :, keys]
        act(pltpu.make_async_copy(source, target, refs.sems.at[slot]))

    @pl.when(load.paged == 0)
    def from_packed() -> None:
        lax.fori_loop(0, load.num_blocks, copy_block, None)

    if page:

        @pl.when(load.paged == 1)
        def from_pages() -> None:
            lax.fori_loop(0, load.num_pages, copy_page, None)
