"""How often the kernels around attention run the pieces of their code, by the steps of a grid."""

from __future__ import annotations

from typing import NamedTuple

from packscore_kernels.layer.walks import QkvSteps


class QkvRuns(NamedTuple):
    """What `project_qkv` runs how often."""

    steps: int  # of its grid: what stands behind no guard
    tiles: int  # of tokens: the norm, and the piece that finishes v
    products: tuple[int, ...]  # the pieces that multiply, in the order of the code


class MlpRuns(NamedTuple):
    """What `gated_mlp` runs how often."""

    steps: int  # of its grid: what stands behind no guard
    first: int  # chunks that begin a tile of tokens, and pieces that end one
    others: int  # chunks


def qkv_runs(num_steps: int, steps: QkvSteps) -> QkvRuns:
    """Of a grid of tiles x steps: the first step of q, k and v is a piece each, and the others."""
    tiles = num_steps // steps.per_tile
    parts = (steps.q, steps.kv, steps.kv)
    pieces = (tiles * times for count in parts for times in (min(count, 1), count - 1))
    return QkvRuns(num_steps, tiles, tuple(times for times in pieces if times > 0))


def mlp_runs(num_steps: int, num_chunks: int) -> MlpRuns:
    """Of a grid of tiles x chunks of the width."""
    tiles = num_steps // num_chunks
    return MlpRuns(num_steps, tiles, num_steps - tiles)
