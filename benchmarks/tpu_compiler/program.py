"""What a compiled whole program takes, instruction by instruction: cycles and bytes of HBM.

The text of the compiled program says which instructions stand in a loop, how often the loop turns,
and which arrays lie in HBM (those whose layout does not end in another memory space, as VMEM does).
The dumped schedule of each instruction says its cycles. An instruction takes what is longer: its
cycles, or its bytes at the HBM's bandwidth; copies that the compiler starts early are hidden.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tpu_compiler.schedule import pipelined_cycles, regions

# names in a program's text
KERNEL, DENSE_SCOPE, ROWS_SCOPE = "segment_paged_attention", "dense_attention", "row_attention"
COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\](\{[^}]*\})?")
FILE = re.compile(r"\d+-(.+)-\d+-packed-bundles-post-ra\.txt$")
TILE = re.compile(r"\{([\d,]+):T\(([\d,]+)\)")
WHILE = re.compile(r"condition=%([\w.\-]+), body=%([\w.\-]+)")
CALLED = re.compile(r", calls=%([\w.\-]+)")
BOUND = re.compile(r" s32\[\]\S* constant\((\d+)\)")


# What a step of a kernel's grid takes beside its schedule: memory's answer, as measured elsewhere.
GRID_STEP_MS = 90e-6


class Cost(NamedTuple):
    """What an instruction takes."""

    cycles: float
    hbm_bytes: float | None = None  # None: those of the arrays in the program's text
    grid_steps: int = 0


@dataclass(frozen=True)
class Instruction:
    """One scheduled instruction of a program."""

    name: str
    times: float  # that it runs, on the average where that is data
    cycles: float  # once
    hbm_bytes: float  # once
    multiplies: bool  # on the matrix unit
    is_attention: bool
    grid_steps: int = 0  # once

    def milliseconds(self, clock_hz: float, hbm_bytes_per_s: float) -> float:
        """All its runs."""
        return 1e3 * self.times * max(self.cycles / clock_hz, self.hbm_bytes / hbm_bytes_per_s)


def array_bytes(shape: str, layers: int = 1) -> float:
    """Bytes in HBM of all arrays of a shape, padded to their tiles as the chip stores them.

    Of arrays that are stacked over so many layers it is one layer's.
    """
    total = 0.0
    for dtype, dims, layout in ARRAY.findall(shape):
        if "S(" in layout:  # in VMEM, or scalar memory
            continue
        sizes = [int(d) for d in dims.split(",") if d]
        stacked = layers > 1 and len(sizes) > 1 and sizes[0] % layers == 0
        if tile := TILE.match(layout):
            minor = [int(d) for d in tile[1].split(",")]
            for axis, side in zip(minor, reversed(tile[2].split(",")), strict=False):
                sizes[axis] = math.ceil(sizes[axis] / int(side)) * int(side)
        bits = 8 if dtype == "pred" else int(re.sub(r"\D", "", dtype))
        total += math.prod(sizes) * bits / 8 / (layers if stacked else 1)
    return total


def summary(
    found: list[Instruction], clock_hz: float, hbm_bytes_per_s: float
) -> dict[str, float | dict[str, float]]:
    """Milliseconds of a program, in all and by what they are spent on."""
    parts = dict.fromkeys(("attention", "matmuls", "rest", "once"), 0.0)
    for one in found:
        kind = "matmuls" if one.multiplies else "rest"
        if one.is_attention:
            kind = "attention"
        elif one.times == 1:
            kind = "once"
        parts[kind] += one.milliseconds(clock_hz, hbm_bytes_per_s)
    return {
        "ms": sum(parts.values()),
        "parts_ms": parts,
        "cycles_ms": 1e3 * sum(one.times * one.cycles for one in found) / clock_hz,
        "grid_step_ms": GRID_STEP_MS * sum(one.times * one.grid_steps for one in found),
        "hbm_ms": 1e3 * sum(one.times * one.hbm_bytes for one in found) / hbm_bytes_per_s,
    }


def computations(hlo: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is the entry, lines) of every computation of a program's text."""
    lines: list[str] = []
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            lines = []
            yield match[2], bool(match[1]), lines
        elif line.startswith(" "):
            lines.append(line)


