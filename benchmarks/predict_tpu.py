"""What one request takes on a TPU, as the compiler schedules the whole program: a prediction.

    python benchmarks/predict_tpu.py --chip v6e            Qwen3-0.6B, query 2 000, 500 items x 20
    python benchmarks/predict_tpu.py --chip v5e --json     one object
    python benchmarks/predict_tpu.py --chip v6e --mask dense --flow extend

The program is the one that runs on a TPU, compiled without one; `tpu_compiler/program.py` says how
it is counted, attention piece by piece as in `kernel_cycles.py`. With `--mask dense` its layers
call `dense_attention` in place of the kernel, and everything else stays. Flows: `packed`, which
leaves the query in pages too where the mask is segment; `prefill`, the query alone, into pages;
`extend`, the items behind the query's pages.

Assumptions: one bundle issues a cycle; an instruction takes its cycles or the time of its bytes at
the HBM's bandwidth, whichever is longer; page writes take both, and so do the weights that a kernel
fetches before its first product; copies that the compiler starts early hide; the clock is the
chip's published one; the host's work overlaps the device's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from packscore_kernels import Group, SegmentLayout
from packscore_kernels.hardware import CHIPS, KNOWN_ERROR, Chip, cdiv
from tpu_compiler import program
from tpu_compiler.kernel import Job
from tpu_compiler.our_kernels import costs_of_kernels
from tpu_compiler.schedule import configure, find
from workloads import HEAD_DIM, KV_HEADS, MODELS, add_request_arguments, config_of


def dense_attention(
    q: Any,  # [num_q_heads, num_tokens, head_dim]
    k: Any,  # [num_kv_heads, num_tokens, head_dim]
    v: Any,  # [num_kv_heads, num_tokens, head_dim]
    kv_pages: Any,  # [num_pages, num_kv_heads, 2, page_size, head_dim], or None
    schedule: Any,
    *,
    sm_scale: float,
    num_pages: int | None = None,
    **_: Any,  # what the kernel takes besides
) -> Any:
    """What XLA makes of a dense mask, as cheap as it can be written: scores in the inputs' dtype.

    `implementation="dense"` of the op is float32 throughout, and keeps NaN where it belongs. The
    mask has a column for every token of the page table, or of its first `num_pages`.

    Returns:
      [num_q_heads, num_tokens, head_dim]; padding rows hold numbers that nobody reads.
    """
    import jax
    import jax.numpy as jnp

    from packscore_kernels.attention.xla import dense_mask

    if num_pages is not None:
        schedule = replace(schedule, page_indices=schedule.page_indices[:num_pages])
    with jax.named_scope(program.DENSE_SCOPE):
        if kv_pages is not None:
            pool = kv_pages[jnp.asarray(schedule.page_indices)].transpose(2, 1, 0, 3, 4)
            pool = pool.reshape(2, k.shape[0], -1, k.shape[2])
            k, v = jnp.concatenate([pool[0], k], axis=1), jnp.concatenate([pool[1], v], axis=1)
        grouped = (q * sm_scale).astype(q.dtype).reshape(k.shape[0], -1, *q.shape[1:])
        scores = jnp.einsum("hgqd,hkd->hgqk", grouped, k)
        scores = jnp.where(dense_mask(schedule), scores, jnp.finfo(q.dtype).min)
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(q.dtype)
        return jnp.einsum("hgqk,hkd->hgqd", weights, v).reshape(q.shape)


def layout_of(job: Job, flow: str) -> SegmentLayout:
    """The packed tokens of one launch."""
    items = np.full(job.num_items, job.item_len, np.int32)
    if flow == "extend":
        pages = np.arange(-(-job.prefix_len // job.page_size), dtype=np.int32)
        group = Group(0, items, job.prefix_len, pages)
    else:
        group = Group(job.prefix_len, items[:0] if flow == "prefill" else items)
    return SegmentLayout((group,), group.num_tokens)


def floor_ms(shape: dict[str, Any], job: Job, peak_flops: float) -> float:
    """The arithmetic alone, at the chip's published peak."""
    tokens = job.prefix_len + job.num_items * job.item_len
    heads = shape["heads"] * HEAD_DIM
    weights = shape["hidden"] * (2 * heads + 2 * KV_HEADS * HEAD_DIM + 3 * shape["intermediate"])
    own = job.prefix_len**2 / 2 + job.num_items * (
        job.item_len**2 / 2 + job.item_len * job.prefix_len
    )
    flops = shape["layers"] * (2 * tokens * weights + 4 * own * heads)
    return 1e3 * flops / peak_flops


def counted_instructions(
    ahead: Any,
    config: Any,
    job: Job,
    dump: str,
    chip: Chip,
    all_layers: int = 0,
) -> list[program.Instruction]:
    """What a program compiled ahead of time takes, instruction by instruction.

    Args:
      ahead: the program, an `AheadOfTime`.
      config: of its model.
      job: of its attention.
      dump: the folder that the compiler left its schedules in.
      chip: that runs it.
      all_layers: of the model, where the program has a few that stand for them.
    """
    from packscore.programs.head import HEAD_STEP, rows_step

    count = int(ahead.inputs.num_rows)

    def turns_of(line: str) -> int:
        """Of the loops over rows that are read, and over the vocabulary, which nobody asked for."""
        if "label_head" in line:
            return 0
        return cdiv(
            count, HEAD_STEP if "read_rows/while/body" in line else rows_step(ahead.key.num_rows)
        )

    return program.instructions(
        ahead.compiled.as_text(),
        find(dump),
        costs_of_kernels(config, job, ahead.key, ahead.inputs, chip),
        turns_of,
        config.num_hidden_layers,
        all_layers,
    )


