"""One selftest: exactness, then the request in all ways, its parts, and the planner's costs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from packscore.calls import program_of
from packscore.patching import patch_model
from packscore.scoring import MultiItemScorer
from packscore.selftest.checks import checks
from packscore.selftest.parts import parts
from packscore.selftest.report import Cell, Compiled, Planned, Report
from packscore.selftest.subjects import Request, Subject, reference, shipped
from packscore.selftest.timing import cells, predicted
from packscore.selftest.ways import EXTEND, LABEL_IDS, MASKS, PACKED, Way
from packscore.verify import twin_of

CALIBRATION_SECONDS = 3.0


@dataclass(frozen=True)
class Settings:
    """What is asked of a selftest.

    Args:
      device: of torch, where the models are.
      programs: `patch_model`'s device, or None for torch alone.
      in_torch: whether torch is asked too where there are programs.
      model: hub name or folder of what is timed; None: Qwen3-0.6B's shape.
      dtype: of what is timed.
      request: its sizes.
      warmup, runs: how often each way runs before it is timed, and while it is.
      ab: the dense mask too.
      is_small: for a CPU.
    """

    device: str
    programs: str | None
    in_torch: bool
    model: str | None
    dtype: torch.dtype
    request: Request
    warmup: int
    runs: int
    ab: bool
    is_small: bool

    @property
    def ways_to_run(self) -> Iterator[tuple[str, str | None]]:
        """("torch" or "programs", `patch_model`'s device)."""
        if self.in_torch or self.programs is None:
            yield "torch", None
        if self.programs is not None:
            yield "programs", self.programs


def has_jax() -> bool:
    """Whether programs can be made here; nothing is imported."""
    return all(find_spec(name) is not None for name in ("jax", "torchax"))


def run(settings: Settings, made: dict[str, Any], tell: Callable[[str], object]) -> Report:
    """All of it.

    Args:
      settings: what is asked.
      made: for the report: date, versions, machine.
      tell: takes a line for people at every step.
    """
    timed = reference(settings.model, settings.dtype, is_small=settings.is_small)
    subjects = shipped(torch.float32), timed
    report = Report(
        made,
        asdict(settings.request),
        timed.name,
        str(settings.dtype).removeprefix("torch."),
    )
    models: list[nn.Module] = []
    for subject in subjects:
        tell(f"{subject.name}: every flow beside eager torch, one by one")
        ways = [*_ways(subject, settings)]
        checked = [*checks(subject, ways)]
        report.checks += checked
        models += [way.scorer.model for way in ways]
    tell(
        f"{subject.name}: {settings.request}; {settings.warmup} + {settings.runs} runs of each way"
    )
    vocab_size = subject.model.config.vocab_size
    refused = {(check.runs, check.mask, check.flow) for check in checked if check.refused}
    chosen = [
        (way, flow)
        for way, flow in itertools.product(ways, (PACKED, EXTEND))
        if (settings.ab or way.mask == "segment") and (way.runs, way.mask, flow) not in refused
    ]
    report.cells += cells(chosen, settings.request, settings.warmup, settings.runs, vocab_size)
    for way in ways:
        if way.mask == "segment":
            tell(f"{way.runs}: a profile, and the planner's calibration")
            report.parts += parts(way, settings.request)
            report.planned.append(_planned(report.cells, way, settings.request, vocab_size))
    report.compiled = _compiled(models)
    return report


def _ways(subject: Subject, settings: Settings) -> Iterator[Way]:
    """Scorers of one model: in torch and in programs, under each mask."""
    for runs, device in settings.ways_to_run:
        # other modules over the same weights, where these do not move
        twin: nn.Module = (twin_of if settings.device == "cpu" else copy.deepcopy)(subject.model)
        model = patch_model(twin.to(settings.device), device=device)
        for mask in MASKS:
            yield Way(runs, mask, MultiItemScorer(model, label_token_ids=LABEL_IDS, mask_impl=mask))


def _compiled(models: Iterable[nn.Module]) -> Compiled:
    programs = {id(found): found for model in models if (found := program_of(model))}.values()
    return Compiled(
        sum(program.compile_count for program in programs),
        sum(program.compile_seconds for program in programs),
    )


def _planned(cells: list[Cell], way: Way, request: Request, vocab_size: int) -> Planned:
    """The planner before and behind its calibration, beside what was measured."""
    (measured,) = (
        cell
        for cell in cells
        if (cell.runs, cell.mask, cell.flow) == (way.runs, way.mask, "packed")
    )
    found, before = predicted(way.scorer, request, vocab_size)
    way.scorer.calibrate(seconds=CALIBRATION_SECONDS)
    _, behind = predicted(way.scorer, request, vocab_size)
    return Planned(way.runs, found.source, before, behind, measured.ms, found.known_error)
