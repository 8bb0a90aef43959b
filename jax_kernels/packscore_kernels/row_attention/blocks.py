"""Which keys rows see, and in which blocks these lie."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from packscore_kernels.attention.types import SegmentSchedule
from packscore_kernels.hardware import cdiv

BLOCK_KEYS = 512


class Seen(NamedTuple):
    """What rows see: three runs of keys, the first of each and how many, i32[num_rows] each.

    Packed keys go by their storage index, those in pages by entry of page_indices and slot.
    """

    own: jax.Array  # of its own segment, up to the row itself
    num_own: jax.Array  # 0 at padding
    prefix: jax.Array  # of its group's packed prefix, none of it behind the row
    num_prefix: jax.Array
    cached: jax.Array  # of its group's pages
    num_cached: jax.Array

    @classmethod
    def of(cls, schedule: SegmentSchedule, rows: jax.Array) -> Seen:
        """By rows of a schedule."""
        group_ids = jnp.asarray(schedule.group_ids)[rows]
        groups = jnp.asarray(schedule.groups)
        if not groups.shape[0]:
            groups = jnp.zeros((1, 4), jnp.int32)
        start, prefix_end, cached, first_page = groups[jnp.maximum(group_ids, 0)].T
        own = jnp.asarray(schedule.rows)[0, rows]
        ends = jnp.minimum(prefix_end, rows + 1)
        counts = rows + 1 - own, jnp.maximum(ends - start, 0), cached
        num_own, num_prefix, num_cached = (jnp.where(group_ids < 0, 0, x) for x in counts)
        slot = first_page * schedule.page_size
        return cls(own, num_own, start, num_prefix, slot, num_cached)


class Blocks(NamedTuple):
    """All blocks of keys there are: first those of pages, then those of packed tokens."""

    num_cached: int
    num_packed: int
    keys: int  # of a block
    pages: int  # of a block of them

    @classmethod
    def of(cls, schedule: SegmentSchedule, has_pages: bool, keys: int = BLOCK_KEYS) -> Blocks:
        """Of a schedule's tokens and pages, so many keys at a time or fewer."""
        num_tokens, size = schedule.num_tokens, schedule.page_size
        keys = min(keys, num_tokens)
        if not has_pages:
            return cls(0, cdiv(num_tokens, keys), keys, 0)
        pages = max(keys // size, 1)
        num_cached = cdiv(len(schedule.page_indices), pages)
        return cls(num_cached, cdiv(num_tokens, pages * size), pages * size, pages)

    def met(self, seen: Seen) -> jax.Array:
        """i32[num_cached + num_packed]: 0 where no row sees a key, 2 where every row sees all."""

        def meets(run: tuple[jax.Array, jax.Array], num_blocks: int) -> jax.Array:
            begin = jnp.arange(num_blocks) * self.keys
            first, end = (x[:, None] for x in (run[0], run[0] + run[1]))
            some = (first < begin + self.keys) & (end > begin) & (end > first)
            every = (first <= begin) & (end >= begin + self.keys)
            return jnp.where(every.all(axis=0), 2, some.any(axis=0).astype(jnp.int32))

        own = meets((seen.own, seen.num_own), self.num_packed)
        prefix = meets((seen.prefix, seen.num_prefix), self.num_packed)
        cached = meets((seen.cached, seen.num_cached), self.num_cached)
        return jnp.concatenate([cached, jnp.maximum(own, prefix)])


def listed(needed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """bool[n] to the places of what is True, in order, i32[n], and how many, i32[].

    Behind those there is n - 1 or more.
    """
    before = jnp.cumsum(needed.astype(jnp.int32))
    order = jnp.searchsorted(before, jnp.arange(len(needed)), side="right", method="compare_all")
    # a place that does not exist may be fetched, so the last one that does stands there
    return jnp.minimum(order, len(needed) - 1).astype(jnp.int32), before[-1]
