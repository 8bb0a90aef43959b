"""One row of the A/B tables, predicted: the whole program of one flow compiled for a chip.

    python benchmarks/ab_predict.py --chip v6e --mask segment --flow packed      one JSON object

Run by `ab_tables.py`, a process for each program, because libtpu reads its environment when it
loads. The program is the one that runs on a TPU; with `--mask dense` its layers call
`dense_attention` in place of the kernel, and everything else stays. Flows: `packed`, which leaves
the query in pages too where the mask is segment; `prefill`, the query alone, into pages; `extend`,
the items behind the query's pages.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from typing import Any

import program_cycles
import tpu_schedule
from kernel_cycles import TOPOLOGIES, Job, count, read_costs

# Only the schedules that are read, of some eighty that the compiler writes for each instruction.
ONLY_SCHEDULES = "--xla_jf_dump_llo_pass_label_regex=(packed-bundles-post-ra|pre-delay)"
QWEN3_0_6B = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def dense_attention(
    q: Any,  # [num_q_heads, num_tokens, head_dim]
    k: Any,  # [num_kv_heads, num_tokens, head_dim]
    v: Any,  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: Any,  # [num_pages, num_kv_heads, 2, page_size, head_dim], or None
    schedule: Any,
    *,
    sm_scale: float,
    implementation: str | None = None,
) -> Any:
    """What XLA makes of a dense mask, as cheap as it can be written: scores in the inputs' dtype.

    `implementation="dense"` of the op is float32 throughout, and keeps NaN where it belongs.

    Returns:
      [num_q_heads, num_tokens, head_dim]; padding rows hold numbers that nobody reads.
    """
    import jax
    import jax.numpy as jnp

    from packscore_kernels.segment_paged_attention.xla import dense_mask

    with jax.named_scope(program_cycles.DENSE_SCOPE):
        if kv_pages is not None:
            pool = kv_pages[jnp.asarray(schedule.page_indices)].transpose(2, 1, 0, 3, 4)
            pool = pool.reshape(2, k.shape[0], -1, k.shape[2])
            k, v = jnp.concatenate([pool[0], k], axis=1), jnp.concatenate([pool[1], v], axis=1)
        grouped = (q * sm_scale).astype(q.dtype).reshape(k.shape[0], -1, *q.shape[1:])
        scores = jnp.einsum("hgqd,hkd->hgqk", grouped, k)
        scores = jnp.where(dense_mask(schedule), scores, jnp.finfo(q.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(q.dtype)
        return jnp.einsum("hgqk,hkd->hgqd", weights, v).reshape(q.shape)


def layout_of(job: Job, flow: str) -> Any:
    """The packed tokens of one launch."""
    import numpy as np

    from packscore_kernels import Group, SegmentLayout

    items = np.full(job.num_items, job.item_len, np.int32)
    if flow == "extend":
        pages = np.arange(-(-job.prefix_len // job.page_size), dtype=np.int32)
        group = Group(0, items, job.prefix_len, pages)
    else:
        group = Group(job.prefix_len, items[:0] if flow == "prefill" else items)
    return SegmentLayout((group,), group.num_tokens)


def program_and_inputs(
    config: Any, job: Job, chip: str, mask: str, flow: str
) -> tuple[Any, tuple[Any, ...]]:
    """The program's key and its arguments beside the weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from packscore.kv_pages import page_bytes
    from packscore.paging import PAGE_SIZE, PREFIX_CACHE_BYTES, PagePool
    from packscore.program import block_sizes_for, program_inputs, program_key

    dtype = jnp.dtype(job.dtype)
    layout = layout_of(job, flow)
    has_pages = mask == "segment" or flow != "packed"
    num_pages = PREFIX_CACHE_BYTES // page_bytes(config, dtype, PAGE_SIZE) if has_pages else 0
    key = program_key(layout.num_tokens, len(layout.scored_rows), 2, False, num_pages)
    page_size = PAGE_SIZE if has_pages else 0
    blocks = block_sizes_for(config, dtype, key.num_tokens, chip, page_size=page_size)
    leases = []
    if has_pages and flow != "extend":
        leases = [PagePool(num_pages).acquire(np.arange(job.prefix_len))]
    ids = np.zeros(layout.num_tokens, np.int64)
    inputs = program_inputs(key, blocks, layout, ids, [0, 1], leases=leases)
    if not has_pages:
        return key, inputs
    if mask == "dense":
        # a table of just this query's pages: the mask has a column for every token of the table
        pages = inputs[2].page_indices[: -(-job.prefix_len // PAGE_SIZE)]
        inputs = (*inputs[:2], dataclasses.replace(inputs[2], page_indices=pages), *inputs[3:])
    shape = (config.num_hidden_layers * num_pages, job.num_kv_heads, 2, PAGE_SIZE, job.head_dim)
    return key, (jax.ShapeDtypeStruct(shape, dtype), *inputs)


def costs_of_kernels(job: Job, inputs: tuple[Any, ...], clock_hz: float, bandwidth: float) -> Any:
    """What (instruction, its schedule) of our two kernels takes: (cycles, bytes of HBM)."""
    from packscore_kernels import PageWrites, SegmentSchedule
    from packscore_kernels.segment_paged_attention.kernel import TURN

    (schedule,) = (x for x in inputs if isinstance(x, SegmentSchedule))
    writes = [x for x in inputs if isinstance(x, PageWrites)]

    def cost(name: str, path: str) -> tuple[float, float] | None:
        if name.startswith("segment_paged_attention"):
            got = count(job, read_costs(path), schedule, TURN)
            return got["cycles"], got["hbm_bytes"]
        if name.startswith("write_kv_pages"):
            # each page waits for its keys, values and old slots, and then for its way back
            pages = int(writes[0].count[0])
            once = sum(region.bundles for region in tpu_schedule.regions(path))
            token = 2 * 2 * job.num_kv_heads * job.head_dim
            moved = pages * token * (writes[0].page_size * 3 + 16)
            return pages * once + moved / bandwidth * clock_hz, moved
        return None

    return cost


def predict(chip: str, mask: str, flow: str, job: Job, dump: str) -> dict[str, Any]:
    """Compile one program for a chip and count it; a refusal of the compiler is a result."""
    os.environ["LIBTPU_INIT_ARGS"] = ONLY_SCHEDULES
    tpu_schedule.configure(TOPOLOGIES[chip], dump)
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from packscore import traced_ops
    from packscore.bridge import TracedModel
    from packscore.program import compile_program
    from packscore_kernels.hardware import CHIPS

    facts = CHIPS[chip]
    config = Qwen3Config(**QWEN3_0_6B)
    if mask == "dense":
        traced_ops.segment_paged_attention = dense_attention
    key, inputs = program_and_inputs(config, job, chip, mask, flow)
    (device, *_) = topologies.get_topology_desc(
        platform="tpu", topology_name=facts.topology, chips_per_host_bounds=(1, 1, 1)
    ).devices
    traced = TracedModel(Qwen3ForCausalLM, config)
    row = {"chip": chip, "mask": mask, "flow": flow, "bucket_tokens": key.num_tokens}
    start = time.perf_counter()
    try:
        weights = traced.weight_shapes(jnp.bfloat16)
        compiled = compile_program(traced, weights, key, inputs, device, "pallas")
    except jax.errors.JaxRuntimeError as error:
        return {**row, "refused": str(error).partition("\n\n")[0][:2000]}
    seconds = time.perf_counter() - start
    found = program_cycles.instructions(
        compiled.as_text(),
        tpu_schedule.find(dump),
        costs_of_kernels(job, inputs, facts.clock_hz, facts.hbm_bytes_per_s),
    )
    memory = compiled.memory_analysis()
    return {
        **row,
        **program_cycles.summary(found, facts.clock_hz, facts.hbm_bytes_per_s),
        "weight_bytes": sum(
            x.size * x.dtype.itemsize for x in jax.tree.leaves(traced.weight_shapes(jnp.bfloat16))
        ),
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "compile_seconds": round(seconds, 1),
    }


def main() -> None:
    """Predict and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", choices=sorted(TOPOLOGIES), default="v6e")
    parser.add_argument("--mask", choices=["segment", "dense"], default="segment")
    parser.add_argument("--flow", choices=["packed", "prefill", "extend"], default="packed")
    parser.add_argument("--prefix", type=int, default=2000)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--item-len", type=int, default=20)
    args = parser.parse_args()
    job = Job(prefix_len=args.prefix, num_items=args.items, item_len=args.item_len)
    with tempfile.TemporaryDirectory(prefix=f"ab_{args.chip}_") as dump:  # a gigabyte
        print(json.dumps(predict(args.chip, args.mask, args.flow, job, dump)))


if __name__ == "__main__":
    main()
