"""The table of shapes on which packed scores must equal one by one, in torch and in programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from helpers import FrozenCase, random_ids, random_qwen3
from selection import cover

# (q heads, kv heads, head_dim, layers, tied): every value of each beside every other's neighbours
CONFIGS = [
    (16, 8, 64, 1, True),
    (16, 8, 128, 3, False),
    (32, 8, 64, 2, False),
    (32, 8, 128, 1, True),
    (4, 4, 64, 6, True),
    (4, 4, 128, 2, False),
    (14, 2, 64, 4, False),
    (14, 2, 128, 2, True),
]
CONFIG_IDS = [f"H{h}-{kv}-D{d}-layers{n}-{'tied' if t else 'untied'}" for h, kv, d, n, t in CONFIGS]
FIFTY_MIXED = [(37 * k) % 41 + (k % 7 == 0) * 150 for k in range(50)]
BOUNDARIES = [0, 200, 1, 2, 63, 64, 65, 127, 128, 129]
CASES = {
    "P0-N1": (0, [9]),
    "P0-N2": (0, [1, 200]),
    "P0-N50-mixed": (0, FIFTY_MIXED),
    "P1-N1-empty": (1, [0]),
    "P1-N2-empty": (1, [0, 0]),
    "P1-N10-lengths-0-to-200": (1, BOUNDARIES),
    "P1-N50-equal": (1, [12] * 50),
    "P17-N1": (17, [40]),
    "P17-N2-one-empty": (17, [0, 31]),
    "P17-N50-equal": (17, [12] * 50),
    "P17-N50-mixed": (17, FIFTY_MIXED),
    "P300-N1": (300, [9]),
    "P300-N2": (300, [1, 200]),
    "P300-N10-lengths-0-to-200": (300, BOUNDARIES),
}


def make_case(prefix_len: int, item_lens: list[int]) -> FrozenCase:
    prefix = random_ids(prefix_len, seed=1)
    # without a prefix an empty item has no token to be scored at
    lens = [n if prefix_len else max(n, 1) for n in item_lens]
    return FrozenCase(prefix, [random_ids(n, seed=k + 2) for k, n in enumerate(lens)])


def make_model(config: tuple[int, int, int, int, bool]) -> PreTrainedModel:
    """A random model of one row of CONFIGS."""
    num_heads, num_kv_heads, head_dim, num_layers, tied = config
    return random_qwen3(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_layers=num_layers,
        tied=tied,
    )


def cells(cases: Iterable[tuple[int, str]]) -> list[Any]:
    """Parameters (row of CONFIGS, name in CASES): a pairwise cover, and the others when long.

    What meets in pairs are heads, head_dim, tokens of the query, number of items and whether they
    are of one length, which between them tell all rows and all cases apart.
    """

    def features(row: int, name: str) -> tuple[Any, ...]:
        prefix_len, lens = CASES[name]
        return *CONFIGS[row][:3], prefix_len, len(lens), len(set(lens)) == 1

    return cover(
        (f"{CONFIG_IDS[row]}-{name}", (row, name), features(row, name)) for row, name in cases
    )