def twins(bodies: dict[str, tuple[bool, list[str]]]) -> Iterator[tuple[str, str]]:
    """(fusion, another one of the same code): the compiler schedules one of them for all."""

    def code(name: str) -> str:
        bare = (re.sub(r", (?:metadata|backend_config)=.*", "", line) for line in bodies[name][1])
        return re.sub(r"%[\w.\-]+", "%", "\n".join(bare))

    same: dict[str, list[str]] = {}
    for _, lines in bodies.values():
        for line in lines:
            match, called = INSTRUCTION.match(line), CALLED.search(line)
            if match and called and match[3] == "fusion":
                same.setdefault(code(called[1]), []).append(match[1])
    for names in same.values():
        yield from itertools.permutations(names, 2)


def instructions(
    hlo: str,
    schedules: list[str],
    cost_of: Callable[[str, str], Cost | None] = lambda name, path: None,
    turns_of: Callable[[str], int] = lambda line: 1,
    layers: int = 1,
    all_layers: int = 0,
) -> list[Instruction]:
    """Every scheduled instruction of a program.

    Args:
      hlo: the compiled program's text.
      schedules: the files that the compiler dumped for it.
      cost_of: (instruction, its file) to what it takes, where that cannot be read off.
      turns_of: a loop's line to its turns, where these are data.
      layers: over which weights and pages are stacked: one layer reads its own. What stands in no
        loop and gives a stack reads and gives all of it.
      all_layers: of the model that these stand for, where they are fewer: the loop over all but the
        last turns, and stacks are, as if it had them all.

    Fusions of the same code share the schedule of one of them.
    """
    bodies = {name: (entry, lines) for name, entry, lines in computations(hlo)}
    files = {m[1]: path for path in schedules if (m := FILE.search(os.path.basename(path)))}
    files |= {own: files[twin] for own, twin in twins(bodies) if own not in files if twin in files}
    found: list[Instruction] = []

    def walk(name: str, times: float, turns: float) -> None:
        shapes: dict[str, str] = {}
        for line in bodies[name][1]:
            match = INSTRUCTION.match(line)
            if not match:
                continue
            own, shape, opcode, rest = match.groups()
            shapes[own] = shape
            if opcode == "while" and (loop := WHILE.search(rest)):
                bounds = BOUND.findall("\n".join(bodies[loop[1]][1]))
                count = int(bounds[0]) if bounds else turns_of(line)
                is_of_layers = all_layers and count == layers - 1
                walk(loop[2], times * (all_layers - 1 if is_of_layers else count), count)
            elif own in files:
                path = files[own]
                operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
                arrays = [shape, *(shapes.get(operand, "") for operand in dict.fromkeys(operands))]
                cost = cost_of(own, path)
                cycles, moved, steps = cost or Cost(pipelined_cycles(path))
                if moved is None:
                    given = array_bytes(shape, layers if turns > 1 else 1)
                    is_stack = turns == 1 and given > array_bytes(shape, layers)
                    of_each = 1 if is_stack else layers
                    moved = given + sum(array_bytes(array, of_each) for array in arrays[1:])
                    if "gather" in own:  # reads the rows it gives, not the whole table
                        moved = 2 * given
                    if is_stack and all_layers:
                        cycles, moved = (x * all_layers / layers for x in (cycles, moved))
                multiplies = any(r.has("vmatmul") for r in regions(path))
                is_attention = own.startswith(KERNEL) or DENSE_SCOPE in line
                found.append(
                    Instruction(own, times, cycles, moved, multiplies, is_attention, steps)
                )

    (entry,) = (name for name, (is_entry, _) in bodies.items() if is_entry)
    walk(entry, 1, 1)
    return found
