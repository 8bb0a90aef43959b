"""Compile the kernels for a real TPU; one JSON object a line. A script, run per chip.

python compile_variants.py v6e [INDEX ...]       all variants, or those
python compile_variants.py picked INDEX [...]    cases of kernels/picked_tiles.py, all of one chip
"""

import functools
import json
import os
import sys
import time
from typing import NamedTuple

from picked_tiles import GRID

from packscore_kernels.hardware import CHIPS
from tpu_compiler.schedule import compile_for_tpu, configure


class Variant(NamedTuple):
    """A program of the attention kernel."""

    dtype: str
    head_dim: int
    num_q_heads: int
    num_kv_heads: int
    page_size: int  # 0 is without pages
    groups: int
    tiles: tuple[int, int, int, int] | None  # None is what the table or the heuristic picks
    num_tokens: int = 4096


# Every dtype, head size, GQA ratio and page size, one and many groups; tiles that users run, and
# small ones, which compile in a few seconds.
SMALL = (128, 256, 256, 2)
TINY = (128, 128, 128, 2)
VARIANTS = [
    Variant("bfloat16", 128, 4, 2, 128, 1, None),
    Variant("float32", 64, 1, 1, 16, 1, TINY),
    Variant("bfloat16", 64, 6, 2, 256, 8, SMALL),
    Variant("bfloat16", 256, 4, 1, 64, 1, TINY),
    Variant("float32", 128, 3, 1, 16, 8, TINY),
    Variant("bfloat16", 128, 10, 2, 32, 1, TINY),
    Variant("bfloat16", 64, 7, 1, 0, 8, TINY),
    Variant("float32", 256, 1, 1, 0, 8, TINY),
    Variant("bfloat16", 128, 8, 1, 0, 1, TINY),
]


def attention(variant, chip):
    import jax
    import numpy as np

    from packscore_kernels import (
        BlockSizes,
        SegmentLayout,
        build_schedule,
        resolve_block_sizes,
        segment_paged_attention,
    )

    dtype, head_dim, num_q_heads, num_kv_heads, page_size, groups, tiles, num_tokens = variant
    blocks = (
        BlockSizes(*tiles)
        if tiles
        else resolve_block_sizes(
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            num_tokens=num_tokens,
            page_size=page_size,
            chip=chip,
        )
    )
    schedule = build_schedule(
        SegmentLayout.single(100, np.full(min(50, num_tokens // 20 - 5), 20), num_tokens),
        block_sizes=blocks,
        page_size=page_size,
        max_groups=groups,
        max_pages=32 if page_size else 0,
    )

    def shape(*s):
        return jax.ShapeDtypeStruct(s, dtype)

    kv = shape(num_kv_heads, num_tokens, head_dim)
    pages = shape(64, num_kv_heads, 2, page_size, head_dim) if page_size else None
    args = [
        shape(num_q_heads, num_tokens, head_dim),
        kv,
        kv,
        pages,
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), schedule),
    ]

    def op(q, k, v, pages, schedule):
        return segment_paged_attention(
            q, k, v, pages, schedule, sm_scale=0.1, implementation="pallas"
        )

    compile_for_tpu(op, args)
    return str(blocks)


def page_writer(dtype, head_dim, page_size):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from packscore_kernels import SegmentLayout, build_page_writes, write_kv_pages

    layout = SegmentLayout.single(1000, [20], 2048)
    plan = build_page_writes(layout, [np.arange(64)], page_size=page_size, num_pages=64)
    kv = jax.ShapeDtypeStruct((2, 2048, head_dim), dtype)
    pool = jax.ShapeDtypeStruct((64, 2, 2, page_size, head_dim), dtype)

    def op(pool, k, v):
        return write_kv_pages(pool, k, v, jax.tree.map(jnp.asarray, plan), implementation="pallas")

    compile_for_tpu(op, [pool, kv, kv])


def passing(name, chip):
    """The kernels whose weights may pass by, with a walk in which they do; three heads a step."""
    import jax
    import jax.numpy as jnp

    from packscore_kernels.layer import projections
    from packscore_kernels.layer.walks import Walk

    num_tokens, hidden, heads, kv_heads, chunk = 512, 512, 6, 2, {"qkv": 3, "out": 256}[name]
    walk = Walk(256, chunk, True, 2**23)
    setattr(projections, f"{name}_walk", lambda *_: walk)

    def shape(*s, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(s, dtype)

    x, layer, norm = shape(num_tokens, hidden), shape(1, dtype=jnp.int32), shape(128)
    if name == "out":
        attended, weight = shape(heads, num_tokens, 128), shape(2, hidden, heads * 128)
        compile_for_tpu(projections.project_out_pallas, [attended, weight, x, layer])
        return
    weights = tuple(shape(2, n * 128, hidden) for n in (heads, kv_heads, kv_heads))
    rotary = (shape(num_tokens, 128),) * 2
    op = functools.partial(projections.project_qkv_pallas, eps=1e-6)
    compile_for_tpu(op, [x, shape(hidden), weights, (norm, norm), rotary, layer])


def vector_gather():
    """The access that crashed the kernel this project began with: a ref indexed with a vector."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl

    def kernel(index, table, out):
        out[...] = table[index[...], :]

    def op(index, table):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32))(
            index, table
        )

    index = jax.ShapeDtypeStruct((8,), jnp.int32)
    compile_for_tpu(op, [index, jax.ShapeDtypeStruct((64, 128), jnp.float32)])


def attempt(name, call, *args):
    start = time.time()
    try:
        result, error = call(*args), None
    except Exception as caught:  # whatever the compiler says is the result
        result, error = None, f"{type(caught).__name__}: {caught}"
    seconds = round(time.time() - start, 1)
    print(json.dumps({"name": name, "result": result, "error": error, "seconds": seconds}))
    sys.stdout.flush()


def picked(*indices):
    cases = [GRID[int(i)] for i in indices]
    (chip,) = {case.chip for case in cases}
    configure(CHIPS[chip].topology)
    for case in cases:
        heads = case.group_size, 1
        variant = Variant("bfloat16", case.head_dim, *heads, case.page_size, 1, None)
        attempt(str(case), attention, variant._replace(num_tokens=case.num_tokens), chip)


def main(chip, *indices):
    os.environ["TPU_STDERR_LOG_LEVEL"] = "3"
    if chip == "picked":
        picked(*indices)
        return
    configure(CHIPS[chip].topology)
    for i in map(int, indices or range(len(VARIANTS))):
        attempt(str(VARIANTS[i]), attention, VARIANTS[i], chip)
    for variant in (("float32", 64, 16), ("bfloat16", 128, 256), ("bfloat16", 256, 32)):
        attempt(f"page writer {variant}", page_writer, *variant)
    # of both one by default, each on some chips
    names = ("qkv", "out")
    for name in names if not indices else names[sorted(CHIPS).index(chip) % 2 :][:1]:
        attempt(f"{name}, its weights passing by", passing, name, chip)
    attempt("vector gather", vector_gather)


if __name__ == "__main__":
    main(*sys.argv[1:])
