"""Cycles of our kernels in a compiled program, whose loops and guards its text does not tell.

Each is counted by what its own folder says of how often it runs which piece (`count_runs`,
`qkv_runs`, `mlp_runs`, `write_runs`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from packscore_kernels.hardware import Chip, cdiv
from tpu_compiler.kernel import Job, layer_cycles, read_costs
from tpu_compiler.program import KERNEL, Cost
from tpu_compiler.schedule import pipelined_cycles, regions, tracing_for

if TYPE_CHECKING:
    from packscore.programs.launch_inputs import LaunchInputs
    from packscore.programs.sizes import ProgramKey
    from packscore_kernels.layer.counts import MlpRuns, QkvRuns
    from packscore_kernels.layer.walks import Walk
    from packscore_kernels.row_attention.counts import RowRuns

# A piece of a kernel's schedule of so many bundles stands behind a guard; what every step of a grid
# runs is shorter.
LONG_PIECE = 180


def steps_of(path: str) -> int:
    """Steps of a static grid: its loop, the last one, is left at that many and two."""
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


def row_cycles(path: str, runs: RowRuns, num_kv_heads: int) -> int:
    """Cycles of the attention of rows.

    Its pieces that multiply, under a mask before whole; those that turn arrays: what takes a block
    of each kind, and what ends; and what begins, once.
    """
    products = [sum(kind[i] for kind in (runs.packed, runs.cached)) for i in (1, 2)]
    turned = [runs.packed.blocks, runs.cached.blocks, runs.parts * num_kv_heads]
    cycles = 0
    for region in (region for region in regions(path) if region.depth):
        if region.has("vmatmul"):
            cycles += region.bundles * products.pop(0)
        elif region.bundles < LONG_PIECE or any("dma" in note for note in region.notes):
            cycles += region.bundles * runs.steps
        else:
            cycles += region.bundles * (turned.pop(0) if region.use.get("XLU") else 1)
    return cycles


def qkv_cycles(path: str, runs: QkvRuns) -> int:
    """Cycles of the projections: their products, and what ends a tile."""
    cycles, times = 0, list(runs.products)
    for region in regions(path):
        if region.has("vmatmul"):
            cycles += region.bundles * times.pop(0)
        elif region.depth:
            cycles += region.bundles * (runs.tiles if region.bundles >= LONG_PIECE else runs.steps)
    return cycles


def costs_of_kernels(
    config: Any,
    job: Job,
    key: ProgramKey,
    inputs: LaunchInputs,
    chip: Chip,
) -> Callable[[str, str], Cost | None]:
    """What (instruction, the file of its schedule) takes, None where it is none of our kernels.

    Args:
      config: of the model, in bfloat16.
      job: its attention.
      key: of the program.
      inputs: of the launch, as numpy arrays.
      chip: that runs it.
    """
    from packscore.programs.head import rows_step
    from packscore_kernels.layer.counts import mlp_runs, qkv_runs
    from packscore_kernels.layer.tiles import LiveTokens
    from packscore_kernels.layer.walks import QkvSteps, mlp_walk, out_walk, qkv_walk
    from packscore_kernels.page_writes import write_runs
    from packscore_kernels.row_attention.blocks import BLOCK_KEYS
    from packscore_kernels.row_attention.counts import row_runs

    hidden, width = config.hidden_size, config.intermediate_size
    num_tokens, schedule = key.num_tokens, inputs.schedule
    count = int(schedule.counts[0])
    live = LiveTokens(count, key.tile) if key.tile else None

    def walked(walk: Walk | None) -> tuple[Walk, int]:
        """A kernel's walk, and its tiles of the tokens that run."""
        if walk is None:
            raise ValueError("a program has a kernel that takes none of the model's sizes")
        return walk, cdiv(count if key.tile else num_tokens, walk.tokens)

    head_bytes = 2 * hidden * job.head_dim  # of a head's weights

    def fetched(count: float) -> float:
        """Cycles for which the chip waits for so many bytes of HBM."""
        return count / chip.hbm_bytes_per_s * chip.clock_hz

    def moved(walk: Walk, tiles: int, columns: int, weights: int, passing: int) -> float:
        """Bytes of a kernel's rows, of its weights, and of those of them that pass by again."""
        return 2 * tiles * walk.tokens * columns + weights + (tiles - 1) * passing

    def attention(path: str) -> Cost:
        costs = read_costs(path, schedule.block_sizes)
        got = layer_cycles(job, costs, schedule, live_tiles_only=bool(key.tile))
        return Cost(got["cycles"], got["hbm_bytes"], int(got["grid_steps"]))

    def projections(path: str, num_q_heads: int = job.num_q_heads) -> Cost:
        heads = num_q_heads, job.num_kv_heads
        walk, tiles = walked(qkv_walk(heads, hidden, 2, num_tokens, live))
        steps = QkvSteps.of(*heads, walk.chunk)
        runs = qkv_runs(tiles * steps.per_tile, steps)
        own, others = head_bytes * num_q_heads, 2 * head_bytes * job.num_kv_heads
        # what is held, and the first chunk of what passes by, arrive before anything runs
        first = fetched(others + (head_bytes * walk.chunk if walk.passes else own))
        columns = hidden + job.head_dim * (num_q_heads + 2 * job.num_kv_heads)
        bytes_ = moved(walk, tiles, columns, own + others, own if walk.passes else 0)
        return Cost(qkv_cycles(path, runs) + first, bytes_, runs.steps)

    def projection_back(path: str) -> Cost:
        walk, tiles = walked(out_walk(job.num_q_heads, hidden, 2, num_tokens, live))
        steps, weights = tiles * (hidden // walk.chunk), head_bytes * job.num_q_heads
        first = fetched(weights * walk.chunk / hidden if walk.passes else weights)
        columns = 2 * hidden + job.head_dim * job.num_q_heads
        bytes_ = moved(walk, tiles, columns, weights, weights if walk.passes else 0)
        return Cost(pipelined_cycles(path, steps) + first, bytes_, steps)

    def mlp(path: str) -> Cost:
        walk, tiles = walked(mlp_walk(hidden, width, 2, num_tokens, live))
        runs = mlp_runs(tiles * (width // walk.chunk), width // walk.chunk)
        weights = 2 * 3 * hidden * width
        # the first chunk arrives before anything runs, the others beside the products
        first = fetched(weights * walk.chunk / width)
        bytes_ = moved(walk, tiles, 2 * hidden, weights, weights)
        return Cost(mlp_cycles(path, runs) + first, bytes_, runs.steps)

    def page_writer(path: str) -> Cost:
        # whole pages are copied together; each other one waits for its keys, values and old slots,
        # is merged, and waits for its way back
        runs = write_runs(inputs.page_writes)
        bytes_ = 2 * 2 * job.num_kv_heads * job.head_dim * runs.moved_tokens
        cycles = guarded_cycles(path, runs.merged, runs.whole + runs.merged)
        return Cost(cycles + fetched(bytes_), bytes_, 1)

    def rows_read(path: str) -> Cost:
        rows = inputs.rows[: rows_step(len(inputs.rows))]
        group = job.num_q_heads // job.num_kv_heads
        runs = row_runs(schedule, rows, group, has_pages=bool(key.num_pages))
        blocks = runs.packed.blocks + runs.cached.blocks
        bytes_ = 2 * job.head_dim * 2 * (job.num_kv_heads * blocks * BLOCK_KEYS)
        return Cost(row_cycles(path, runs, job.num_kv_heads), bytes_, runs.steps)

    kernels = {
        KERNEL: attention,
        "project_qkv": projections,
        "project_kv": functools.partial(projections, num_q_heads=0),
        "project_out": projection_back,
        "gated_mlp": mlp,
        "write_kv_pages": page_writer,
        "row_attention": rows_read,
    }

    def cost(name: str, path: str) -> Cost | None:
        own = (of for kernel, of in kernels.items() if name.startswith(kernel))
        with tracing_for(chip.topology):
            return next((of(path) for of in own), None)

    return cost
