"""What a run is going to compute, of all records (`--dry-run`), or told by a few of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from packscore import InputError, InputTypeError, MultiItemScorer
from packscore.cli.tasks import FLOW, Task
from packscore.files.inputs import Input
from packscore.files.records import BadRecord, Entry
from packscore.files.sample import Sample, sample
from packscore.flows.costs import FROM_SHAPE
from packscore.flows.planner import Workload

UNTIMED = "unknown until the first records are timed"


@dataclass
class Plan:
    """Totals over the records of an input.

    Args:
      counted, shared: as a `Task` has them.
      rows: of the input, where that is not the same as records.
      sampled: what the totals are scaled from; None: everything was counted.
    """

    counted: str
    shared: str
    rows: int | None = None
    sampled: str | None = None
    records: int = 0
    bad_records: int = 0
    items: int = 0
    prefix_tokens: int = 0
    item_tokens: int = 0
    one_by_one_tokens: int = 0
    longest_request_tokens: int = 0
    truncated_items: int = 0

    @property
    def packed_tokens(self) -> int:
        """Tokens that packed scoring computes: every query once, every item once."""
        return self.prefix_tokens + self.item_tokens

    @property
    def saved_tokens(self) -> int:
        """Tokens that scoring item by item computes beside those."""
        return self.one_by_one_tokens - self.packed_tokens

    @property
    def _saved(self) -> str:
        share = self.saved_tokens / self.one_by_one_tokens if self.one_by_one_tokens else 0.0
        return f"{self._some(self.saved_tokens)} ({share:.0%})"

    def line(self) -> str:
        """The plan in a line."""
        bad = f" and {self._some(self.bad_records)} bad" if self.bad_records else ""
        rows = "" if self.rows is None else f"{self.rows:,} rows, "
        return (
            f"{rows}{'about ' if self.sampled else ''}{self._some(self.records)} records{bad}, "
            f"{self._some(self.items)} {self.counted}; {self._some(self.packed_tokens)} tokens, "
            f"{self._saved} saved" + (f" ({self.sampled})" if self.sampled else "")
        )

    def table(self) -> str:
        """The plan as a table."""
        rows = [
            ("records", f"{self.records:,}"),
            ("bad records", f"{self.bad_records:,}"),
            (self.counted, f"{self.items:,}"),
            (f"tokens of {self.shared}", f"{self.prefix_tokens:,}"),
            (f"tokens of {self.counted}", f"{self.item_tokens:,}"),
            ("tokens one by one", f"{self.one_by_one_tokens:,}"),
            ("tokens packed", f"{self.packed_tokens:,}"),
            ("tokens saved", self._saved),
            ("longest record", f"{self.longest_request_tokens:,} tokens"),
        ]
        if self.counted == "items":  # questions are never cut
            rows.append(("truncated items", f"{self.truncated_items:,}"))
        rows.append(("time", UNTIMED))
        width = max(len(name) for name, _ in rows) + 1
        return "\n".join(f"{name:<{width}}{value}" for name, value in rows)

    def _some(self, count: int) -> str:
        """A number; of one that is scaled, the digits that say something."""
        return f"{count if self.sampled is None else int(float(f'{count:.3g}')):,}"


def make_plan(entries: Iterable[Entry], task: Task) -> Plan:
    """Encode every record and count."""
    plan = Plan(task.counted, task.shared)
    for entry in entries:
        if isinstance(entry, BadRecord):
            plan.bad_records += 1
            continue
        try:
            request = task.encode(entry)
        except (InputError, InputTypeError):
            plan.bad_records += 1
            continue
        prefix_tokens, num_items = len(request.prefix), len(request.items)
        item_tokens = sum(map(len, request.items))
        plan.records += 1
        plan.items += entry.size
        plan.prefix_tokens += prefix_tokens
        plan.item_tokens += item_tokens
        plan.one_by_one_tokens += prefix_tokens * num_items + item_tokens
        longest = max(plan.longest_request_tokens, prefix_tokens + item_tokens)
        plan.longest_request_tokens = longest
        plan.truncated_items += len(request.truncated_items)
    return plan


def foretold(
    path: str, entries: Input, task: Task, scorer: MultiItemScorer, price_per_hour: float | None
) -> str:
    """What a run is going to compute and to take, in a line, from some of its records.

    Args:
      path, entries: the input, of which no record has been taken yet.
      task: what is made of a record.
      scorer: whose costs are asked; it computes nothing.
      price_per_hour: of the machine.
    """
    found = sample(path, entries)
    if found is None:
        return "unknown, for nothing says how many records there are; --dry-run reads them all"
    plan = scaled(make_plan(found.entries, task), found)
    predicted = predicted_seconds(plan, scorer)
    if predicted is None:
        return f"{plan.line()}; time {UNTIMED}"
    return f"{plan.line()}; about {priced(predicted[0], price_per_hour)}, costs {predicted[1]}"


def scaled(plan: Plan, found: Sample) -> Plan:
    """The plan of all that a sample is of."""
    if found.whole:
        return plan
    by_rows = found.all_rows / found.rows
    records = found.all_queries
    if records is None:
        records = round(plan.records * by_rows)
    return replace(
        plan,
        rows=found.all_rows if found.exact_rows else None,
        sampled=found.told,
        records=records,
        bad_records=round(plan.bad_records * by_rows),
        items=round(plan.items * by_rows),
        prefix_tokens=round(plan.prefix_tokens * records / max(plan.records, 1)),
        item_tokens=round(plan.item_tokens * by_rows),
        one_by_one_tokens=round(plan.one_by_one_tokens * by_rows),
        truncated_items=round(plan.truncated_items * by_rows),
    )


def predicted_seconds(plan: Plan, scorer: MultiItemScorer) -> tuple[float, str] | None:
    """What the engine's costs say of the mean record, for all of them, and where costs are from.

    None where nobody measured the engine's costs, and no compiler scheduled them.
    """
    planner = scorer._core.runner.planner
    if planner.costs.source.startswith(FROM_SHAPE) or not plan.items:
        return None
    lens = np.full(max(1, round(plan.items / plan.records)), round(plan.item_tokens / plan.items))
    work = Workload(round(plan.prefix_tokens / plan.records), 0, lens, is_kept=False)
    found = planner.explain(work)
    cost_ms = {one.flow: one.cost_ms for one in found.plans}.get(FLOW, found.chosen.cost_ms)
    return plan.records * cost_ms / 1e3, found.source


def span(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def priced(seconds: float, price_per_hour: float | None) -> str:
    """A time, and what it costs."""
    if price_per_hour is None:
        return span(seconds)
    cost = price_per_hour * seconds / 3600
    return f"{span(seconds)}, cost {cost:,.2f} at {price_per_hour:g} an hour"
