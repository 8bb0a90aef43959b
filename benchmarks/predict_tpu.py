"""What one request takes on a TPU, as the compiler schedules the whole program: a prediction.

    python benchmarks/predict_tpu.py --chip v6e            Qwen3-0.6B, query 2 000, 500 items x 20
    python benchmarks/predict_tpu.py --chip v5e --json     one object
    python benchmarks/predict_tpu.py --chip v6e --mask dense --flow extend

The program is the one that runs on a TPU, compiled without one; `program_cycles.py` says how it is
counted, attention piece by piece as in `kernel_cycles.py`. With `--mask dense` its layers call
`dense_attention` in place of the kernel, and everything else stays. Flows: `packed`, which leaves
the query in pages too where the mask is segment; `prefill`, the query alone, into pages; `extend`,
the items behind the query's pages.

Assumptions: one bundle issues a cycle; an instruction takes its cycles or the time of its bytes at
the HBM's bandwidth, whichever is longer; page writes take both, and so do the weights that a kernel
fetches before its first product; copies that the compiler starts early hide; the clock is the
chip's published one; the host's work overlaps the device's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from typing import Any

import program_cycles
import tpu_schedule
from kernel_cycles import TOPOLOGIES, Job, count, read_costs

MODELS = {
    "0.6B": {"hidden": 1024, "intermediate": 3072, "layers": 28, "heads": 16, "tied": True},
    "4B": {"hidden": 2560, "intermediate": 9728, "layers": 36, "heads": 32, "tied": True},
    "8B": {"hidden": 4096, "intermediate": 12288, "layers": 36, "heads": 32, "tied": False},
}
KV_HEADS, HEAD_DIM, VOCAB_SIZE = 8, 128, 151_936
# A piece of a kernel's schedule of so many bundles stands behind a guard; what every step of a grid
# runs is shorter.
LONG_PIECE = 180


def config_of(model: str) -> Any:
    """The configuration of one of the models."""
    from transformers import Qwen3Config

    shape = MODELS[model]
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=40_960,
        tie_word_embeddings=shape["tied"],
        dtype="bfloat16",
    )


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

    from packscore_kernels.attention.xla import dense_mask

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
    import jax.numpy as jnp
    import numpy as np

    from packscore.flows.page_pool import PAGE_SIZE, PREFIX_CACHE_BYTES, PagePool
    from packscore.programs.launch_inputs import block_sizes_for, program_inputs
    from packscore.programs.pages import pages_within, pool_struct
    from packscore.programs.sizes import program_key

    dtype = jnp.dtype(job.dtype)
    layout = layout_of(job, flow)
    has_pages = mask == "segment" or flow != "packed"
    num_pages = pages_within(config, dtype, PREFIX_CACHE_BYTES) if has_pages else 0
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
    return key, (pool_struct(config, dtype, num_pages), *inputs)


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


def steps_of(path: str) -> int:
    """Steps of a kernel's grid: its loop, the last one, is left at that many and two."""
    exits = [region.exits[0] for region in tpu_schedule.regions(path) if region.exits]
    return int(exits[-1]) - 2 if exits else 1


def guarded_cycles(path: str, live: int, steps: int) -> int:
    """Cycles of a kernel whose long pieces run `live` times, behind a guard."""
    found = [region.bundles for region in tpu_schedule.regions(path) if region.depth]
    long = sum(bundles for bundles in found if bundles >= LONG_PIECE)
    return live * long + steps * (sum(found) - long)


def mlp_cycles(path: str, chunks: int) -> tuple[float, int]:
    """Cycles of the MLP's kernel, and its tiles of tokens, each of which reads all weights.

    Its long pieces: the first chunk of a tile, the other ones, and what ends a tile.
    """
    steps = steps_of(path)
    tiles, cycles = steps // chunks, 0.0
    times = [tiles, steps - tiles] if chunks > 1 else [tiles]
    for region in tpu_schedule.regions(path):
        if region.has("vmatmul"):
            cycles += region.bundles * times.pop(0)
        elif region.depth:
            cycles += region.bundles * (tiles if region.bundles >= LONG_PIECE else steps)
    return cycles, tiles


