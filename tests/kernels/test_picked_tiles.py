"""The tiles that are picked for users run as the reference does: nobody sets them by hand."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from layouts import group
from oracle import attention
from picked_tiles import Case, params

from packscore_kernels import SegmentLayout, resolve_block_sizes, segment_paged_attention
from packscore_kernels.attention import launch
from tolerances import assert_close


# tiles of 640, 384 and 128 rows
@pytest.mark.parametrize("case", params((3, 128), (5, 80), (7, 80)))
def test_picked_tiles_run(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "deep_passes", lambda: case.chip in ("v6e", "tpu7x"))
    blocks = resolve_block_sizes(
        num_q_heads=case.group_size,
        num_kv_heads=1,
        head_dim=case.head_dim,
        dtype="float32",
        num_tokens=case.num_tokens,
        page_size=case.page_size,
        chip=case.chip,
    )
    cached = 3 * case.page_size // 2
    items = [20] * (case.num_tokens // 30) + [case.num_tokens // 20]
    prefix = group(case.num_tokens // 4, items, cached, case.page_size, [5, 2, 7, 0])
    layout = SegmentLayout((prefix,), case.num_tokens)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q, k, v = (draw(h, case.num_tokens, case.head_dim) for h in (case.group_size, 1, 1))
    pages = draw(8, 1, 2, case.page_size, case.head_dim) if case.page_size else None
    scale = case.head_dim**-0.5
    got = segment_paged_attention(
        q, k, v, pages, layout, sm_scale=scale, block_sizes=blocks,
        implementation="pallas_interpret",
    )  # fmt: skip
    assert_close(got, attention(q, k, v, layout, scale, pages), "float32")
