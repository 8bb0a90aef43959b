"""Packing loses no token, keeps every item whole and says where it went."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from packscore.packing import pack


def arrays(lens: list[int]) -> list[np.ndarray]:
    return [np.arange(n) + 100 * (k + 1) for k, n in enumerate(lens)]


@given(
    prefix_len=st.integers(0, 9),
    lens=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    chunk_tokens=st.none() | st.integers(1, 60),
)
def test_every_item_is_somewhere_once_and_whole(
    prefix_len: int, lens: list[int], chunk_tokens: int | None
) -> None:
    prefix, items = np.arange(prefix_len), arrays(lens)
    request = pack(prefix, items, chunk_tokens=chunk_tokens)
    assert sorted(request.order.tolist()) == list(range(len(items)))
    whose = iter(request.order.tolist())
    for number, batch in enumerate(request.batches):
        (group,) = batch.layout.groups
        assert (group.prefix_len, group.cached_len) == ((prefix_len, 0), (0, prefix_len))[
            number > 0
        ]
        assert np.array_equal(batch.token_ids[: group.prefix_len], prefix[: group.prefix_len])
        rows = batch.layout.scored_rows
        for (start, end), row in zip(batch.layout.item_bounds, rows, strict=True):
            item = items[next(whose)]
            assert np.array_equal(batch.token_ids[start:end], item)
            # an empty item never lands behind a cached prefix, where it would have no row
            assert row == (end if len(item) else group.prefix_len) - 1
            assert np.array_equal(
                batch.layout.position_ids[start:end], prefix_len + np.arange(len(item))
            )
    assert next(whose, None) is None


def test_chunks_are_of_equal_share() -> None:
    request = pack(np.arange(9), arrays([20] * 500), chunk_tokens=2048)
    sizes = [len(batch.token_ids) for batch in request.batches]
    assert len(sizes) == 5
    assert max(sizes[1:]) == min(sizes[1:]) == sizes[0] - 9 == 2000


def test_a_long_item_is_one_batch() -> None:
    request = pack(np.arange(2), arrays([50]), chunk_tokens=10)
    assert len(request.batches) == 1
    assert request.is_causal