def costs_of_kernels(
    config: Any, job: Job, inputs: tuple[Any, ...], clock_hz: float, bandwidth: float
) -> Any:
    """What (instruction, its schedule) of our kernels takes: (cycles, bytes of HBM or None)."""
    import numpy as np

    from packscore_kernels import PageWrites, SegmentSchedule
    from packscore_kernels.attention.kernel import TURN
    from packscore_kernels.layer.mlp import mlp_tiles
    from packscore_kernels.layer.projections import num_passes
    from packscore_kernels.page_writes import ALIGNMENT, FIELDS, takes_whole

    (schedule,) = (x for x in inputs if isinstance(x, SegmentSchedule))
    writes = [x for x in inputs if isinstance(x, PageWrites)]
    head = 2 * job.head_dim  # bytes of a head's weights, by the hidden size

    def fetched(count: float) -> float:
        """Cycles for which the chip waits for so many bytes of HBM."""
        return count / bandwidth * clock_hz

    def cost(name: str, path: str) -> tuple[float, float | None] | None:
        if name.startswith("segment_paged_attention"):
            got = count(job, read_costs(path), schedule, TURN)
            return got["cycles"], got["hbm_bytes"]
        if name.startswith("project_qkv"):
            steps = steps_of(path)
            tiles = steps // (num_passes(job.num_q_heads, job.num_kv_heads) + 1)
            weights = config.hidden_size * (job.num_q_heads + 2 * job.num_kv_heads) * head
            return guarded_cycles(path, tiles, steps) + fetched(weights), None
        if name.startswith("project_out"):
            weights = config.hidden_size * job.num_q_heads * head
            return tpu_schedule.pipelined_cycles(path) + fetched(weights), None
        if name.startswith("gated_mlp"):
            hidden, width = config.hidden_size, config.intermediate_size
            tiled = mlp_tiles(inputs[-5 - len(writes)].shape[0], hidden, width, 2)
            cycles, tiles = mlp_cycles(path, width // tiled.width)
            weights = 2 * 3 * hidden * width
            # the first chunk arrives before anything runs, the others beside the products
            first = fetched(weights * tiled.width / width)
            return max(cycles, fetched(tiles * weights)) + first, None
        if name.startswith("write_kv_pages"):
            # whole pages are copied together; each other one waits for its keys, values and old
            # slots, is merged, and waits for its way back
            fields = np.reshape(writes[0].writes, (-1, FIELDS))[: int(writes[0].count[0])]
            _, _, token, low, high = fields.T
            size = writes[0].page_size
            whole = int(takes_whole(token, low, high, size).sum())
            merged = len(fields) - whole
            slot = 2 * 2 * job.num_kv_heads * job.head_dim
            moved = slot * (2 * whole * size + merged * (3 * size + ALIGNMENT))
            cycles = guarded_cycles(path, merged, len(fields))
            return cycles + fetched(moved), moved
        return None

    return cost


def predict(
    chip: str, model: str, job: Job, dump: str, mask: str = "segment", flow: str = "packed"
) -> dict[str, Any]:
    """Compile one program for a chip and count it; a refusal of the compiler is a result."""
    tpu_schedule.configure(TOPOLOGIES[chip], dump)
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from transformers import Qwen3ForCausalLM

    from packscore.programs import traced_ops
    from packscore.programs.ahead import bytes_of
    from packscore.programs.compiling import compile_program
    from packscore.programs.traced_model import TracedModel
    from packscore_kernels.hardware import CHIPS

    facts, config = CHIPS[chip], config_of(model)
    if mask == "dense":
        traced_ops.segment_paged_attention = dense_attention
    key, inputs = program_and_inputs(config, job, chip, mask, flow)
    (device, *_) = topologies.get_topology_desc(
        platform="tpu", topology_name=facts.topology, chips_per_host_bounds=(1, 1, 1)
    ).devices
    traced = TracedModel(Qwen3ForCausalLM, config)
    weights = traced.weight_shapes(jnp.bfloat16)
    row: dict[str, Any] = {
        "chip": chip,
        "model": model,
        "mask": mask,
        "flow": flow,
        **{name: getattr(job, name) for name in ("prefix_len", "num_items", "item_len")},
        "num_tokens": key.num_tokens,
        "predicted": True,
    }
    start = time.process_time()
    try:
        compiled = compile_program(traced, weights, key, inputs, device, "pallas")
    except jax.errors.JaxRuntimeError as error:
        return {**row, "refused": str(error).partition("\n\n")[0][:2000]}
    seconds = time.process_time() - start
    found = program_cycles.instructions(
        compiled.as_text(),
        tpu_schedule.find(dump),
        costs_of_kernels(config, job, inputs, facts.clock_hz, facts.hbm_bytes_per_s),
    )
    counted = program_cycles.summary(found, facts.clock_hz, facts.hbm_bytes_per_s)
    memory = compiled.memory_analysis()
    floor = floor_ms(MODELS[model], job, facts.peak_flops)
    return {
        **row,
        **counted,
        "total_ms": counted["ms"],
        "items_per_s": 1e3 * job.num_items / counted["ms"],
        "floor_ms": floor,
        "share_of_floor": floor / counted["ms"],
        "weights_hbm_ms": 1e3 * bytes_of(weights) / facts.hbm_bytes_per_s,
        "weight_bytes": bytes_of(weights),
        "pool_bytes": bytes_of(inputs[0]) if key.num_pages else 0,
        "temporary_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "compile_cpu_seconds": round(seconds, 1),
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
    print(f"  total      {got['total_ms']:8.2f} ms, {got['items_per_s']:,.0f} items/s")
    print(f"  arithmetic {got['floor_ms']:8.2f} ms, {got['share_of_floor']:.0%} of it reached")
    print(
        f"  of the total {got['cycles_ms']:.2f} ms of cycles; {got['hbm_ms']:.2f} ms of HBM, most "
        f"of it beside them; weights {got['weight_bytes'] / 2**30:.2f} GiB "
        f"({got['weights_hbm_ms']:.2f} ms)"
    )
    print(
        f"  pages {got['pool_bytes'] / 2**30:.2f} GiB, "
        f"temporaries {got['temporary_bytes'] / 2**20:.0f} MiB, "
        f"code {got['code_bytes'] / 1e6:.1f} MB, "
        f"compiled in {got['compile_cpu_seconds']:.0f} s of one core"
    )


def main() -> None:
    """Predict and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", choices=sorted(TOPOLOGIES), default="v6e")
    parser.add_argument("--model", choices=sorted(MODELS), default="0.6B")
    parser.add_argument("--mask", choices=["segment", "dense"], default="segment")
    parser.add_argument("--flow", choices=["packed", "prefill", "extend"], default="packed")
    parser.add_argument("--prefix", type=int, default=2000)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--item-len", type=int, default=20)
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
