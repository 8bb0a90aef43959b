"""How the kernels around attention walk over a model's sizes on a chip: one mechanism for all.

Each walks over tiles of tokens, and for each over chunks of its weights. These are held in VMEM, or
pass by, once for each tile. Of the walks that fit VMEM and compile in seconds the fastest is taken,
by an estimate that knows the core's matrix unit and its share of the HBM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from packscore_kernels.hardware import LANES, Core, cdiv, core
from packscore_kernels.layer.tiles import LiveTokens, one_tile

# Tokens of a tile, at most.
TILE_TOKENS = (1024, 768, 512, 384, 256)
# Of keys and values alone, as one layer has them: longer tiles are megabytes of code in a program,
# for 2 % of one layer.
KV_TOKENS = 256
# Tokens x bytes of weights of all products that a kernel's code has, which are unrolled: a kernel
# of this length compiles in 15 to 25 s.
LONGEST_PRODUCTS = 22_000_000_000
HEAD_DIM = LANES  # the width of a vector register, within which a head is turned
# Heads that one step multiplies, at most: all at once is one long piece of code, which the compiler
# schedules worse than several short ones.
HEADS = (8, 4, 2, 1)
# What a step takes beside its products: their ends, control flow, and memory's answer.
STEP_SECONDS = 0.5e-6
# Of the published bandwidth of the HBM, what others saw reached.
HBM_SHARE = 0.85
# Columns of gate and up that are multiplied between two gatings.
COLUMNS = 256
# Of the longest code, what the MLP's chunks may have beyond the narrowest: twice as long gains 2 %.
MLP_SHARE = 0.4
# Columns of the residual stream whose products with the down projection are made together.
DOWN_COLUMNS = 1024


class Walk(NamedTuple):
    """Over tiles of tokens, and for each over chunks of weights."""

    tokens: int  # of a tile
    chunk: int  # heads or columns that one step multiplies
    passes: bool  # chunks of weights pass by, once a tile; else VMEM holds all
    vmem_bytes: int = 0  # that the kernel takes


class Need(NamedTuple):
    """What a kernel takes with one walk."""

    vmem_bytes: int
    code: int  # tokens x bytes of weights of all products in its code
    steps: int  # of a tile
    first_bytes: int  # of weights, without which no step begins
    tile_bytes: int  # of weights that pass by, for each tile


class Work(NamedTuple):
    """What a kernel does with each token, whatever its walk."""

    weights: int  # that it is multiplied with
    row_bytes: int  # that are read and written


class QkvSteps(NamedTuple):
    """The steps of a tile of `project_qkv`: of q, of k, of v, and one that finishes v.

    `project_kv` has none of q.
    """

    q_heads: int  # that one step multiplies
    kv_heads: int
    q: int  # steps
    kv: int  # steps of k, and as many of v

    @classmethod
    def of(cls, num_q_heads: int, num_kv_heads: int, most: int) -> QkvSteps:
        """Steps of equally many heads, at most so many."""
        q, kv = largest_divisor(num_q_heads, most), largest_divisor(num_kv_heads, most)
        return cls(q, kv, num_q_heads // q if q else 0, num_kv_heads // kv)

    @property
    def per_tile(self) -> int:
        """Of a tile."""
        return self.q + 2 * self.kv + 1

    @property
    def heads_in_code(self) -> int:
        """Heads of all products in the code: it has first steps of q, k and v, and further ones."""
        return self.q_heads * min(self.q, 2) + 2 * self.kv_heads * min(self.kv, 2)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor that is not above `most`; of 0 it is 0."""
    return next((n for n in range(min(number, most), 0, -1) if number % n == 0), 0)


def suits(need: Need, own: Core, share: float = 1.0) -> bool:
    """Whether a kernel fits VMEM and compiles in seconds, with its share of the longest code."""
    return need.vmem_bytes <= own.vmem_bytes * 3 // 4 and need.code <= share * LONGEST_PRODUCTS


def seconds(walk: Walk, need: Need, work: Work, num_tokens: int, own: Core) -> float:
    """An estimate for all tiles: products or the HBM, steps, and the wait for the first weights."""
    tiles, bytes_per_s = cdiv(num_tokens, walk.tokens), HBM_SHARE * own.hbm_bytes_per_s
    products = 2 * tiles * walk.tokens * work.weights / own.flops
    moved = tiles * (walk.tokens * work.row_bytes + need.tile_bytes) / bytes_per_s
    first = need.first_bytes / bytes_per_s
    return first + max(products, moved) + STEP_SECONDS * tiles * need.steps


