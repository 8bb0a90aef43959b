"""Heads, tokens, pages and chips for which tiles are picked, and for which those must run."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

HEAD_DIMS = (64, 80, 96, 128, 256)
TOKENS = (130, 640, 1024, 1920)
PAGE_SIZES = (0, 16, 128, 512)
CHIPS = ("v5e", "v5p", "v6e", "tpu7x")


class Case(NamedTuple):
    """What tiles are picked by."""

    group_size: int
    head_dim: int
    num_tokens: int
    page_size: int
    chip: str


def _case(group_size: int, d: int) -> Case:
    low, high = group_size % 4, group_size // 4
    sizes = TOKENS[(d + low) % 4], PAGE_SIZES[(d + high) % 4], CHIPS[(d + low + high) % 4]
    return Case(group_size, HEAD_DIMS[d], *sizes)


# Any value of a property meets any of another.
GRID = [_case(group_size, d) for group_size in range(1, 17) for d in range(len(HEAD_DIMS))]


def params(*by_default: tuple[int, int]) -> list[Any]:
    """The grid as parameters of a test; by default a few (group size, head_dim), else all."""
    return [
        pytest.param(
            case,
            id="-".join(map(str, case)),
            marks=() if case[:2] in by_default else pytest.mark.long,
        )
        for case in GRID
    ]
