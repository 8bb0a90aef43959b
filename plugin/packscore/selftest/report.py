"""What a selftest found, for people and as one JSON to attach to a report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Check:
    """Scores of one way to compute them, beside eager torch one by one.

    Args:
      model, dtype: what scored.
      runs: "torch" or "programs".
      mask, flow: the way.
      max_difference: of a probability; None where the way is not taken.
      bound: what it may be.
      refused: why the way is not taken.
    """

    model: str
    dtype: str
    runs: str
    mask: str
    flow: str
    max_difference: float | None
    bound: float
    refused: str | None = None

    @property
    def passed(self) -> bool:
        """Within its bound, and a NaN is not; a mask in torch keeps no pages, and says so."""
        if self.max_difference is None:
            return (self.runs, self.mask) == ("torch", "dense")
        return self.max_difference <= self.bound


@dataclass(frozen=True)
class Cell:
    """One way to compute the request, timed; every run has a query that was not seen before.

    Args:
      runs, mask, flow: the way.
      first_ms: of the first run, which compiles where programs run.
      ms: the median of the timed runs; ms_low and ms_high are their quartiles.
      num_runs: how many were timed.
      items_per_s, ms_per_item: of the median.
      predicted_ms: by the planner, before it was calibrated; None where it predicts none.
    """

    runs: str
    mask: str
    flow: str
    first_ms: float
    ms: float
    ms_low: float
    ms_high: float
    num_runs: int
    items_per_s: float
    ms_per_item: float
    predicted_ms: float | None


@dataclass(frozen=True)
class Part:
    """What a part of one packed request takes on the device, from a profile.

    Args:
      runs: "torch" or "programs".
      part: its name.
      ms: measured, of all threads that compute.
      predicted_ms: from the compiler's schedule for this chip; None where there is none.
    """

    runs: str
    part: str
    ms: float
    predicted_ms: float | None


@dataclass(frozen=True)
class Planned:
    """What the planner expects of the packed request, beside what it took.

    Args:
      runs: "torch" or "programs".
      source: where its costs came from.
      before_ms: by these.
      calibrated_ms: by costs measured here; None where nothing was measured.
      measured_ms: the median.
      known_error: how far what is predicted was off where others measured; empty where nobody did.
    """

    runs: str
    source: str
    before_ms: float | None
    calibrated_ms: float | None
    measured_ms: float
    known_error: str = ""


@dataclass(frozen=True)
class Compiled:
    """How many programs were made ready, and the seconds that took, of all models."""

    programs: int
    seconds: float


@dataclass
class Report:
    """All of one run.

    Args:
      made: date, command, versions, machine and device.
      request: the sizes that were timed.
      model, dtype: what was timed.
      checks, cells, parts: see there.
      planned: the planner's predictions beside what was measured.
      compiled: of programs.
      notes: what to know about it.
    """

    made: dict[str, Any]
    request: dict[str, int]
    model: str
    dtype: str
    checks: list[Check] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    planned: list[Planned] = field(default_factory=list)
    compiled: Compiled = field(default_factory=lambda: Compiled(0, 0.0))
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def json(self) -> str:
        """All of it."""
        found = {"format": FORMAT, "passed": self.passed, **asdict(self)}
        return json.dumps(found, indent=1) + "\n"

    def text(self) -> str:
        """All of it for people."""
        lines = [*self._checks(), "", *self._cells()]
        if self.parts:
            lines += ["", *self._parts()]
        lines += ["", *map(_told, self.planned)]
        lines += sorted({planned.known_error for planned in self.planned} - {""})
        if self.compiled.programs:
            lines.append(
                f"{self.compiled.programs} programs ready in {self.compiled.seconds:,.1f} s"
            )
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"verdict: {'exact' if self.passed else 'NOT EXACT'}"])

    def _checks(self) -> list[str]:
        lines = ["exactness, against eager torch one by one"]
        for check in self.checks:
            found = check.refused or f"{check.max_difference:.1e} of at most {check.bound:g}"
            lines.append(
                f"  {'ok ' if check.passed else 'BAD'} {check.model}, {check.dtype}, "
                f"{check.runs}: {check.mask}, {check.flow}: {found}"
            )
        return lines

    def _cells(self) -> list[str]:
        sizes = self.request
        lines = [
            f"{self.model}, {self.dtype}: query {sizes['query_len']:,}, "
            f"{sizes['num_items']:,} items x {sizes['item_len']:,}",
            f"  {'runs':8} {'mask':7} {'flow':16} {'items/s':>9} {'ms/item':>8} {'s/request':>10} "
            f"{'quartiles, ms':>19} {'predicted, ms':>14}",
        ]
        for cell in self.cells:
            predicted = "" if cell.predicted_ms is None else f"{cell.predicted_ms:,.1f}"
            spread = f"{cell.ms_low:,.1f}-{cell.ms_high:,.1f}"
            lines.append(
                f"  {cell.runs:8} {cell.mask:7} {cell.flow:16} {cell.items_per_s:9,.1f} "
                f"{cell.ms_per_item:8.3f} {cell.ms / 1e3:10.4f} {spread:>19} {predicted:>14}"
            )
        return lines

    def _parts(self) -> list[str]:
        lines = ["one packed request, part by part"]
        lines += [f"  {'runs':8} {'part':12} {'ms':>10} {'predicted, ms':>14}"]
        for part in self.parts:
            predicted = "" if part.predicted_ms is None else f"{part.predicted_ms:,.2f}"
            lines.append(f"  {part.runs:8} {part.part:12} {part.ms:10,.2f} {predicted:>14}")
        return lines


def _told(planned: Planned) -> str:
    before = "nothing" if planned.before_ms is None else f"{planned.before_ms:,.1f} ms"
    told = f"planner, {planned.runs}: {before} ({planned.source})"
    if planned.calibrated_ms is not None:
        told += f", calibrated {planned.calibrated_ms:,.1f} ms"
    return f"{told}; measured {planned.measured_ms:,.1f} ms"
