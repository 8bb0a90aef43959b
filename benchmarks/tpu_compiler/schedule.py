"""Read the real TPU compiler's schedule of a JAX function, on a machine without a TPU.

libtpu compiles ahead of time for a named topology ("v6e:1x1", "v5e:1x1", "tpu7x:1x1x1", ...) on any
x86-64 Linux host, and dumps the VLIW schedule of every HLO instruction. The core is in-order and
issues one bundle a cycle, so scheduled bundles x trip counts is the cycle count less DMA stalls.

    python benchmarks/tpu_compiler/schedule.py DUMP_DIR [NAME]    regions and their bundles

The schedule is read before the delay converter. The final bundles leave out the empty ones, because
the hardware interlocks on the matrix and transpose units: for q k' of 512x128x512 on v5e they are
460, while its four 128x128 arrays need 512 cycles; the schedule before says 722.

Everything read here is a prediction of the compiler's, not a measurement; `public_points.py` has
some of both.
"""

from __future__ import annotations

import functools
import glob
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

DELAY_SLOTS = 4
LINE = re.compile(r"^\s*(?:0x)?([0-9a-f]+)\s*([A-Z]{2})?:\s((?:>\s?)*)\s*\{")


def configure(topology: str, dump_dir: str | None = None) -> None:
    """Set the environment that libtpu reads when it loads. Call before anything imports jax."""
    if "jax" in sys.modules:
        raise RuntimeError("configure() must be called before jax is imported")
    kind, shape = topology.split(":")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # there is no TPU here to lock
        TPU_ACCELERATOR_TYPE=f"{kind}-{math.prod(map(int, shape.split('x')))}",
        TPU_WORKER_HOSTNAMES="localhost",
        JAX_PLATFORMS="cpu",
        TPU_TOPOLOGY_NAME=topology,
    )
    if dump_dir:
        os.makedirs(dump_dir, exist_ok=True)
        os.environ["LIBTPU_INIT_ARGS"] = os.environ.get("LIBTPU_INIT_ARGS", "") + (
            f" --xla_jf_dump_to={dump_dir} --xla_jf_dump_hlo_text=true"
            " --xla_jf_dump_llo_text=true --xla_jf_dump_llo_html=false"
            " --xla_jf_emit_annotations=true"
            # of some eighty schedules of each instruction those that are read
            " --xla_jf_dump_llo_pass_label_regex=(packed-bundles-post-ra|pre-delay)"
        )


def compile_for_tpu(fn: Callable[..., Any], args: Any, topology: str | None = None) -> Any:
    """Compile fn for one chip of the configured topology.

    Args:
      fn: the function.
      args: its arguments, as pytrees of ShapeDtypeStruct.
      topology: default: the configured one.
    """
    import jax

    with tracing_for(topology or os.environ["TPU_TOPOLOGY_NAME"]) as device:
        sharding = jax.sharding.SingleDeviceSharding(device)
        struct: Any = jax.ShapeDtypeStruct
        args = jax.tree.map(lambda a: struct(a.shape, a.dtype, sharding=sharding), args)
        return jax.jit(fn).lower(*args).compile()


@contextmanager
def tracing_for(topology: str) -> Iterator[Any]:
    """Within the block kernels are planned and traced for one device of a topology, which it has.

    Kernels ask the mesh what chip they are for; where there is none, they are planned for a v5e.
    """
    import jax
    from jax.experimental import topologies

    single = set(topology.split(":")[1].split("x")) == {"1"}
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds)
    device, *_ = found.devices
    with jax.sharding.use_abstract_mesh(jax.sharding.Mesh([device], ("x",)).abstract_mesh):
        yield device


@dataclass(frozen=True)
class Region:
    """A straight piece of the schedule: control flow can change at its ends only."""

    start: int
    end: int
    label: str
    depth: int  # of loops
    bundles: int
    use: dict[str, float]  # share of each unit's slots that are taken
    exits: list[int]
    notes: list[str]
    text: str

    def has(self, operation: str) -> bool:
        """Whether an operation occurs in it."""
        return operation in self.text

    @property
    def matrix_use(self) -> float:
        """Share of the matrix units' slots that are taken."""
        return self.use.get("MATMUL", self.use.get("MXU", 0.0))


