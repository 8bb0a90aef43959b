"""Launches that fail, or whose reading does, in a runner that keeps a fault to its launch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from helpers import LABELS, engine_of, random_ids, random_qwen3
from packscore import EncodedRequest, MultiItemScorer, UnsupportedModelError, patch_model
from packscore.flows.copies import Copies
from packscore.flows.engine import Limits, Readout
from packscore.flows.jobs import RequestValues
from packscore.flows.runner import Runner
from page_books import check_books
from tolerances import LOG_ODDS_REORDERED

READOUT = Readout(tuple(LABELS[:2]))


def requests_of(num_prefixes: int, each: int) -> list[EncodedRequest]:
    """Requests of long prefixes, so that the second of each waits for the first."""
    return [
        EncodedRequest(
            np.array(random_ids(700, seed=n)), [np.array(random_ids(30 + k, seed=n))] * 2
        )
        for n in range(num_prefixes)
        for k in range(each)
    ]


@pytest.fixture
def engine() -> Any:
    return engine_of(MultiItemScorer(patch_model(random_qwen3()), label_token_ids=LABELS))


def run(engine: Any, requests: list[EncodedRequest], **options: Any) -> list[Any]:
    return Runner(Copies([engine]), **options).run(requests, READOUT)


class Faults:
    """An engine's launches, or their reading, fail by their number from 1 on."""

    def __init__(
        self, engine: Any, patch: pytest.MonkeyPatch, method: str, number: int, error: Exception
    ) -> None:
        self.launched: list[set[int]] = []  # requests of each launch
        launch, read = engine.launch, engine.read

        def noted(batch: Any, readout: Any) -> Any:
            self.launched.append({share.request for share in batch.shares})
            if method == "launch" and len(self.launched) == number:
                raise error
            return len(self.launched), launch(batch, readout)

        def failing_read(found: Any) -> Any:
            if method == "read" and any(count == number for count, _ in found):
                raise error
            return read([one for _, one in found])

        patch.setattr(engine, "launch", noted)
        patch.setattr(engine, "read", failing_read)


def check(engine: Any, found: list[Any], expected: list[Any]) -> None:
    """What did not fail is right, and no page is held."""
    for one, right in zip(found, expected, strict=True):
        if not isinstance(one, Exception):
            assert isinstance(one, RequestValues)
            assert (one.values.logits - right.values.logits).abs().max() < LOG_ODDS_REORDERED
    assert engine.pool.num_pinned_pages == 0
    check_books(engine.pool, [])


@pytest.mark.parametrize("method", ["launch", "read"])
@pytest.mark.parametrize(
    ("number", "most"), [(1, None), (2, None), (3, None), (1, 400), (3, 400), (6, 400)]
)
def test_a_fault_stays_with_the_requests_of_its_launch(
    engine: Any, monkeypatch: pytest.MonkeyPatch, number: int, most: int | None, method: str
) -> None:
    if most:  # then the first of each prefix takes several launches
        engine.most = Limits(most, most, 4)
    requests = requests_of(4, each=3)
    expected = run(engine, requests)
    engine.pool.clear()
    fault = RuntimeError("the device is gone")
    faults = Faults(engine, monkeypatch, method, number, fault)
    found = run(engine, requests, retries=False)
    failed = {i for i, one in enumerate(found) if isinstance(one, Exception)}
    assert failed == faults.launched[number - 1]
    assert 0 < len(failed) < len(requests)
    assert all(found[i] is fault for i in failed)
    if method == "launch":  # nothing more of it is launched
        assert all(failed.isdisjoint(others) for others in faults.launched[number:])
    check(engine, found, expected)


@pytest.mark.parametrize("method", ["launch", "read"])
@pytest.mark.parametrize(
    ("error", "retries"),
    [(RuntimeError("the device is gone"), True), (UnsupportedModelError("too long"), False)],
    ids=["retries", "told"],
)
def test_others_run_again_one_by_one(
    engine: Any, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, retries: bool
) -> None:
    requests = requests_of(2, each=3)
    expected = run(engine, requests)
    faults = Faults(engine, monkeypatch, method, 1, error)
    found = run(engine, requests, retries=retries)
    assert not any(isinstance(one, Exception) for one in found)
    assert faults.launched[-6:] == [{0}] * 6  # each in a run of its own
    check(engine, found, expected)
