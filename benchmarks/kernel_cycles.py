"""Cycles of one layer of segment attention, as the TPU compiler schedules them: a prediction.

    python benchmarks/kernel_cycles.py --chip v6e             the reference job, beside its floor
    python benchmarks/kernel_cycles.py --chip v6e --json      the same as one object
    python benchmarks/kernel_cycles.py --chip v6e --sweep     growth in items and in the prefix
    python benchmarks/kernel_cycles.py --chip v6e --splash    JAX splash attention, static mask

The reference job: 16 q heads, 8 kv heads, head_dim 128, bfloat16, a prefix of 2000 tokens and
500 items of 20. Two flows: `packed` computes the prefix's rows too; `extend` finds the prefix in
pages of 128. The kernel is compiled once; the schedule of each of its straight pieces is counted
as often as the layout's work list runs it. DMA that does not hide behind compute is not in the
cycles: the time that all bytes take at the HBM's bandwidth stands beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from typing import Any

import tpu_schedule

# The kernel's pieces that multiply matrices, in the order of its code; the last two are `redo`.
PIECES = (
    "first_turn", "narrow_window", "window", "turn", "tail", "rest_and_tail", "rest",
    "prefix_edge", "own_edge", "redo_window", "redo_block",
)  # fmt: skip


TOPOLOGIES = {  # before jax may be imported
    "v4": "v4:1x1x1",
    "v5e": "v5e:1x1",
    "v5p": "v5p:1x1x1",
    "v6e": "v6e:1x1",
    "tpu7x": "tpu7x:1x1x1",
}


@dataclass(frozen=True)
class Job:
    """One layer's attention."""

    prefix_len: int = 2000
    num_items: int = 500
    item_len: int = 20
    num_q_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    page_size: int = 128
    flow: str = "packed"  # or "extend"

    @property
    def group_size(self) -> int:
        """q heads a kv head."""
        return self.num_q_heads // self.num_kv_heads

    def layout(self) -> Any:
        """Its tokens, padded to a multiple of 512."""
        import numpy as np

        from packscore_kernels import Group, SegmentLayout

        items = np.full(self.num_items, self.item_len, np.int32)
        if self.flow == "packed":
            group = Group(self.prefix_len, items)
        else:
            pages = np.arange(math.ceil(self.prefix_len / self.page_size), dtype=np.int32)[::-1]
            group = Group(0, items, self.prefix_len, pages)
        return SegmentLayout((group,), max(math.ceil(group.num_tokens / 512), 1) * 512)

    def floor_cycles(self, chip: str) -> float:
        """Matrix-unit cycles of the visible pairs in the transposed layout, nothing else."""
        pairs = self.num_items * self.item_len * (self.prefix_len + (self.item_len + 1) / 2)
        if self.flow == "packed":
            pairs += self.prefix_len * (self.prefix_len + 1) / 2
        # A pass takes 8 rows by a square array: two of 256, or four of 128 that need twice as long.
        side, units, cycles = (256, 2, 4) if chip in ("v6e", "tpu7x") else (128, 4, 8)
        d, big = self.head_dim, 512
        scores = big / 8 * big / side * math.ceil(d / side) * cycles / units
        values = d / 8 * big / side * big / side * cycles / units
        return self.num_q_heads * pairs / big**2 * (scores + values)


@dataclass(frozen=True)
class Costs:
    """Bundles of the compiled kernel's pieces, and the matrix units' share in each."""

    pieces: dict[str, int]
    matrix: dict[str, float]  # bundles x share
    finish: int
    load_block: int
    load_copy: int  # one page, or one block, in and waited for
    step: int  # once a q tile
    use: int  # once a use of a chunk
    load: int  # once a load of a chunk
    edge: int  # once a use with blocks that need a mask of rows, twice for its two parts
    dead: int  # a q tile of padding
    total: int
    spills: float


