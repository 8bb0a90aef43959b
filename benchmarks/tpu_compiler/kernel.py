"""Cycles of one layer of segment attention: the compiled kernel's pieces, by how often they run.

What reads jax is imported inside: the compiler's environment comes before it (`configure`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from packscore_kernels import Group, SegmentLayout
from packscore_kernels.hardware import CHIPS
from tpu_compiler.schedule import Region, compile_for_tpu, configure, find, regions
from workloads import HEAD_DIM, KV_HEADS, MODELS, REFERENCE

if TYPE_CHECKING:
    from packscore_kernels import BlockSizes, SegmentSchedule

# `redo`'s pieces that multiply matrices; they come after the usual ones.
REDO = ("redo_window", "redo_block")
# What follows `redo` clears rows of padding where it has more bundles.
CLEARING = 64


@dataclass(frozen=True)
class Job:
    """One layer's attention."""

    prefix_len: int = REFERENCE.prefix_len
    num_items: int = REFERENCE.num_items
    item_len: int = REFERENCE.item_len
    num_q_heads: int = MODELS["0.6B"]["heads"]
    num_kv_heads: int = KV_HEADS
    head_dim: int = HEAD_DIM
    dtype: str = "bfloat16"
    page_size: int = 128
    flow: str = "packed"  # or "extend"
    sm_scale: float = math.log(2)  # a model's programs hand over q scaled

    @property
    def group_size(self) -> int:
        """q heads a kv head."""
        return self.num_q_heads // self.num_kv_heads

    def layout(self) -> SegmentLayout:
        """Its tokens, padded to a multiple of 512."""
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
    write: int  # a tile's outputs, where no piece writes them
    load_block: int
    load_copy: int  # one page, or one block, in and waited for
    step: int  # once a q tile
    use: int  # once a use of a chunk
    load: int  # once a load of a chunk
    edge: int  # once a part of the rows that go through blocks under a mask
    dead: int  # a q tile of padding
    total: int
    spills: float


class _SortedRegions:
    """A compiled kernel's regions, sorted by what its code does in their order; sets of indices.

    The pieces with matrix work are found by their order. Of the rest before `redo`, what runs once
    a tile has depth 1 of loops, what runs once a use of a chunk 2, and loops within one 3.
    """

    def __init__(self, found: list[Region], blocks: BlockSizes) -> None:
        from packscore_kernels.attention.counts import pieces_of

        self.pieces = (*pieces_of(blocks), *REDO)
        self.regions = found
        self.matrix = [i for i, region in enumerate(found) if region.has("vmatmul")]
        if len(self.matrix) != len(self.pieces):
            raise RuntimeError(
                f"the kernel has {len(self.matrix)} pieces with matrix work, not {self.pieces}"
            )
        inner = {i for i, region in enumerate(found) if region.depth} - set(self.matrix)
        self._usual = {i for i in inner if i < self.piece("redo_window")}
        # `redo` ends with its own write; then come the clearing of padding rows and dead tiles
        ends = (i for i, region in enumerate(found) if region.has("vxpose"))
        redone = max(i for i in ends if i > self.piece("redo_block"))
        self._after = {i for i in inner if i > redone}

    def piece(self, name: str) -> int:
        """Which region a piece is."""
        return self.matrix[self.pieces.index(name)]

    def bundles(self, which: Iterable[int]) -> int:
        """Of some regions together."""
        return sum(self.regions[i].bundles for i in which)

    def longest(self, which: Iterable[int]) -> int:
        """Bundles of the longest of some, 0 where there are none."""
        return max((self.regions[i].bundles for i in which), default=0)

    def _where(self, among: Iterable[int], holds: Callable[[Region], bool]) -> set[int]:
        return {i for i in among if holds(self.regions[i])}

    @cached_property
    def write(self) -> int:
        """A tile's outputs by themselves."""
        of_tiles = self._where(self._usual, lambda region: region.depth == 1)
        return max(sorted(of_tiles), key=lambda i: self.regions[i].bundles)

    @cached_property
    def transposes(self) -> set[int]:
        """A loaded block into the form that the matrix unit takes."""
        return self._where(self._usual, lambda region: region.depth == 3 and region.has("vxpose"))

    @cached_property
    def copies(self) -> set[int]:
        """What a copy takes to start, or to be waited for."""
        found = self._where(self._usual, lambda region: region.depth >= 2 and region.has("dma"))
        return found - self.transposes

    @cached_property
    def waits(self) -> set[int]:
        """What waits for a copy."""
        return self._where(self._usual, lambda region: region.depth == 3 and "wait" in region.notes)

    @cached_property
    def small(self) -> set[int]:
        """What is left before `redo`: control flow and scalars."""
        return self._usual - {self.write} - self.transposes - self.copies - self.waits

    @cached_property
    def loading(self) -> set[int]:
        """What the first use of a chunk does alone: waits, transposes, starts the next load."""
        chunks = range(self.piece("window") + 1, self.piece("redo_window"))
        head = min(self._where(chunks, lambda region: region.depth == 2))
        starts = self._where(
            range(self.piece("redo_window")),
            lambda region: region.depth == 3 and region.has("dma.hbm_to_vmem"),
        )
        return self.small & set(range(head + 1, max(starts) + 1))

    @cached_property
    def edges(self) -> set[int]:
        """What stands before the blocks under a mask: which rows, and which mask."""
        pieces = self.piece("prefix_edge"), self.piece("own_edge")
        return self.small & {i - back for i in pieces for back in (1, 2)}

    @cached_property
    def uses(self) -> set[int]:
        """What every use of a chunk does."""
        of_uses = self._where(self.small, lambda region: region.depth == 2)
        return of_uses - self.loading - self.edges

    @cached_property
    def clearing(self) -> set[int]:
        """Zeros into rows of padding."""
        return self._where(self._after, lambda region: region.bundles > CLEARING)

    @cached_property
    def steps(self) -> set[int]:
        """What every tile does."""
        before = self._where(self.small, lambda region: region.depth == 1)
        return before | (self._after - self.clearing)


