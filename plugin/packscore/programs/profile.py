"""Where the time of a compiled program goes, by what its operations belong to."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from packscore.programs.interfaces import PROFILE
from packscore.programs.program import ModelProgram
from packscore.programs.sizes import ProgramKey

# An instruction of a compiled program: its name, its kind, and the scopes it was traced in.
INSTRUCTION = re.compile(
    r'^\s+(?:ROOT )?%?([\w.\-]+) = \S.*? ([a-z][a-z\-]*)\(.*metadata=\{.*?op_name="([^"]*)"', re.M
)
CONTROL = {"while", "conditional", "call"}  # the time of these is that of what they call
KERNELS = ("project_qkv", "project_out", "gated_mlp")
# Parts by the scopes that kernels and their composed forms are traced in; the first that fits.
SCOPES = {
    "attention": ("segment_paged_attention",),
    "pages": ("write_kv_pages",),
    "head": ("read_rows", "whole_head"),
    **{name: (name,) for name in KERNELS},
    "products": ("dot_general",),  # of layers that are not these kernels
}
REST = "rest"
OPERATIONS = "XLA Ops"  # the line of a device's plane that has each operation once


def part_of(scopes: str) -> str:
    """The part that an operation belongs to, by the scopes it was traced in."""
    names = set(scopes.split("/"))
    return next((part for part, known in SCOPES.items() if names & set(known)), REST)


def parts_of(hlo_text: str) -> dict[str, str]:
    """By the name of an instruction of a compiled program: its part."""
    found = INSTRUCTION.findall(hlo_text)
    return {name: part_of(scopes) for name, kind, scopes in found if kind not in CONTROL}


def profiled_ms(
    program: ModelProgram, call: Callable[[], object]
) -> tuple[dict[str, float], float]:
    """Profile a call that runs the largest program for segments, once.

    Returns:
      (milliseconds by part, of all threads that computed; those of the call by the clock).
    """
    keys = [key for key in program._executables.by_key if type(key) is ProgramKey]
    largest: Any = program._executables.by_key[max(keys, key=lambda key: key.num_tokens)]
    parts = parts_of(largest.as_text())
    found = dict.fromkeys([*SCOPES, REST], 0.0)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            call()
            wall_ms = 1e3 * (time.perf_counter() - start)
        for file in Path(folder).rglob("*.xplane.pb"):
            data: Any = PROFILE().from_file(str(file))
            for line in _lines(data):
                for name, own_ms in self_ms(line.events, parts):
                    found[parts[name]] += own_ms
    return found, wall_ms


def _lines(data: Any) -> Iterator[Any]:
    for plane in data.planes:
        for line in plane.lines:
            if not plane.name.startswith("/device:") or line.name == OPERATIONS:
                yield line


def self_ms(events: Iterable[Any], known: dict[str, str]) -> Iterator[tuple[str, float]]:
    """(name, milliseconds without those of what runs inside) of every known event of a line."""
    kept = [(e.start_ns, e.start_ns + e.duration_ns, instruction_of(e.name)) for e in events]
    open_events: list[list[Any]] = []  # [end, name, own nanoseconds]
    for start, end, name in sorted((e for e in kept if e[2] in known), key=lambda e: (e[0], -e[1])):
        while open_events and open_events[-1][0] <= start:
            _, done, own = open_events.pop()
            yield done, own / 1e6
        if open_events:
            open_events[-1][2] -= end - start
        open_events.append([end, name, end - start])
    yield from ((name, own / 1e6) for _, name, own in open_events)


def instruction_of(event: str) -> str:
    """The instruction's name in an event's, which on a TPU is its whole text."""
    return event.removeprefix("%").partition(" ")[0]