def _bundles(path: str) -> list[tuple[int, str, int, str]]:
    out: list[tuple[int, str, int, str]] = []
    with open(path, errors="replace") as lines:
        for line in lines:
            m = LINE.match(line)
            if m:
                text = line[m.end() :].strip()
                out.append((int(m[1], 16), m[2] or "", m[3].count(">"), text))
            elif out:
                out[-1] = (*out[-1][:3], out[-1][3] + " " + line.strip())
    return out


def _utilization(path: str) -> tuple[dict[str, int], list[list[int]]]:
    with open(path) as file:
        head, rows = file.read().split("== UTILIZATION:")
    names, slots = head.strip().splitlines()[-2:]
    units = [n.strip().split(":")[-1] for n in names.split(",")]  # "VLOAD:FILL" counts as FILL
    taken = [[int(x) for x in row.split()] for row in rows.strip().splitlines()]
    return dict(zip(units, map(int, slots.split()), strict=True)), taken


def find(dump: str, name: str = "") -> list[str]:
    """The schedules of the HLO instructions whose name contains `name`."""
    files = glob.glob(os.path.join(dump, "*-packed-bundles-post-ra.txt"))
    other = re.compile(r"schedule-analysis|late-|-TLP-")
    return sorted(
        f for f in files if name in os.path.basename(f) and not other.search(os.path.basename(f))
    )


@functools.lru_cache(maxsize=1)  # what an instruction takes, and whether it multiplies
def regions(path: str) -> tuple[Region, ...]:
    """Cut the schedule where control flow can change: at labels and after branches."""
    return tuple(_cut(path))


def _cut(path: str) -> Iterator[Region]:
    b = _bundles(path)
    stem = glob.escape(re.sub(r"-\d+-[^/]*$", "", path))
    found = glob.glob(stem + "-*pre-delay_hlo-static-per-bundle-utilization.txt")
    slots, use = _utilization(found[0]) if found else ({}, [])
    cuts = {0, len(b)} | {i for i, x in enumerate(b) if x[1]}
    cuts |= {
        min(i + 1 + DELAY_SLOTS, len(b))
        for i, x in enumerate(b)
        if "sbr.rel" in x[3] or "sbr.ind" in x[3]
    }
    ordered = sorted(cuts)
    for s, e in itertools.pairwise(ordered):
        text = " ".join(x[3] for x in b[s:e])
        share = {
            unit: sum(row[k] for row in use[s:e]) / ((e - s) * n)
            for k, (unit, n) in enumerate(slots.items())
        }
        notes = sorted(set(re.findall(r"dma\.\w+_to_\w+", text)))
        notes += ["wait"] * ("dma.done.wait" in text)
        notes += [f"-> {int(t):#x}" for t in re.findall(r"target bundleno = (\d+)", text)]
        yield Region(
            start=b[s][0],
            end=b[e - 1][0],
            label=b[s][1],
            depth=max(x[2] for x in b[s:e]),
            bundles=e - s,
            use=share,
            exits=[int(x) for x in re.findall(r"(\d+) /\* loop exit test", text)],
            notes=notes,
            text=text,
        )


def outline(path: str, at_least: int = 1) -> None:
    """Print the regions of at least so many bundles."""
    found = list(regions(path))
    print(f"{os.path.basename(path)}: {sum(r.bundles for r in found)} bundles")
    for i, r in enumerate(found):
        if r.bundles >= at_least:
            use = "  ".join(f"{c} {x:.0%}" for c, x in r.use.items() if x > 0.02)
            more = "; ".join([f"loop exit at {x}" for x in r.exits] + r.notes)
            print(
                f"[{i:3}] {r.start:#7x}..{r.end:#7x} d{r.depth} {r.label:2} n={r.bundles:5}"
                f"  {use}  {more}"
            )


def pipelined_cycles(path: str, turns: int | None = None) -> int:
    """Cycles of an instruction with one pipeline loop.

    Args:
      path: of its schedule.
      turns: of the loop; None takes those of a static one, whose "loop exit at N" is N - 2 turns.
    """
    found = list(regions(path))
    if turns is None:
        turns = next((x - 2 for r in found for x in r.exits), 1)
    return sum(r.bundles * (turns if r.depth else 1) for r in found)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    for file in find(*sys.argv[1:]):
        outline(file)