def best_walk(
    num_tokens: int,
    chunks: Iterable[tuple[int, bool]],
    need_of: Callable[[Walk], Need],
    work: Work,
    live: LiveTokens | None,
    share: Callable[[Walk], float] = lambda walk: 1.0,
    most_tokens: int = max(TILE_TOKENS),
) -> Walk | None:
    """The fastest walk, by `seconds`; None where no walk suits.

    Args:
      num_tokens: of all tiles.
      chunks: (heads or columns of a step, whether weights pass by).
      need_of: what a kernel takes that walks so.
      work: what it does.
      live: where the number of tiles is data, which none is evened for.
      share: of the longest code, that a walk may have.
      most_tokens: of a tile.
    """
    own = core()
    tiles = {one_tile(num_tokens, most, live) for most in TILE_TOKENS if most <= most_tokens}
    found = [
        (seconds(walk, need, work, num_tokens, own), -walk.tokens, walk, need)
        for walk in (Walk(tokens, *chunk) for tokens in tiles for chunk in chunks)
        if suits(need := need_of(walk), own, share(walk))
    ]
    if not found:
        return None
    *_, walk, need = min(found)
    return walk._replace(vmem_bytes=need.vmem_bytes)


def qkv_walk(
    heads: tuple[int, int],
    hidden_size: int,
    itemsize: int,
    num_tokens: int,
    live: LiveTokens | None = None,
) -> Walk | None:
    """How `project_qkv` walks over its (q, kv) heads: those of k and v are held, q's may pass by.

    Its chunks are heads of q; without those it is `project_kv`, whose chunks are heads of k and v.
    """
    head_bytes = HEAD_DIM * hidden_size * itemsize

    def need(walk: Walk) -> Need:
        steps = QkvSteps.of(*heads, walk.chunk)
        columns = HEAD_DIM * (steps.q_heads + 2 * steps.kv_heads)
        rows = (3 * hidden_size + 2 * columns + 4 * HEAD_DIM) * itemsize
        wide = 4 * HEAD_DIM * (max(steps.q_heads, steps.kv_heads) + 2)
        held = 2 * heads[1] + (walk.chunk if walk.passes else heads[0])
        return Need(
            (held + walk.passes * walk.chunk) * head_bytes + walk.tokens * (rows + wide),
            walk.tokens * steps.heads_in_code * head_bytes,
            steps.per_tile,
            held * head_bytes,
            walk.passes * heads[0] * head_bytes,
        )

    sizes = {largest_divisor(heads[0] or heads[1], most) for most in HEADS}
    chunks = [(n, passes) for n in sizes for passes in {False, n < heads[0]}]
    columns = HEAD_DIM * (heads[0] + 2 * heads[1])
    work = Work(hidden_size * columns, itemsize * (hidden_size + columns))
    most_tokens = max(TILE_TOKENS) if heads[0] else KV_TOKENS
    return best_walk(num_tokens, chunks, need, work, live, most_tokens=most_tokens)


def out_walk(
    num_q_heads: int,
    hidden_size: int,
    itemsize: int,
    num_tokens: int,
    live: LiveTokens | None = None,
) -> Walk | None:
    """How `project_out` walks over the columns that it writes, its chunks."""
    inner = HEAD_DIM * num_q_heads
    column_bytes = inner * itemsize

    def need(walk: Walk) -> Need:
        held = walk.chunk if walk.passes else hidden_size
        rows = (4 * walk.chunk + 3 * inner) * itemsize + 4 * walk.chunk
        return Need(
            (held + walk.passes * walk.chunk) * column_bytes + walk.tokens * rows,
            walk.tokens * walk.chunk * column_bytes,
            hidden_size // walk.chunk,
            held * column_bytes,
            walk.passes * hidden_size * column_bytes,
        )

    sizes = widths(hidden_size, LANES)
    chunks = [(n, passes) for n in sizes for passes in {False, n < hidden_size}]
    work = Work(hidden_size * inner, itemsize * (2 * hidden_size + inner))
    return best_walk(num_tokens, chunks, need, work, live)


def mlp_walk(
    hidden_size: int,
    intermediate_size: int,
    itemsize: int,
    num_tokens: int,
    live: LiveTokens | None = None,
) -> Walk | None:
    """How `gated_mlp` walks over the columns of gate and up, its chunks, which always pass by."""
    if hidden_size % LANES or intermediate_size % COLUMNS:
        return None
    column_bytes = 3 * hidden_size * itemsize

    def need(walk: Walk) -> Need:
        rows = (5 * hidden_size + walk.chunk) * itemsize
        wide = 4 * (hidden_size + min(hidden_size, DOWN_COLUMNS) + 4 * COLUMNS)
        return Need(
            2 * walk.chunk * column_bytes + walk.tokens * (rows + wide),
            2 * walk.tokens * walk.chunk * column_bytes,  # of a first chunk, and of others
            intermediate_size // walk.chunk,
            walk.chunk * column_bytes,
            intermediate_size * column_bytes,
        )

    chunks = [(n, True) for n in widths(intermediate_size, COLUMNS)]
    work = Work(3 * hidden_size * intermediate_size, 2 * itemsize * hidden_size)
    return best_walk(
        *(num_tokens, chunks, need, work, live),
        lambda walk: 1.0 if walk.chunk == COLUMNS else MLP_SHARE,
    )


def widths(columns: int, unit: int) -> list[int]:
    """All equal parts of so many columns that are whole units."""
    count = columns // unit
    return [columns // n for n in range(1, count + 1) if count % n == 0]