def read_costs(path: str) -> Costs:
    """Sort the regions of a compiled kernel by what the kernel's code does in that order."""
    found = list(tpu_schedule.regions(path))
    at = [i for i, r in enumerate(found) if r.has("vmatmul")]
    if len(at) != len(PIECES):
        raise RuntimeError(f"the kernel has {len(at)} pieces with matrix work, not {len(PIECES)}")
    pieces = {name: found[i].bundles for name, i in zip(PIECES, at, strict=True)}
    matrix = {n: found[i].bundles * found[i].matrix_use for n, i in zip(PIECES, at, strict=True)}
    redo = at[PIECES.index("redo_window")]
    # redo ends with its own write; then come the clearing of padding rows and dead tiles.
    transposes = [i for i, r in enumerate(found) if i > at[-1] and r.has("vxpose")]
    before = [r for i, r in enumerate(found[:redo]) if i not in at and r.depth]
    after = [r for r in found[transposes[-1] + 1 :] if r.depth]
    finish = max((r for r in before if r.depth == 1), key=lambda r: r.bundles)
    loads = [r for r in before if r.depth == 3 and r.has("vxpose")]
    copies = [r for r in before if r not in loads and r.depth >= 2 and r.has("dma")]
    waits = [r for r in before if r.depth == 3 and r.notes and "wait" in r.notes]
    cleared = [r for r in after if r.bundles > 64]
    small = [r for r in before if r is not finish and r not in loads + copies + waits]
    # The first use of a chunk waits, transposes and starts the next load: once a load, not a use.
    starts = [i for i, r in enumerate(found[:redo]) if r.depth == 3 and r.has("dma.hbm_to_vmem")]
    head = next(i for i, r in enumerate(found) if r.depth == 2 and i > at[2])
    fresh = [found[i] for i in range(head + 1, starts[-1] + 1) if found[i] in small]
    edges = [found[i - j] for i in at[7:9] for j in (1, 2) if found[i - j] in small]
    per_use = [r for r in small if r.depth == 2 and r not in fresh + edges]
    spills = sum(found[i].bundles * found[i].use.get("SPILL", 0.0) for i in at[:-2])
    return Costs(
        pieces=pieces,
        matrix=matrix,
        finish=finish.bundles,
        load_block=sum(r.bundles for r in loads),
        load_copy=max((r.bundles for r in copies), default=0)
        + max((r.bundles for r in waits), default=0),
        step=sum(r.bundles for r in small if r.depth == 1)
        + sum(r.bundles for r in after if r not in cleared),
        use=sum(r.bundles for r in per_use),
        load=sum(r.bundles for r in fresh),
        edge=sum(r.bundles for r in edges),
        dead=max((r.bundles for r in cleared), default=0),
        total=sum(r.bundles for r in found),
        spills=spills / sum(found[i].bundles for i in at[:-2]),
    )


