"""Cycles of our kernels in a compiled program, whose loops and guards its text does not tell.

Each is counted by what its own folder says of how often it runs which piece (`count_runs`,
`qkv_runs`, `mlp_runs`, `write_runs`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from packscore_kernels.hardware import Chip
from tpu_compiler.kernel import Job, layer_cycles, read_costs
from tpu_compiler.program import KERNEL
from tpu_compiler.schedule import pipelined_cycles, regions

if TYPE_CHECKING:
    from packscore_kernels import PageWrites, SegmentSchedule
    from packscore_kernels.layer.counts import MlpRuns

# A piece of a kernel's schedule of so many bundles stands behind a guard; what every step of a grid
# runs is shorter.
LONG_PIECE = 180

Cost = tuple[float, float | None]  # cycles, and bytes of HBM where the program's text has others


def steps_of(path: str) -> int:
    """Steps of a kernel's grid: its loop, the last one, is left at that many and two."""
    exits = [region.exits[0] for region in regions(path) if region.exits]
    return int(exits[-1]) - 2 if exits else 1


def guarded_cycles(path: str, live: int, steps: int) -> int:
    """Cycles of a kernel whose long pieces run `live` times, behind a guard."""
    found = [region.bundles for region in regions(path) if region.depth]
    long = sum(bundles for bundles in found if bundles >= LONG_PIECE)
    return live * long + steps * (sum(found) - long)


def mlp_cycles(path: str, runs: MlpRuns) -> int:
    """Cycles of the MLP's kernel.

    Its long pieces: the first chunk of a tile, the other ones, and what ends a tile.
    """
    cycles, times = 0, [runs.first, runs.others] if runs.others else [runs.first]
    for region in regions(path):
        if region.has("vmatmul"):
            cycles += region.bundles * times.pop(0)
        elif region.depth:
            cycles += region.bundles * (runs.first if region.bundles >= LONG_PIECE else runs.steps)
    return cycles


def costs_of_kernels(
    config: Any,
    job: Job,
    num_tokens: int,
    schedule: SegmentSchedule,
    writes: PageWrites | None,
    chip: Chip,
) -> Callable[[str, str], Cost | None]:
    """What (instruction, the file of its schedule) takes, None where it is none of our kernels.

    Args:
      config: of the model, in bfloat16.
      job: its attention.
      num_tokens: of the program.
      schedule: of the attention, as numpy arrays.
      writes: to the pages, as numpy arrays.
      chip: that runs it.
    """
    from packscore_kernels.layer.counts import mlp_runs, qkv_runs
    from packscore_kernels.layer.mlp import mlp_tiles
    from packscore_kernels.page_writes import write_runs

    hidden, width = config.hidden_size, config.intermediate_size
    head_bytes = 2 * hidden * job.head_dim  # of a head's weights

    def fetched(count: float) -> float:
        """Cycles for which the chip waits for so many bytes of HBM."""
        return count / chip.hbm_bytes_per_s * chip.clock_hz

    def attention(path: str) -> Cost:
        got = layer_cycles(job, read_costs(path, schedule.block_sizes), schedule)
        return got["cycles"], got["hbm_bytes"]

    def projections(path: str, num_q_heads: int = job.num_q_heads) -> Cost:
        runs = qkv_runs(steps_of(path), num_q_heads, job.num_kv_heads)
        weights = head_bytes * (num_q_heads + 2 * job.num_kv_heads)
        return guarded_cycles(path, runs.tiles, runs.steps) + fetched(weights), None

    def projection_back(path: str) -> Cost:
        return pipelined_cycles(path) + fetched(head_bytes * job.num_q_heads), None

    def mlp(path: str) -> Cost:
        chunk = mlp_tiles(num_tokens, hidden, width, 2).width
        runs = mlp_runs(steps_of(path), width // chunk)
        weights = 2 * 3 * hidden * width
        # the first chunk arrives before anything runs, the others beside the products; each tile of
        # tokens reads all weights
        first = fetched(weights * chunk / width)
        return max(mlp_cycles(path, runs), fetched(runs.first * weights)) + first, None

    def page_writer(path: str) -> Cost:
        # whole pages are copied together; each other one waits for its keys, values and old slots,
        # is merged, and waits for its way back
        runs = write_runs(writes)
        moved = 2 * 2 * job.num_kv_heads * job.head_dim * runs.moved_tokens
        cycles = guarded_cycles(path, runs.merged, runs.whole + runs.merged)
        return cycles + fetched(moved), moved

    kernels = {
        KERNEL: attention,
        "project_qkv": projections,
        "project_kv": functools.partial(projections, num_q_heads=0),
        "project_out": projection_back,
        "gated_mlp": mlp,
        "write_kv_pages": page_writer,
    }

    def cost(name: str, path: str) -> Cost | None:
        own = (of for kernel, of in kernels.items() if name.startswith(kernel))
        return next((of(path) for of in own), None)

    return cost