def predict(
    chip: str, model: str, job: Job, dump: str, mask: str = "segment", flow: str = "packed"
) -> dict[str, Any]:
    """Compile one program for a chip and count it; a refusal of the compiler is a result."""
    facts = CHIPS[chip]
    configure(facts.topology, dump)
    import jax

    from packscore.flows.page_pool import PAGE_SIZE, PREFIX_CACHE_BYTES, PagePool
    from packscore.model.sizes import ModelSizes
    from packscore.programs import traced_ops
    from packscore.programs.ahead import compile_ahead
    from packscore.programs.pages import pages_within
    from packscore.programs.sizes import computed_tokens, token_bucket

    config, layout, leases = config_of(model), layout_of(job, flow), []
    cache_bytes = PREFIX_CACHE_BYTES if mask == "segment" or flow != "packed" else 0
    if cache_bytes and flow != "extend":
        pool = PagePool(pages_within(ModelSizes.of(config), job.dtype, cache_bytes))
        leases = [pool.acquire(np.arange(job.prefix_len))]
    if mask == "dense":
        # of the table just this query's pages
        pages = cdiv(job.prefix_len, PAGE_SIZE)
        traced_ops.segment_paged_attention = partial(dense_attention, num_pages=pages)
    row: dict[str, Any] = {
        "chip": chip,
        "model": model,
        "mask": mask,
        "flow": flow,
        **{name: getattr(job, name) for name in ("prefix_len", "num_items", "item_len")},
        "num_tokens": token_bucket(layout.num_tokens),
        "predicted": True,
        "known_error": KNOWN_ERROR,
    }
    try:
        ahead = compile_ahead(
            *(config, layout),
            chip=chip,
            prefix_cache_bytes=cache_bytes,
            leases=leases,
            mask_impl="dense" if mask == "dense" else "segment",
        )
    except jax.errors.JaxRuntimeError as error:
        return {**row, "refused": str(error).partition("\n\n")[0][:2000]}
    found = counted_instructions(ahead, config, job, dump, facts)
    row["num_tokens"] = computed_tokens(layout.num_tokens, by_tiles=bool(ahead.key.tile))
    counted = program.summary(found, facts.clock_hz, facts.hbm_bytes_per_s)
    floor = floor_ms(MODELS[model], job, facts.peak_flops)
    return {
        **row,
        **counted,
        "total_ms": counted["ms"],
        "total_with_steps_ms": counted["ms"] + counted["grid_step_ms"],
        "items_per_s": 1e3 * job.num_items / (counted["ms"] + counted["grid_step_ms"]),
        "floor_ms": floor,
        "share_of_floor": floor / (counted["ms"] + counted["grid_step_ms"]),
        "weights_hbm_ms": 1e3 * ahead.weight_bytes / facts.hbm_bytes_per_s,
        "weight_bytes": ahead.weight_bytes,
        "pool_bytes": ahead.pool_bytes,
        "temporary_bytes": ahead.temporary_bytes,
        "code_bytes": ahead.code_bytes,
        "compile_cpu_seconds": round(ahead.compile_cpu_seconds, 1),
    }


def show(got: dict[str, Any]) -> None:
    """Print it."""
    print(
        f"Qwen3-{got['model']}, query {got['prefix_len']}, {got['num_items']} items x "
        f"{got['item_len']}, bfloat16, one {got['chip']} chip, {got['mask']} mask, {got['flow']}: "
        "predicted from the compiler's schedule"
    )
    if "refused" in got:
        print(f"  the compiler refuses it: {got['refused']}")
        return
    for part, ms in got["parts_ms"].items():
        print(f"  {part:10} {ms:8.2f} ms")
    print(f"  schedule   {got['total_ms']:8.2f} ms")
    print(f"  grid steps {got['grid_step_ms']:8.2f} ms")
    print(f"  total      {got['total_with_steps_ms']:8.2f} ms, {got['items_per_s']:,.0f} items/s")
    print(f"  arithmetic {got['floor_ms']:8.2f} ms, {got['share_of_floor']:.0%} of it reached")
    print(
        f"  of the schedule {got['cycles_ms']:.2f} ms of cycles; {got['hbm_ms']:.2f} ms of HBM, "
        f"most of it beside them; weights {got['weight_bytes'] / 2**30:.2f} GiB "
        f"({got['weights_hbm_ms']:.2f} ms)"
    )
    print(
        f"  pages {got['pool_bytes'] / 2**30:.2f} GiB, "
        f"temporaries {got['temporary_bytes'] / 2**20:.0f} MiB, "
        f"code {got['code_bytes'] / 1e6:.1f} MB, "
        f"compiled in {got['compile_cpu_seconds']:.0f} s of one core"
    )
    print(f"  {got['known_error']}")


def main() -> None:
    """Predict and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", choices=sorted(CHIPS), default="v6e")
    parser.add_argument("--model", choices=sorted(MODELS), default="0.6B")
    parser.add_argument("--mask", choices=["segment", "dense"], default="segment")
    parser.add_argument("--flow", choices=["packed", "prefill", "extend"], default="packed")
    add_request_arguments(parser)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    job = Job(
        prefix_len=args.prefix,
        num_items=args.items,
        item_len=args.item_len,
        num_q_heads=MODELS[args.model]["heads"],
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )
    with tempfile.TemporaryDirectory(prefix=f"predict_{args.chip}_") as dump:  # a gigabyte
        got = predict(args.chip, args.model, job, dump, args.mask, args.flow)
    if args.json:
        print(json.dumps(got))
    else:
        show(got)


if __name__ == "__main__":
    main()
