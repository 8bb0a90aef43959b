"""The reference, and the oracle of the other tests, against numbers worked out by hand."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import attention

from packscore_kernels import Group, SegmentLayout
from packscore_kernels.attention.reference import segment_attention_reference
from tolerances import assert_close

# With head_dim 1 and sm_scale = log 2 a row of query q weighs a key k by 2 ** (q k): by `weight` in
# the first q head, whose queries are 1, and all alike in its row 3 and in the second head: 0.
#
#          prefix  item 1  item 2  padding
# token    0   1    2   3    4       5
# key      0   1    2   0    3      NaN
# weight   1   2    4   1    8
# value    3   6   12   7   27      NaN
KEYS = [0, 1, 2, 0, 3, math.nan]
VALUES = [3, 6, 12, 7, 27, math.nan]
QUERIES = [[1, 1, 1, 0, 1, math.nan], [0, 0, 0, 0, 0, math.nan]]
WANT = [
    [
        3,  # 3
        5,  # (1*3 + 2*6) / 3 = 15 / 3
        9,  # (1*3 + 2*6 + 4*12) / 7 = 63 / 7
        7,  # (3 + 6 + 12 + 7) / 4 = 28 / 4
        21,  # (1*3 + 2*6 + 8*27) / 11 = 231 / 11: not item 1
        0,
    ],
    [
        3,  # 3
        4.5,  # (3 + 6) / 2
        7,  # (3 + 6 + 12) / 3
        7,  # (3 + 6 + 12 + 7) / 4
        12,  # (3 + 6 + 27) / 3
        0,
    ],
]
ITEMS = np.array([2, 1], np.int32)
SCALE = math.log(2)


def tokens(rows: list) -> jnp.ndarray:
    """Rows of numbers, one a head, as [num_heads, num_tokens, 1]."""
    return jnp.asarray(rows, jnp.float32)[:, :, None]


@pytest.mark.parametrize("cached", [0, 1, 2])
def test_a_prefix_and_two_items(cached: int) -> None:
    # The first `cached` tokens of the prefix lie at the beginning of page 1, all else is NaN there.
    pages = np.full((3, 1, 2, 4, 1), np.nan, np.float32)
    for kv, row in enumerate((KEYS, VALUES)):
        pages[1, 0, kv, :cached, 0] = row[:cached]
    table = np.array([1] if cached else [], np.int32)
    layout = SegmentLayout((Group(2 - cached, ITEMS, cached, table),), 6 - cached)

    q, k, v = (tokens(rows)[:, cached:] for rows in (QUERIES, [KEYS], [VALUES]))
    kv_pages = jnp.asarray(pages) if cached else None
    want = np.array(WANT, np.float64)[:, cached:, None]
    got = segment_attention_reference(q, k, v, layout, sm_scale=SCALE, kv_pages=kv_pages)
    assert_close(got, want, "float32")
    assert_close(attention(q, k, v, layout, SCALE, kv_pages), want, "float32")


def test_a_group_sees_its_own_prefix_alone() -> None:
    # The same group behind another one that has the same keys, and values that are 100 more.
    other = [value + 100 for value in VALUES[:5]]
    q = tokens([row[:5] + row for row in QUERIES])
    k, v = tokens([KEYS[:5] + KEYS]), tokens([other + VALUES])
    layout = SegmentLayout((Group(2, ITEMS), Group(2, ITEMS)), 11)
    want = np.array([[x + 100 for x in row[:5]] + row for row in WANT], np.float64)[:, :, None]
    got = segment_attention_reference(q, k, v, layout, sm_scale=SCALE)
    assert_close(got, want, "float32")
    assert_close(attention(q, k, v, layout, SCALE), want, "float32")