def edge_blocks(use: Any, tile_start: int, blocks: Any) -> int:
    """Parts of blocks that go through a mask of rows: `_edge` in the kernel."""
    from packscore_kernels.attention.schedule import edge_parts, window_start

    whole, total = use.last_full - use.first_full, 0
    if use.last_block - use.first_block - whole <= use.tail:
        return 0
    parts = edge_parts(blocks)
    for part in range(parts):
        first_row = tile_start + part * blocks.block_q // parts
        last_row = min(first_row + blocks.block_q // parts, use.last_row) - 1
        end = use.last_key
        if use.own or last_row < use.first_item_row:
            window = max(window_start(last_row), 0 if use.own else tile_start)
            end = min(window - use.base, end)
        last_block = min(-(-end // blocks.block_kv), use.last_block - use.tail)
        if last_row >= max(first_row, use.first_row) and end > use.first_key:
            total += max(last_block - use.first_block - whole, 0)
    return total


def count(job: Job, costs: Costs, schedule: Any, turn: int) -> dict[str, float]:
    """Cycles of one layer: every piece as often as the work list runs it."""
    import jax.numpy as jnp
    import numpy as np

    from packscore_kernels.attention.schedule import LOAD_FIELDS, USE_FIELDS, Load, Use

    blocks = schedule.block_sizes
    uses = [Use(*row) for row in np.reshape(schedule.uses, (-1, USE_FIELDS)).tolist()]
    loads = [Load(*row) for row in np.reshape(schedule.loads, (-1, LOAD_FIELDS)).tolist()]
    loads = loads[: int(schedule.counts[1])]
    times = dict.fromkeys(PIECES, 0)
    live = used = edged = 0
    for tile in range(schedule.num_q_tiles):
        mine = uses[schedule.use_starts[tile] : schedule.use_starts[tile + 1]]
        if tile * blocks.block_q >= schedule.counts[0]:
            continue
        live, used = live + 1, used + len(mine)
        first = mine[0] if mine else None
        fused = bool(
            first
            and schedule.narrow[tile]
            and not first.fresh
            and first.last_full - first.first_full >= turn
        )
        narrow = "narrow_window" if schedule.narrow[tile] else "window"
        times["first_turn" if fused else narrow] += 1
        for i, use in enumerate(mine):
            whole = use.last_full - use.first_full
            left = whole - (turn if fused and i == 0 else 0)
            times["turn"] += left // turn
            rest = left % turn
            if use.tail:
                times["rest_and_tail" if rest else "tail"] += 1
            elif rest:
                times["rest"] += 1
            edged += use.last_block - use.first_block - whole > use.tail
            edge = edge_blocks(use, tile * blocks.block_q, blocks)
            times["own_edge" if use.own else "prefix_edge"] += edge
    if turn != 2:
        raise ValueError("the pieces are named for turns of two blocks")
    per_head = sum(times[name] * costs.pieces[name] for name in PIECES)
    matrix = sum(times[name] * costs.matrix[name] for name in PIECES)
    per_head += live * (costs.finish + costs.step) + used * costs.use
    per_head += len(loads) * costs.load + 2 * edged * costs.edge
    per_head += (schedule.num_q_tiles - live) * (costs.dead + costs.step)
    copies = sum(load.num_pages if load.paged else 2 * load.num_blocks for load in loads)
    chunk_blocks = sum(load.num_blocks for load in loads)
    per_head += copies * costs.load_copy + chunk_blocks * costs.load_block
    item = jnp.dtype(job.dtype).itemsize
    tokens = schedule.num_q_tiles * blocks.block_q
    lanes = job.head_dim * item
    moved = 2 * job.group_size * tokens * lanes
    moved += 2 * (tokens + 128 * schedule.num_q_tiles) * lanes
    moved += 2 * chunk_blocks * blocks.block_kv * lanes
    return {
        "cycles": job.num_kv_heads * per_head,
        "matrix_use": matrix / per_head,
        "hbm_bytes": job.num_kv_heads * moved,
    }


class Kernel:
    """The kernel compiled for a chip and a job's heads; its costs hold for any layout."""

    def __init__(self, job: Job, chip: str, sizes: tuple[int, ...] | None = None) -> None:
        self.dump = tempfile.mkdtemp(prefix=f"{chip}_")
        tpu_schedule.configure(TOPOLOGIES[chip], self.dump)
        import jax

        from packscore_kernels.hardware import CHIPS

        self.job, self.chip = job, CHIPS[chip]

        from packscore_kernels import (
            BlockSizes,
            build_schedule,
            resolve_block_sizes,
            segment_paged_attention,
        )

        layout = job.layout()
        self.block_sizes = (
            BlockSizes(*sizes)
            if sizes
            else resolve_block_sizes(
                num_q_heads=job.num_q_heads,
                num_kv_heads=job.num_kv_heads,
                head_dim=job.head_dim,
                dtype=job.dtype,
                num_tokens=layout.num_tokens,
                page_size=job.page_size,
                chip=chip,
            )
        )
        schedule = build_schedule(
            layout, block_sizes=self.block_sizes, page_size=job.page_size, max_pages=64
        )
        shape = lambda *s: jax.ShapeDtypeStruct(s, job.dtype)  # noqa: E731
        kv = shape(job.num_kv_heads, layout.num_tokens, job.head_dim)
        args = [
            shape(job.num_q_heads, layout.num_tokens, job.head_dim),
            kv,
            kv,
            shape(256, job.num_kv_heads, 2, job.page_size, job.head_dim),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), schedule),
        ]

        def op(q: Any, k: Any, v: Any, pages: Any, schedule: Any) -> Any:
            return segment_paged_attention(
                q, k, v, pages, schedule, sm_scale=job.head_dim**-0.5, implementation="pallas"
            )

        tpu_schedule.compile_for_tpu(op, args)
        (path,) = tpu_schedule.find(self.dump, "segment_paged_attention")
        self.costs = read_costs(path)

    def cycles(self, job: Job) -> dict[str, float]:
        """Cycles, matrix use and bytes of one layer of a job with the same heads."""
        from packscore_kernels import build_schedule
        from packscore_kernels.attention.kernel import TURN

        schedule = build_schedule(
            job.layout(), block_sizes=self.block_sizes, page_size=job.page_size
        )
        got = count(job, self.costs, schedule, TURN)
        got["ms"] = got["cycles"] / self.chip.clock_hz * 1e3
        got["hbm_ms"] = got["hbm_bytes"] / self.chip.hbm_bytes_per_s * 1e3
        got["floor_cycles"] = job.floor_cycles(self.chip.name)
        got["share_of_floor"] = got["floor_cycles"] / got["cycles"]
        return got


def line_error(x: list[int], y: list[float]) -> float:
    """Largest relative distance of the points from the line that is nearest in that sense."""
    import numpy as np

    a = np.stack([np.ones(len(x)), np.asarray(x, float)], axis=1) / np.asarray(y)[:, None]
    fit, *_ = np.linalg.lstsq(a, np.ones(len(x)), rcond=None)
    return float(np.abs(a @ fit - 1).max())


def sweep(kernel: Kernel) -> dict[str, Any]:
    """How cycles grow with items and, in the extend flow, with the prefix."""
    import dataclasses

    out: dict[str, Any] = {}
    items, prefixes = [100, 200, 500, 1000, 2000, 4000], [0, 1024, 2048, 3072, 4096, 6144, 8192]
    for name, field, values in (
        ("items", "num_items", items),
        ("prefix", "prefix_len", prefixes),
    ):
        jobs = [
            dataclasses.replace(kernel.job, flow="extend", **{field: value}) for value in values
        ]
        cycles = [kernel.cycles(job)["cycles"] for job in jobs]
        out[name] = {"values": values, "cycles": cycles, "line_error": line_error(values, cycles)}
    return out


def main() -> None:
    """Print the reference job's cycles."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", default="v6e", choices=["v4", "v5e", "v5p", "v6e", "tpu7x"])
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--sweep", action="store_true", help="growth in items and in the prefix")
    parser.add_argument("--splash", action="store_true", help="JAX splash attention instead")
    parser.add_argument("--block-sizes", help="block_q,block_kv,chunk_kv,num_slots")
    parser.add_argument("--heads", type=int, nargs=2, default=(16, 8), help="q heads, kv heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    args = parser.parse_args()
    job = Job(
        num_q_heads=args.heads[0],
        num_kv_heads=args.heads[1],
        head_dim=args.head_dim,
        dtype=args.dtype,
    )
    if args.splash:
        import splash_cycles

        got = splash_cycles.measure(job, TOPOLOGIES[args.chip])
        print(json.dumps(got) if args.json else f"splash, {args.chip}: {got}")
        return
    sizes = None
    if args.block_sizes:
        sizes = tuple(map(int, args.block_sizes.split(",")))
    kernel = Kernel(job, args.chip, sizes)
    import dataclasses

    flows = {
        flow: kernel.cycles(dataclasses.replace(job, flow=flow)) for flow in ("packed", "extend")
    }
    out: dict[str, Any] = {
        "chip": args.chip,
        "kind": "predicted by the compiler's schedule",
        "cycles": flows["packed"]["cycles"],
        "block_sizes": dataclasses.asdict(kernel.block_sizes),
        "bundles": kernel.costs.total,
        "spill_share": kernel.costs.spills,
        "flows": flows,
    }
    if args.sweep:
        out["sweep"] = sweep(kernel)
    if args.json:
        print(json.dumps(out))
        return
    print(f"one layer of the reference job on {args.chip}, predicted; {kernel.block_sizes}")
    for flow, got in flows.items():
        print(
            f"  {flow:7} {got['cycles'] / 1e6:.3f} M cycles, {got['ms']:.3f} ms; matrix unit"
            f" {got['matrix_use']:.0%}; HBM {got['hbm_bytes'] / 1e6:.0f} MB,"
            f" {got['hbm_ms']:.3f} ms; floor {got['floor_cycles'] / 1e6:.3f} M"
        )
    print(f"  {kernel.costs}")
    for name, got in out.get("sweep", {}).items():
        points = ", ".join(
            f"{v}: {c / 1e6:.3f} M" for v, c in zip(got["values"], got["cycles"], strict=True)
        )
        print(f"  {name}: {points}; at most {got['line_error']:.1%} from a line")


if __name__ == "__main__":
    main()