def read_costs(path: str, blocks: BlockSizes) -> Costs:
    """The costs of a kernel compiled with these tiles, from the file of its schedule."""
    found = _SortedRegions(list(regions(path)), blocks)
    pieces = {name: found.regions[found.piece(name)] for name in found.pieces}
    usual = [one for name, one in pieces.items() if not name.startswith("redo")]
    spilled = sum(one.bundles * one.use.get("SPILL", 0.0) for one in usual)
    return Costs(
        pieces={name: one.bundles for name, one in pieces.items()},
        matrix={name: one.bundles * one.matrix_use for name, one in pieces.items()},
        write=found.bundles([found.write]),
        load_block=found.bundles(found.transposes),
        load_copy=found.longest(found.copies) + found.longest(found.waits),
        step=found.bundles(found.steps),
        use=found.bundles(found.uses),
        load=found.bundles(found.loading),
        edge=found.bundles(found.edges),
        dead=found.longest(found.clearing),
        total=found.bundles(range(len(found.regions))),
        spills=spilled / sum(one.bundles for one in usual),
    )


def layer_cycles(
    job: Job, costs: Costs, schedule: SegmentSchedule, *, live_tiles_only: bool = False
) -> dict[str, float]:
    """Cycles of one layer: every piece as often as the work list runs it."""
    import jax.numpy as jnp

    from packscore_kernels.attention.counts import count_runs, moved_bytes

    runs = count_runs(schedule, live_tiles_only=live_tiles_only)
    per_head = sum(times * costs.pieces.get(name, 0) for name, times in runs.pieces.items())
    matrix = sum(times * costs.matrix.get(name, 0) for name, times in runs.pieces.items())
    per_head += runs.tiles * costs.step + runs.writes * costs.write
    per_head += runs.padding_tiles * (costs.dead + costs.step)
    per_head += runs.uses * costs.use + runs.masked_parts * costs.edge
    per_head += runs.loads * costs.load
    per_head += runs.copies * costs.load_copy + runs.loaded_blocks * costs.load_block
    moved = moved_bytes(
        schedule,
        runs,
        group_size=job.group_size,
        head_dim=job.head_dim,
        itemsize=jnp.dtype(job.dtype).itemsize,
    )
    return {
        "cycles": job.num_kv_heads * per_head,
        "matrix_use": matrix / per_head,
        "hbm_bytes": job.num_kv_heads * moved,
        "grid_steps": job.num_kv_heads * (runs.tiles + runs.padding_tiles),
    }


class Kernel:
    """The kernel compiled for a chip and a job's heads; its costs hold for any layout."""

    def __init__(self, job: Job, chip: str, sizes: tuple[int, ...] | None = None) -> None:
        self.job, self.chip = job, CHIPS[chip]
        self.dump = tempfile.mkdtemp(prefix=f"{chip}_")
        configure(self.chip.topology, self.dump)
        from packscore_kernels import BlockSizes

        self.block_sizes = BlockSizes(*sizes) if sizes else self._resolved_sizes()
        self._compile()
        (path,) = find(self.dump, "segment_paged_attention")
        self.costs = read_costs(path, self.block_sizes)

    def _resolved_sizes(self) -> BlockSizes:
        """Those that users get."""
        from packscore_kernels import resolve_block_sizes

        return resolve_block_sizes(
            num_q_heads=self.job.num_q_heads,
            num_kv_heads=self.job.num_kv_heads,
            head_dim=self.job.head_dim,
            dtype=self.job.dtype,
            num_tokens=self.job.layout().num_tokens,
            page_size=self.job.page_size,
            chip=self.chip.name,
        )

    def _compile(self) -> None:
        """The compiler leaves its schedule in the dump."""
        import jax

        from packscore_kernels import build_schedule, segment_paged_attention

        job, layout = self.job, self.job.layout()
        schedule = build_schedule(
            layout, block_sizes=self.block_sizes, page_size=job.page_size, max_pages=64
        )

        def shape(*sizes: int) -> Any:
            return jax.ShapeDtypeStruct(sizes, job.dtype)

        def op(q: Any, k: Any, v: Any, pages: Any, schedule: Any) -> Any:
            return segment_paged_attention(
                q, k, v, pages, schedule, sm_scale=job.sm_scale, implementation="pallas"
            )

        kv = shape(job.num_kv_heads, layout.num_tokens, job.head_dim)
        args = [
            shape(job.num_q_heads, layout.num_tokens, job.head_dim),
            kv,
            kv,
            shape(256, job.num_kv_heads, 2, job.page_size, job.head_dim),
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), schedule),
        ]
        compile_for_tpu(op, args)

    def cycles(self, job: Job) -> dict[str, float]:
        """Cycles, matrix use and bytes of one layer of a job with the same heads."""
        from packscore_kernels import build_schedule

        schedule = build_schedule(
            job.layout(), block_sizes=self.block_sizes, page_size=job.page_size
        )
        got = layer_cycles(job, self.costs, schedule)
        got["ms"] = got["cycles"] / self.chip.clock_hz * 1e3
        got["hbm_ms"] = got["hbm_bytes"] / self.chip.hbm_bytes_per_s * 1e3
        got["floor_cycles"] = job.floor_cycles(self.chip.name)
        got["share_of_floor"] = got["floor_cycles"] / got["cycles"]
        return got
