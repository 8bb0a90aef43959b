"""The request, timed: warmed up, a new query in every run, medians and their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

from packscore.flows.planner import Explanation
from packscore.scoring import MultiItemScorer
from packscore.selftest.report import Cell
from packscore.selftest.subjects import Request
from packscore.selftest.ways import FLOWS, PACKED, UNSEEN, Way


def cells(
    ways: Sequence[tuple[Way, str]], request: Request, warmup: int, runs: int, vocab_size: int
) -> Iterator[Cell]:
    """Flows of scorers; all take turns, in an order that turns around.

    Args:
      ways: (scorer, flow) each, all of one model.
      request: its sizes.
      warmup: runs of each that are not timed.
      runs: runs of each that are.
      vocab_size: of the model.
    """
    timed = [(*pair, list[float]()) for pair in ways]
    for number in range(warmup + runs):
        query, items = request.drawn(number, vocab_size)
        for way, flow, spent in timed[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            FLOWS[flow](way.scorer, query, items)
            spent.append(1e3 * (time.perf_counter() - start))
    for way, flow, spent in timed:
        behind = spent[warmup:]
        low, middle, high = statistics.quantiles(behind, n=4) if runs > 1 else behind * 3
        is_planned = flow == PACKED and way.mask == "segment"
        yield Cell(
            runs=way.runs,
            mask=way.mask,
            flow=flow,
            first_ms=spent[0],
            ms=middle,
            ms_low=low,
            ms_high=high,
            num_runs=runs,
            items_per_s=1e3 * request.num_items / middle,
            ms_per_item=middle / request.num_items,
            predicted_ms=predicted(way.scorer, request, vocab_size)[1] if is_planned else None,
        )


def predicted(
    scorer: MultiItemScorer, request: Request, vocab_size: int
) -> tuple[Explanation, float | None]:
    """(what the planner says, the request packed in ms; None: it does not fit)."""
    found = scorer._core.runner.explain(scorer.encode(*request.drawn(UNSEEN, vocab_size)))
    return found, {plan.flow: plan.cost_ms for plan in found.plans}.get("packed")
