"""Attention of a few rows, by one of two implementations."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.attention.types import SegmentSchedule
from packscore_kernels.row_attention.blocks import Seen
from packscore_kernels.row_attention.kernel import attend_rows_pallas
from packscore_kernels.row_attention.xla import attend_rows_xla


@jax.named_scope("row_attention")  # by which a profile knows it
def segment_attention_rows(
    q: jax.Array,  # [num_q_heads, num_rows, head_dim]
    k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: jax.Array | None,  # [num_pages, num_kv_heads, 2, page_size, head_dim]
    schedule: SegmentSchedule,
    rows: jax.Array,  # i32[num_rows]
    *,
    sm_scale: float,
    implementation: Literal["pallas", "pallas_interpret", "xla"] = "pallas",
) -> jax.Array:
    """`segment_paged_attention` of some of the packed tokens, block by block of what they see.

    Args:
      q: queries of the rows.
      k: keys of all packed tokens; those of padding may be anything.
      v: values of all packed tokens; those of padding may be anything.
      kv_pages: keys (0) and values (1) of the cached prefix tokens.
      schedule: of all packed tokens, of which the tokens' and groups' numbers are read.
      rows: which tokens, in any order; rows near each other share blocks of keys.
      sm_scale: factor on the scores before the softmax.
      implementation: "pallas" (TPU), "pallas_interpret" or "xla".

    Returns:
      [num_q_heads, num_rows, head_dim] in the dtype of q; padding rows are zeros.
    """
    if (missing := schedule.page_size - k.shape[1]) > 0:
        k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0))) for x in (k, v))
    given = q, k, v, kv_pages, schedule, Seen.of(schedule, rows), sm_scale
    if implementation == "xla":
        return attend_rows_xla(*given)
    interpret: Any = pltpu.InterpretParams() if implementation == "pallas_interpret" else False
    return attend_rows_pallas(*given, interpret=interpret)
