"""Packing loses no token, keeps every item whole and says where it went."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from packscore.flows.packing import Share, pack, split_items
from packscore.flows.page_pool import PagePool


def arrays(lens: list[int]) -> list[np.ndarray]:
    return [np.arange(n) + 100 * (k + 1) for k, n in enumerate(lens)]


groups = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(0, 12), min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


@given(groups=groups, cached=st.booleans(), seed=st.integers(0, 3))
def test_every_item_is_somewhere_once_and_whole(
    groups: list[tuple[int, list[int]]], cached: bool, seed: int
) -> None:
    pool = PagePool(32, 16)
    rng = np.random.default_rng(seed)
    shares = []
    for number, (prefix_len, lens) in enumerate(groups):
        prefix = rng.integers(0, 10**6, prefix_len)
        lease = pool.acquire(prefix)
        assert lease is not None
        if cached:
            lease.commit()
        shares.append(Share(number, prefix, arrays(lens), np.arange(len(lens)), lease))
    batch = pack(shares)
    assert batch.layout.num_tokens == len(batch.token_ids) == sum(s.num_tokens for s in shares)
    bounds, rows = iter(batch.layout.item_bounds), iter(batch.layout.scored_rows)
    for share, start in zip(shares, batch.layout.group_starts, strict=False):
        own = len(share.prefix) - share.cached_len
        # an empty item is scored at its prefix's last token, which then is packed
        assert own == (
            len(share.prefix) if not cached else int(any(not len(i) for i in share.items))
        )
        assert np.array_equal(
            batch.token_ids[start : start + own], share.prefix[share.cached_len :]
        )
        for item in share.items:
            (first, end), row = next(bounds), next(rows)
            assert np.array_equal(batch.token_ids[first:end], item)
            assert row == (end if len(item) else start + own) - 1
            positions = batch.layout.position_ids[first:end]
            assert np.array_equal(positions, len(share.prefix) + np.arange(len(item)))
    assert next(bounds, None) is None


def test_items_are_split_where_a_program_ends() -> None:
    assert split_items(4, [3, 3, 3, 20, 1], 10) == [[0, 1], [2], [3], [4]]
    assert split_items(0, [5], 2) == [[0]]
