"""What JAX's splash attention takes for the same job, with the mask known at compile time."""

from __future__ import annotations

import tempfile
from typing import Any

from packscore_kernels.hardware import CHIPS
from tpu_compiler.kernel import Job
from tpu_compiler.schedule import compile_for_tpu, configure, find, regions

BLOCK, COMPUTE = 1024, 512  # the best of 17 choices on v6e


def measure(job: Job, chip: str) -> dict[str, Any]:
    """Predicted cycles of one layer of a packed job; splash takes one kv head a q head."""
    dump = tempfile.mkdtemp(prefix="splash_")
    configure(CHIPS[chip].topology, dump)
    import jax
    import numpy as np
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    layout = job.layout()
    tokens = -(-layout.num_tokens // BLOCK) * BLOCK
    segment = np.full(tokens, -1)
    segment[: layout.num_tokens] = layout.segment_ids
    mask = (segment[None] == segment[:, None]) | ((segment[None] == 0) & (segment[:, None] >= 0))
    mask &= np.tri(tokens, dtype=bool)
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask(
            [splash_attention_mask.NumpyMask(mask)] * job.num_q_heads
        ),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=BLOCK, block_kv=BLOCK, block_kv_compute=COMPUTE
        ),
    )
    x = jax.ShapeDtypeStruct((job.num_q_heads, tokens, job.head_dim), job.dtype)
    compile_for_tpu(lambda q, k, v: kernel(q, k, v), [x, x, x])
    (path,) = find(dump, "splash")
    size = tokens // BLOCK
    live = mask.reshape(size, BLOCK, size, BLOCK).any((1, 3))
    grid = size * int(live.sum(1).max())
    found = [r for r in regions(path) if r.depth]
    body = [r for r in found if r.has("vmatmul")]
    # Clearing the state, and dividing by the sums: once a q tile.
    ends = [r for r in found if r not in body and r.bundles > 100 and not r.has("dma")]
    every = [r for r in found if r not in body + ends]
    count = lambda regions: sum(r.bundles for r in regions)  # noqa: E731
    per_head = int(live.sum()) * count(body) + size * count(ends) + grid * count(every)
    return {
        "kernel": "JAX splash attention, static mask",
        "cycles": job.num_q_heads * per_head,
        "block": BLOCK,
        "block_kv_compute": COMPUTE,
    }
