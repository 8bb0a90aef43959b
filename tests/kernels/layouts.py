"""Layouts that put every boundary on, before and behind the edge of a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from packscore_kernels import Group, SegmentLayout

TOKENS = 512
MAX_GROUPS = 4
MAX_PAGES = 40
NUM_PAGES = 64


def pages_of(cached_len: int, page_size: int, free: list[int]) -> np.ndarray:
    """Takes pages from `free`, a shuffled list with gaps."""
    count = -(-cached_len // page_size)
    taken = [free.pop() for _ in range(count)]
    return np.asarray(taken, np.int32)


def fill(lens: Sequence[int], room: int) -> np.ndarray:
    """As many of the lengths as there is room for."""
    kept = []
    for length in lens:
        if sum(kept) + length > room:
            break
        kept.append(length)
    return np.asarray(kept, np.int32)


def group(
    prefix_len: int,
    item_lens: Sequence[int] | np.ndarray,
    cached_len: int = 0,
    page_size: int = 0,
    free: list[int] | None = None,
) -> Group:
    pages = pages_of(cached_len, page_size, free) if cached_len else np.zeros(0, np.int32)
    return Group(prefix_len, np.asarray(item_lens, np.int32), cached_len, pages)


def edges(page_size: int) -> Iterator[tuple[str, SegmentLayout]]:
    """(id, layout): prefix ends and item ends around block edges, long items, empty things."""
    for base in (0, 128, 256):
        for step in (-1, 0, 1):
            p = max(base + step, 0)
            for end in (128, 256, 384):
                for turn in (-1, 0, 1):
                    first = end + turn - p
                    if first > 0:
                        lens = fill([first, 20, 7, 50], TOKENS - p)
                        yield f"P{p}-ends-at-{end + turn}", SegmentLayout.single(p, lens, TOKENS)
    for p in (0, 1, 100, 128, 300):
        for length in (1, 31, 32, 33, 127, 128, 129, 200, 256, 257, 385):
            lens = fill([3, length, 5], TOKENS - p)
            yield f"P{p}-L{length}", SegmentLayout.single(p, lens, TOKENS)
    yield "200-one-token-items", SegmentLayout.single(100, [1] * 200, TOKENS)
    yield "empty-items", SegmentLayout.single(100, [0, 5, 0, 0, 7, 0], TOKENS)
    yield "all-padding", SegmentLayout.single(0, [], TOKENS)
    yield "only-prefix", SegmentLayout.single(TOKENS, [], TOKENS)
    yield "only-items", SegmentLayout.single(0, [128] * 4, TOKENS)
    yield "no-padding", SegmentLayout.single(200, [312], TOKENS)
    for cached in (1, 15, 16, 17, 127, 128, 129, 255, 256, 257, 300):
        free = np.random.default_rng(cached).permutation(NUM_PAGES).tolist()
        for p in (0, 60):
            one = group(p, [20] * 10 + [140], cached, page_size, list(free))
            yield f"cached{cached}-P{p}", SegmentLayout((one,), TOKENS)


def drawn(seed: int, page_size: int) -> SegmentLayout:
    """A layout with several groups, each with its own mix of cached and packed prefix and items."""
    rng = np.random.default_rng(seed)
    free = rng.permutation(NUM_PAGES).tolist()
    groups, room, pages = [], TOKENS, MAX_PAGES
    for _ in range(rng.integers(1, MAX_GROUPS + 1)):
        p = int(min(rng.choice([0, 1, 5, 40, 127, 130, 200]), room))
        cached = int(rng.choice([0, 0, 3, 16, 100, 140]))
        cached = min(cached, pages * page_size)
        lens = rng.choice([0, 1, 2, 19, 20, 33, 64, 128, 150, 300], rng.integers(0, 12))
        lens = fill(lens.tolist(), room - p)
        groups.append(group(p, lens, cached, page_size, free))
        room -= groups[-1].num_tokens
        pages -= len(groups[-1].page_indices)
    return SegmentLayout(tuple(groups), TOKENS)
