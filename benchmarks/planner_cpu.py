"""The planner's choices on this CPU beside the best of all flows, measured on 12 workloads.

    python benchmarks/planner_cpu.py            prints a table, writes results/planner_cpu_*.json

A slice of Qwen3-0.6B's shape (one layer, small vocabulary, random weights), one thread. The scorer
calibrates; then every flow that a workload can take is timed as the planner would run it (its own
best division into launches), in an order that turns around, and all scores are compared. The ratio
is the chosen flow's least time to the least of all flows'. Two flows of which the planner divides
one as the other are one. Times are the process's CPU time: the machine may have other work.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

import provenance
from packscore import InputError, MultiItemScorer, patch_model
from packscore.core import ScoringCore
from packscore.flows.copies import Copies
from packscore.flows.engine import Readout
from packscore.flows.planner import Plan, Planner, Workload
from packscore.flows.runner import Runner
from packscore.results import Flow
from workloads import slice_of

VOCAB_SIZE = 1000
READOUT = Readout((1, 2), over_vocabulary=True)
# (query tokens, of which in pages, items, tokens of an item: least and most)
WORKLOADS = [
    (0, 0, 40, (5, 30)),
    (1, 0, 7, (5, 500)),
    (20, 0, 2, (100, 500)),
    (20, 0, 300, (2, 30)),
    (300, 0, 1, (20, 20)),
    (300, 0, 40, (5, 30)),
    (300, 150, 40, (5, 30)),
    (300, 300, 40, (5, 30)),
    (300, 0, 7, (100, 500)),
    (2000, 0, 7, (5, 30)),
    (2000, 2000, 40, (5, 30)),
    (2000, 0, 40, (5, 30)),
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


def ids(rng: np.random.Generator, count: int) -> list[int]:
    """Random tokens."""
    found: list[int] = rng.integers(0, VOCAB_SIZE, count).tolist()
    return found


def copies_of(scorer: MultiItemScorer) -> Copies:
    """What runs the scorer's launches now."""
    return scorer._core.copies


class OneFlowPlanner(Planner):
    """Leaves no choice but one flow, in its best division into launches."""

    def __init__(self, planner: Planner, flow: Flow) -> None:
        super().__init__(planner.costs, planner.limits)
        self._flow = flow

    def choose(self, work: Workload, flow: Flow | None = None) -> Plan:
        """The one flow's plan."""
        return super().choose(work, self._flow)


class OneFlowRunner(Runner):
    """Runs one flow as if it had been chosen: by name it might leave the pages alone."""

    def __init__(self, copies: Copies, flow: Flow) -> None:
        super().__init__(copies)
        self._flow = flow

    @property
    def planner(self) -> Planner:
        """Of the one flow."""
        return OneFlowPlanner(super().planner, self._flow)


class Timed:
    """One workload: runs any flow of it from the state of the pages that it speaks of."""

    def __init__(self, scorer: MultiItemScorer, workload: Any, seed: int) -> None:
        prefix_len, self.cached_len, count, (least, most) = workload
        rng = np.random.default_rng(seed)
        self.scorer = scorer
        self.prefix = ids(rng, prefix_len)
        self.items = [ids(rng, int(n)) for n in rng.integers(least, most + 1, count)]

    def prepare(self) -> None:
        """Only what is said to be in pages is there."""
        self.scorer.clear_prefixes()
        if self.cached_len:
            self.scorer.prefix(self.prefix[: self.cached_len]).release()

    def run(self, flow: Flow) -> tuple[float, np.ndarray]:
        """(milliseconds, scores), by the division that the planner has for this flow."""
        self.prepare()
        start = time.process_time()
        request = self.scorer.encode(self.prefix, self.items)
        (found,) = OneFlowRunner(copies_of(self.scorer), flow).run([request], READOUT)
        if isinstance(found, Exception):
            raise found
        scores = ScoringCore.probabilities(found)
        return 1e3 * (time.process_time() - start), np.array(scores)


def measure(timed: Timed, rounds: int, tolerance: float) -> dict[str, Any]:
    """Time every flow, in an order that turns around."""
    timed.prepare()
    request = timed.scorer.encode(timed.prefix, timed.items)
    found = Runner(copies_of(timed.scorer)).explain(request)
    plans: dict[str, Any] = {}
    for plan in found.plans:  # the chosen one first
        if not any(
            plan.computed_tokens == one.computed_tokens
            and plan.num_launches == one.num_launches == 1
            for one in plans.values()
        ):
            plans[plan.flow] = plan
    times: dict[str, list[float]] = {flow: [] for flow in plans}
    reference = None
    for turn in range(rounds):
        for flow in list(plans)[:: 1 if turn % 2 else -1]:
            best = min(map(min, filter(None, times.values())), default=np.inf)
            if times[flow] and times[flow][0] > 3 * best:
                continue  # out of the running
            ms, scores = timed.run(flow)
            times[flow].append(ms)
            reference = scores if reference is None else reference
            assert np.abs(scores - reference).max() <= tolerance, flow
    least = {flow: min(ms) for flow, ms in times.items()}
    return {
        "query": len(timed.prefix),
        "cached": timed.cached_len,
        "items": len(timed.items),
        "item_tokens": sum(map(len, timed.items)),
        "chosen": found.chosen.flow,
        "ratio": least[found.chosen.flow] / min(least.values()),
        "flows": {
            flow: {
                "launches": plan.num_launches,
                "predicted_ms": round(plan.cost_ms, 1),
                "least_ms": round(least[flow], 1),
                "all_ms": [round(ms, 1) for ms in times[flow]],
            }
            for flow, plan in plans.items()
        },
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = patch_model(slice_of(1, VOCAB_SIZE, getattr(torch, args.dtype)))
    scorer = MultiItemScorer(model, label_token_ids=READOUT.label_ids)
    load, *_ = provenance.load()
    with mock.patch("packscore.flows.runner.time.perf_counter", time.process_time):
        scorer.calibrate(seconds=20)
    costs = copies_of(scorer).costs
    print(costs)
    print(
        f"{'query':>6} {'cached':>6} {'items':>5} {'tokens':>6}  ratio  flow: least (predicted) ms"
    )
    rows = []
    for seed, workload in enumerate(WORKLOADS):
        try:
            row = measure(Timed(scorer, workload, seed), args.rounds, TOLERANCE[args.dtype])
        except InputError as error:
            raise SystemExit(f"{workload}: {error}") from error
        rows.append(row)
        told = ", ".join(
            f"{'>' if flow == row['chosen'] else ''}{flow} {own['least_ms']:.0f}"
            f" ({own['predicted_ms']:.0f}) in {own['launches']}"
            for flow, own in row["flows"].items()
        )
        print(
            f"{row['query']:6} {row['cached']:6} {row['items']:5} {row['item_tokens']:6} "
            f"{row['ratio']:6.3f}  {told}",
            flush=True,
        )
    worst = max(row["ratio"] for row in rows)
    after, *_ = provenance.load()
    print(f"worst ratio {worst:.3f}; load {load:.1f} before, {after:.1f} after")
    result = {
        "what": f"planner on a CPU, one layer of Qwen3-0.6B's shape, {args.dtype}, one thread",
        "command": f"python benchmarks/planner_cpu.py --dtype {args.dtype}",
        "date": provenance.today(),
        "cpu": provenance.cpu(),
        "versions": provenance.versions("torch", "transformers"),
        "load": [load, after],
        "worst_ratio": worst,
        "rows": rows,
    }
    args.out.mkdir(exist_ok=True)
    (args.out / f"planner_cpu_{args.dtype}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
