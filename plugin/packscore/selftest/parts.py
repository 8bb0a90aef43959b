"""What the parts of one packed request take, measured by a profile and predicted beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from packscore.calls import program_of
from packscore.flows.costs import predicted_parts
from packscore.model.family import base_model
from packscore.model.sizes import ModelSizes
from packscore.selftest.report import Part
from packscore.selftest.subjects import Request
from packscore.selftest.ways import FLOWS, PACKED, UNSEEN, Way
from packscore_kernels.hardware import chip_of

# torch's operators by part; the first that fits.
OPERATORS = {
    "attention": ("scaled_dot_product", "flash_attention"),
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "mkldnn"),
}


def parts(way: Way, request: Request) -> list[Part]:
    """Of one packed request that was not seen before; its programs are there.

    Args:
      way: a scorer under segments, which ran such requests before.
      request: its sizes.
    """
    runs, model = way.runs, base_model(way.scorer.model)
    query, items = request.drawn(UNSEEN, model.config.vocab_size)

    def call() -> object:
        return FLOWS[PACKED](way.scorer, query, items)

    program = program_of(model)
    if program is None:
        return [Part(runs, name, ms, None) for name, ms in _of_torch(call, model.device)]
    # imported here: jax and torchax come into the process on the JAX path only
    from packscore.programs.profile import KERNELS, profiled_ms

    chip = chip_of(program.device)
    measured, wall_ms = profiled_ms(program, call)
    predicted = _predicted(program.sizes, request, chip) if chip else {}
    if predicted and not any(measured[name] for name in KERNELS):
        predicted["products"] = sum(predicted.pop(name) for name in KERNELS)
    found = [Part(runs, name, ms, predicted.get(name)) for name, ms in measured.items() if ms]
    if chip:  # one device whose operations follow each other: what is not theirs is the host's
        found.append(Part(runs, "host", max(wall_ms - sum(measured.values()), 0.0), None))
    return found


def _predicted(sizes: ModelSizes, request: Request, chip: str) -> dict[str, float]:
    items = request.num_items * request.item_len
    pairs = items * (request.query_len + request.item_len / 2), request.query_len**2 / 2
    return predicted_parts(sizes, chip, request.query_len + items, *pairs)


def _of_torch(call: Callable[[], object], device: torch.device) -> Iterator[tuple[str, float]]:
    activity = torch.profiler.ProfilerActivity
    on_cuda = device.type == "cuda"
    activities = [activity.CPU, *([activity.CUDA] if on_cuda else [])]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    found = dict.fromkeys([*OPERATORS, "rest"], 0.0)
    for event in profile.key_averages():
        own: Any = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        part = (name for name, marks in OPERATORS.items() if any(m in event.key for m in marks))
        found[next(part, "rest")] += own / 1e3
    yield from found.items()
