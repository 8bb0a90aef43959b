"""How often the kernels around attention run the pieces of their code, by the steps of a grid."""

from __future__ import annotations

from typing import NamedTuple

from packscore_kernels.layer.projections import num_passes


class QkvRuns(NamedTuple):
    """What `project_qkv` runs how often."""

    steps: int  # of its grid: what stands behind no guard
    tiles: int  # of tokens: the norm, and the piece of each pass


class MlpRuns(NamedTuple):
    """What `gated_mlp` runs how often."""

    steps: int  # of its grid: what stands behind no guard
    first: int  # chunks that begin a tile of tokens, and pieces that end one
    others: int  # chunks


def qkv_runs(num_steps: int, num_q_heads: int, num_kv_heads: int) -> QkvRuns:
    """Of a grid of tiles x passes, and the step that finishes the last pass."""
    return QkvRuns(num_steps, num_steps // (num_passes(num_q_heads, num_kv_heads) + 1))


def mlp_runs(num_steps: int, num_chunks: int) -> MlpRuns:
    """Of a grid of tiles x chunks of the width."""
    tiles = num_steps // num_chunks
    return MlpRuns(num_steps, tiles, num_steps - tiles)
