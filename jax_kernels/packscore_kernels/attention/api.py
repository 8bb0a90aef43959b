"""The op: segment attention over packed tokens and pages, by one of five implementations."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.attention.launch import segment_attention_pallas
from packscore_kernels.attention.layout import SegmentLayout
from packscore_kernels.attention.reference import segment_attention_reference
from packscore_kernels.attention.schedule import build_schedule
from packscore_kernels.attention.tuning import resolve_block_sizes
from packscore_kernels.attention.types import BlockSizes, SegmentSchedule
from packscore_kernels.attention.validation import check_arrays
from packscore_kernels.attention.xla import segment_attention_dense, segment_attention_xla
from packscore_kernels.errors import ArgumentError, UnsupportedError
from packscore_kernels.hardware import align_to

Implementation = Literal["pallas", "pallas_interpret", "xla", "dense", "reference"]
# Those that hold a mask, where soft-capping and windows have a place.
MASKED = ("dense", "reference")


def _schedule(
    layout: SegmentLayout | SegmentSchedule,
    block_sizes: BlockSizes | None,
    q: jax.Array,
    k: jax.Array,
    page_size: int,
) -> SegmentSchedule:
    if isinstance(layout, SegmentSchedule):
        if block_sizes is not None and block_sizes != layout.block_sizes:
            raise ArgumentError(
                f"{block_sizes=} must be those of the schedule, {layout.block_sizes}"
            )
        return layout
    if block_sizes is None:
        block_sizes = resolve_block_sizes(
            num_q_heads=q.shape[0],
            num_kv_heads=k.shape[0],
            head_dim=q.shape[2],
            dtype=q.dtype,
            num_tokens=layout.num_tokens,
            page_size=page_size,
        )
    return build_schedule(layout, block_sizes=block_sizes, page_size=page_size)


@jax.named_scope("segment_paged_attention")  # by which a profile knows it
def segment_paged_attention(
    q: jax.Array,  # [num_q_heads, num_tokens, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: jax.Array | None,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    layout: SegmentLayout | SegmentSchedule,
    *,
    sm_scale: float,
    block_sizes: BlockSizes | None = None,
    implementation: Implementation | None = None,
    soft_cap: float | None = None,
    sliding_window: int | jax.Array | None = None,
    live_tiles_only: bool = False,
) -> jax.Array:
    """Attention in which every item sees its group's prefix and itself, and nothing else.

    `visible = (kv_segment == q_segment) | (kv_segment == PREFIX_SEGMENT)` inside one group, and-ed
    with storage order `kv_index <= q_index`; the pages of a group come before its packed tokens.

    >>> import jax.numpy as jnp, numpy as np
    >>> from packscore_kernels import SegmentLayout, segment_paged_attention
    >>> layout = SegmentLayout.single(5, [2, 3], num_tokens=128)  # a query, two items, padding
    >>> x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 128, 64)), jnp.float32)
    >>> out = segment_paged_attention(x, x, x, None, layout, sm_scale=64**-0.5)
    >>> out.shape, bool((out[:, 10:] == 0).all())
    ((2, 128, 64), True)

    Args:
      q: queries of the packed tokens, bfloat16 or float32.
      k: keys of the packed tokens; `num_q_heads` is a multiple of `num_kv_heads`.
      v: values of the packed tokens.
      kv_pages: pool of pages with the keys (0) and values (1) of cached prefix tokens; None where
        no group has any.
      layout: who sees whom. A `SegmentLayout` is turned into constants of the program; a
        `SegmentSchedule` (see `build_schedule`) is data: no recompilation when it changes.
      sm_scale: factor on the scores before the softmax. With `math.log(2)` the kernel multiplies
        nothing: for q that comes scaled by the factor's share of it.
      block_sizes: tiles of the kernel; default: from the tuned table, else a heuristic. A schedule
        carries its own.
      implementation: "pallas" (TPU), "pallas_interpret" (the same kernel simulated on CPU), "xla"
        (composed, any device), "dense" (the mask in memory) or "reference" (needs a
        `SegmentLayout`; float32). Default: "pallas" on TPU, else "xla".
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; "dense" and "reference" only.
      sliding_window: how many tokens back a row sees in its own sequence, prefix and item, itself
        included; "dense" and "reference" only, where it may be data.
      live_tiles_only: the kernel ends with the last q tile that holds a token: padding rows of
        later tiles hold anything, and nobody may read them. Others always write all rows.

    Returns:
      [num_q_heads, num_tokens, head_dim] in the dtype of q; padding rows are zeros.

    Raises:
      ArgumentError: shapes, dtypes or options that do not fit each other.
      UnsupportedError: `soft_cap` or `sliding_window` is given to another implementation.
      LayoutError: a `SegmentLayout` contradicts itself.
    """
    if implementation is None:
        implementation = "pallas" if jax.default_backend() == "tpu" else "xla"
    if implementation not in get_args(Implementation):
        raise ArgumentError(f"{implementation=} must be one of {get_args(Implementation)}")
    options: dict[str, Any] = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    for name, value in options.items():
        if value is not None and implementation not in MASKED:
            raise UnsupportedError(
                f"{name}={value} is not supported by {implementation=}; it must be None, or the "
                f"implementation one of {MASKED}"
            )
    page_size = 0 if kv_pages is None else int(kv_pages.shape[3])
    check_arrays(
        q.shape,
        k.shape,
        v.shape,
        (str(q.dtype), str(k.dtype), str(v.dtype)),
        None if kv_pages is None else (kv_pages.shape, str(kv_pages.dtype)),
        layout.num_tokens,
        layout.page_size if isinstance(layout, SegmentSchedule) else page_size,
    )
    if implementation == "reference":
        if not isinstance(layout, SegmentLayout):
            raise ArgumentError('implementation="reference" must be given a SegmentLayout')
        out = segment_attention_reference(
            q, k, v, layout, sm_scale=sm_scale, kv_pages=kv_pages, **options
        )
        return out.astype(q.dtype)
    schedule = jax.tree.map(jnp.asarray, _schedule(layout, block_sizes, q, k, page_size))
    if implementation == "dense":
        return segment_attention_dense(q, k, v, kv_pages, schedule, sm_scale=sm_scale, **options)

    # The kernel copies whole blocks of packed keys: a bucket that is no multiple is padded here.
    tail = align_to(q.shape[1], schedule.block_sizes.block_kv) - q.shape[1]
    if tail:
        q, k, v = (jnp.pad(x, ((0, 0), (0, tail), (0, 0))) for x in (q, k, v))
    if implementation == "xla":
        out = segment_attention_xla(q, k, v, kv_pages, schedule, sm_scale=sm_scale)
    else:
        interpret: Any = pltpu.InterpretParams() if implementation == "pallas_interpret" else False
        out = segment_attention_pallas(
            *(q, k, v, kv_pages, schedule),
            sm_scale=sm_scale,
            live_tiles_only=live_tiles_only,
            interpret=interpret,
        )
    return out[:, : schedule.num_tokens]
