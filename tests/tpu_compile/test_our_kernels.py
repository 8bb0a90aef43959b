"""Cycles of kernels with loops and guards, worked out by hand from a few made-up pieces."""

from __future__ import annotations

from typing import Any

import pytest

from packscore_kernels.layer.counts import MlpRuns, QkvRuns, mlp_runs, qkv_runs
from packscore_kernels.layer.walks import QkvSteps
from tpu_compiler import our_kernels
from tpu_compiler.schedule import Region


def piece(bundles: int, text: str = "", depth: int = 1, exits: tuple[int, ...] = ()) -> Region:
    facts: dict[str, Any] = {"start": 0, "end": 0, "label": "", "use": {}, "notes": []}
    return Region(bundles=bundles, text=text, depth=depth, exits=list(exits), **facts)


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of two tiles of three chunks: before the loop, in every step, and behind guards."""
    pieces = [
        piece(10, depth=0),
        piece(20),
        piece(300, "vmatmul"),
        piece(250, "vmatmul"),
        piece(190, exits=(8,)),
    ]
    monkeypatch.setattr(our_kernels, "regions", lambda path: iter(pieces))


@pytest.mark.usefixtures("schedule")
def test_pieces_count_as_often_as_they_run() -> None:
    assert our_kernels.steps_of("") == 6  # the loop is left at two more
    # what is longer than a guard's least runs twice, what is shorter in every step
    assert our_kernels.guarded_cycles("", 2, 6) == 2 * (300 + 250 + 190) + 6 * 20
    runs = mlp_runs(6, 3)
    assert runs == MlpRuns(steps=6, first=2, others=4)
    assert our_kernels.mlp_cycles("", runs) == 2 * 300 + 4 * 250 + 2 * 190 + 6 * 20


@pytest.mark.usefixtures("schedule")
def test_pieces_of_the_projections_count_as_often_as_they_run() -> None:
    runs = QkvRuns(steps=10, tiles=2, products=(2, 6))
    assert our_kernels.qkv_cycles("", runs) == 2 * 300 + 6 * 250 + 2 * 190 + 10 * 20
    # two tiles of four steps of q, one of k, one of v, and one that ends them
    assert qkv_runs(14, QkvSteps.of(16, 4, 4)) == QkvRuns(14, 2, (2, 6, 2, 2))
    # and without q: two tiles of two steps of k, two of v, and one that ends them
    assert qkv_runs(10, QkvSteps.of(0, 8, 4)) == QkvRuns(10, 2, (2, 2, 2, 2))
