"""Keys and values of packed prefix tokens into their pages, in place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.attention.layout import Int32Array, SegmentLayout
from packscore_kernels.errors import ArgumentError, LayoutError
from packscore_kernels.hardware import align_to, cdiv, shape_of

PageImplementation = Literal["pallas", "pallas_interpret", "xla"]
ALIGNMENT = 16  # tokens at which a copy of packed bfloat16 keys may begin
FIELDS = 5  # page it was before, page, token of its first slot, first and last slot written


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["writes", "count"], meta_fields=["page_size"]
)
@dataclass(frozen=True, eq=False)
class PageWrites:
    """Which slots of which pages take which packed tokens; a pytree of data."""

    # page it was before, page, token of its first slot, first and last slot written
    writes: Any  # i32[max_writes * FIELDS]
    count: Any  # i32[1]: how many writes there are
    page_size: int

    def moved(self, first_page: Any) -> PageWrites:
        """The same writes to a pool that begins at another page, as a layer's does."""
        offset = first_page * np.array([1, 1, 0, 0, 0], np.int32)
        return replace(self, writes=self.writes + jnp.tile(offset, self.writes.shape[0] // FIELDS))


def build_page_writes(
    layout: SegmentLayout,
    page_tables: Sequence[Int32Array],
    *,
    page_size: int,
    num_pages: int,
    max_writes: int | None = None,
    copied_pages: Sequence[int | None] = (),
) -> PageWrites:
    """Where the packed prefix tokens of each group go, behind its cached ones.

    Args:
      layout: the packed tokens' groups.
      page_tables: per group the pages of its whole prefix, cached tokens first; i32[num_pages of
        the group]. An empty table leaves the group's prefix out.
      page_size: tokens a page.
      num_pages: pages in the pool.
      max_writes: static bound on the pages written (default: this layout's).
      copied_pages: per group the page whose cached slots the first written page takes over, None
        where that page holds them itself (default: for all groups).

    Returns:
      A `PageWrites` of numpy arrays.

    Raises:
      LayoutError: a table too short or out of range, a page written twice, or copied and written.
    """
    writes: list[tuple[int, int, int, int, int]] = []
    owners: dict[int, int] = {}
    if len(page_tables) != len(layout.groups):
        raise LayoutError(f"{len(page_tables)=} must be the number of groups, {len(layout.groups)}")
    for g, (group, table) in enumerate(zip(layout.groups, page_tables, strict=True)):
        if not len(table):
            continue
        end = group.cached_len + group.prefix_len
        if len(table) < cdiv(end, page_size):
            raise LayoutError(
                f"page table {g} has {len(table)} pages; {end} prefix tokens must have"
                f" {cdiv(end, page_size)}"
            )
        for index in range(group.cached_len // page_size, cdiv(end, page_size)):
            page, first = int(table[index]), index * page_size
            low, high = max(group.cached_len - first, 0), min(end - first, page_size)
            if not 0 <= page < num_pages:
                raise LayoutError(
                    f"page table {g} names page {page}; it must lie below {num_pages}"
                )
            if page in owners:
                raise LayoutError(f"page {page} is written by groups {owners[page]} and {g}")
            owners[page] = g
            if high > low:
                token = int(layout.group_starts[g]) + first - group.cached_len
                copied = copied_pages[g] if copied_pages and low else None
                writes.append((page if copied is None else copied, page, token, low, high))
    # pages are written side by side: what is copied must have been there before
    new = {page for _, page, _, low, _ in writes if low == 0}
    for source, page, *_ in writes:
        if source != page and source in new:
            raise LayoutError(f"page {source} is copied, and written by group {owners[source]}")
    max_writes = max(len(writes), 1) if max_writes is None else max_writes
    if len(writes) > max_writes:
        raise LayoutError(f"{len(writes)} pages are written, more than {max_writes=}")
    padded = np.zeros((max_writes, FIELDS), np.int32)
    if writes:
        padded[: len(writes)] = writes
    return PageWrites(padded.reshape(-1), np.array([len(writes)], np.int32), page_size)


def takes_whole(token: Any, low: Any, high: Any, page_size: int) -> Any:
    """Whether a page takes a token in every slot, from where a copy may begin: no need to merge."""
    return (token & (ALIGNMENT - 1) == 0) & (low == 0) & (high == page_size)


class WriteRuns(NamedTuple):
    """What one launch of the kernel writes, and the tokens that it moves to and from memory."""

    whole: int  # pages that are copied together
    merged: int  # pages that are merged with what they held, one after the other
    moved_tokens: int  # of keys and values


def write_runs(plan: PageWrites) -> WriteRuns:
    """How often the kernel takes each way for a plan of numpy arrays."""
    count = int(plan.count[0])
    _, _, token, low, high = np.reshape(plan.writes, (-1, FIELDS))[:count].T
    whole = int(takes_whole(token, low, high, plan.page_size).sum())
    merged = count - whole
    # to merge: a window of new tokens and the page as it was, and the page again on its way back
    moved = whole * 2 * plan.page_size + merged * (3 * plan.page_size + ALIGNMENT)
    return WriteRuns(whole, merged, moved)


def _write_xla(
    kv_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    plan: PageWrites,
) -> jax.Array:
    source, page, token, low, high = jnp.reshape(plan.writes, (-1, FIELDS)).T[:, :, None]
    slot = jnp.arange(plan.page_size)
    used = (slot >= low) & (slot < high)
    tokens = jnp.clip(token + slot, 0, k.shape[1] - 1)
    new = jnp.stack([k[:, tokens], v[:, tokens]]).transpose(2, 1, 0, 3, 4)
    whole = jnp.where(used[:, None, None, :, None], new, kv_pages[source[:, 0]])
    # Out of range is dropped.
    target = jnp.where(jnp.arange(page.shape[0]) < plan.count, page[:, 0], kv_pages.shape[0])
    return kv_pages.at[target].set(whole, mode="drop")


def _kernel(
    # prefetch
    writes: Any,  # i32[max_writes * FIELDS]
    count: Any,  # i32[1]
    # inputs
    k: Any,  # [num_kv_heads, num_tokens, head_dim]
    v: Any,  # [num_kv_heads, num_tokens, head_dim]
    aliased: Any,  # the pool again: aliased with the output
    # outputs
    kv_pages: Any,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    # scratch
    tokens: Any,  # [2, num_kv_heads, page_size + ALIGNMENT, head_dim]
    page: Any,  # [num_kv_heads, 2, page_size, head_dim]
    sems: Any,  # DMA[2]: of whole pages, which fly together, and of the others
) -> None:
    del aliased
    num_heads, _, page_size, _ = page.shape
    window = tokens.shape[2]

    def fields(i: Any) -> tuple[Any, ...]:
        return tuple(writes[i * FIELDS + field] for field in range(FIELDS))

    def whole_copies(i: Any) -> list[Any]:
        """Of a page all of whose slots take tokens, from where a copy may begin: nothing else."""
        _, number, token, _, _ = fields(i)
        here = pl.ds(pl.multiple_of(token, ALIGNMENT), page_size)
        return [
            pltpu.make_async_copy(source.at[:, here], kv_pages.at[number, :, kv], sems.at[0])
            for kv, source in enumerate((k, v))
        ]

    def is_whole(i: Any) -> Any:
        _, _, token, low, high = fields(i)
        return takes_whole(token, low, high, page_size)

    def merge(i: Any) -> None:
        """A page some of whose slots stay as they were, or whose tokens must be shifted."""
        source_page, number, token, low, high = fields(i)
        start = jnp.clip(token, 0, k.shape[1] - window) // ALIGNMENT * ALIGNMENT
        start = pl.multiple_of(start, ALIGNMENT)
        copies: list[Any] = [
            pltpu.make_async_copy(source.at[:, pl.ds(start, window)], tokens.at[kv], sems.at[1])
            for kv, source in enumerate((k, v))
        ]
        copies.append(pltpu.make_async_copy(kv_pages.at[source_page], page, sems.at[1]))
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()
        # Slot r takes token + r; the window begins at `start`.
        turn = lax.rem(start - token + 2 * window, window)
        slot = lax.broadcasted_iota(jnp.int32, (page_size, 1), 0)
        used = (slot >= low) & (slot < high)
        for head in range(num_heads):
            for kv in range(2):
                new = pltpu.roll(tokens[kv, head].astype(jnp.float32), turn, 0)[:page_size]
                old = page[head, kv].astype(jnp.float32)
                page[head, kv] = jnp.where(used, new, old).astype(page.dtype)
        back: Any = pltpu.make_async_copy(page, kv_pages.at[number], sems.at[1])
        back.start()
        back.wait()

    @pl.loop(0, count[0])
    def write(i: Any) -> None:
        whole = is_whole(i)

        @pl.when(whole)
        def begin() -> None:
            for copy in whole_copies(i):
                copy.start()

        pl.when(~whole)(lambda: merge(i))

    @pl.loop(0, count[0])
    def finish(i: Any) -> None:
        @pl.when(is_whole(i))
        def wait() -> None:
            for copy in whole_copies(i):
                copy.wait()


@jax.named_scope("write_kv_pages")  # by which a profile knows it
def write_kv_pages(
    kv_pages: jax.Array,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    plan: PageWrites,
    *,
    implementation: PageImplementation | None = None,
) -> jax.Array:
    """The pool with the packed prefix tokens in it; donate `kv_pages` to have it changed in place.

    Args:
      kv_pages: pool of pages with keys (0) and values (1).
      k: keys of the packed tokens, in the pool's dtype.
      v: values of the packed tokens, in the pool's dtype.
      plan: from `build_page_writes`.
      implementation: "pallas" (TPU), "pallas_interpret" or "xla". Default: by device.

    Returns:
      [num_pages, num_kv_heads, 2, page_size, head_dim]: all other slots as they were.

    Raises:
      ArgumentError: shapes or dtypes that do not fit each other.
    """
    if implementation is None:
        implementation = "pallas" if jax.default_backend() == "tpu" else "xla"
    if implementation not in get_args(PageImplementation):
        raise ArgumentError(f"{implementation=} must be one of {get_args(PageImplementation)}")
    num_heads, num_tokens, head_dim = k.shape
    want = (num_heads, 2, plan.page_size, head_dim)
    if kv_pages.shape[1:] != want or k.shape != v.shape:
        raise ArgumentError(
            f"{kv_pages.shape=} must end in {want}, and {v.shape=} equal {k.shape=}"
        )
    if len({str(x.dtype) for x in (kv_pages, k, v)}) != 1:
        raise ArgumentError(f"{kv_pages.dtype=}, {k.dtype=} and {v.dtype=} must be equal")
    plan = jax.tree.map(jnp.asarray, plan)
    if implementation == "xla":
        return _write_xla(kv_pages, k, v, plan)
    window = plan.page_size + ALIGNMENT
    short = max(align_to(num_tokens, ALIGNMENT), window) - num_tokens
    if short:
        k, v = (jnp.pad(x, ((0, 0), (0, short), (0, 0))) for x in (k, v))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    out: jax.Array = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(1,),
            in_specs=[hbm, hbm, hbm],
            out_specs=hbm,
            scratch_shapes=[
                pltpu.VMEM((2, num_heads, window, head_dim), k.dtype),
                pltpu.VMEM((num_heads, 2, plan.page_size, head_dim), k.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=shape_of(kv_pages.shape, kv_pages.dtype),
        input_output_aliases={4: 0},
        interpret=pltpu.InterpretParams() if implementation == "pallas_interpret" else False,
        name="write_kv_pages",
    )(plan.writes, plan.count, k, v, kv_pages)
    return out
