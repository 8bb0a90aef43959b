"""What one request takes on a TPU, as the compiler schedules the whole program: a prediction.

    python benchmarks/predict_tpu.py --chip v6e            Qwen3-0.6B, query 2 000, 500 items x 20
    python benchmarks/predict_tpu.py --chip v5e --json     one object

The program is the one that runs on a TPU (`packscore.ahead.compile_ahead`), compiled without one.
Every instruction's schedule is counted once, and as often as there are layers where it stands in
the scanned layer; attention is counted piece by piece as `kernel_cycles.py` does. Assumptions: one
bundle issues a cycle; copies between HBM and VMEM hide behind compute, but for those of the page
writes, which are added at the HBM's bandwidth; the time that all weights take at that bandwidth
stands beside; the clock is the chip's published one; the host's work overlaps the device's. Fusions
of the same code are scheduled once by the compiler, and counted as often as they stand there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from typing import Any

import tpu_schedule
from kernel_cycles import TOPOLOGIES, Job, Kernel

MODELS = {
    "0.6B": {"hidden": 1024, "intermediate": 3072, "layers": 28, "heads": 16, "tied": True},
    "4B": {"hidden": 2560, "intermediate": 9728, "layers": 36, "heads": 32, "tied": True},
    "8B": {"hidden": 4096, "intermediate": 12288, "layers": 36, "heads": 32, "tied": False},
}
KV_HEADS, HEAD_DIM, VOCAB_SIZE = 8, 128, 151_936
ALIGNMENT = 16  # tokens that a page's window of tokens is longer by
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ")
CALLS = re.compile(r" fusion\(.*calls=%([\w.\-]+)")
LONG_PIECE = 64  # bundles: the steps of a grid are shorter
FILE = re.compile(r"\d+-(.+)-\d+-packed-bundles-post-ra\.txt$")


def scanned_instructions(hlo: str) -> set[str]:
    """Names of the instructions of the computation that holds the attention: the scanned layer."""
    names: list[str] = []
    found: set[str] = set()
    for line in hlo.splitlines():
        if line and not line.startswith(" "):
            names = []
        elif match := INSTRUCTION.match(line):
            names.append(match[1])
            if match[1].startswith("segment_paged_attention"):
                found = set(names)
                names_of_layer = names
        if found and line.startswith("}") and names is names_of_layer:
            return set(names_of_layer)
    return set(names_of_layer) if found else found


def computations(hlo: str) -> dict[str, str]:
    """The body of every computation, without the names and notes in it."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        if match := re.match(r"^(?:ENTRY )?%([\w.\-]+) \(", line):
            name = match[1]
            bodies[name] = []
        elif name and INSTRUCTION.match(line):
            bare = re.sub(r", (?:metadata|backend_config|frontend_attributes)=.*", "", line)
            bodies[name].append(re.sub(r"%[\w.\-]+", "%", bare))
    return {name: "\n".join(lines) for name, lines in bodies.items()}


def twins(hlo: str) -> dict[str, list[str]]:
    """By fusion the fusions of the same code: the compiler schedules one of them for all."""
    bodies = computations(hlo)
    called = {
        match[1]: bodies.get(calls[1], calls[1])
        for line in hlo.splitlines()
        if (match := INSTRUCTION.match(line)) and (calls := CALLS.search(line))
    }
    same: dict[str, list[str]] = {}
    for name, body in called.items():
        same.setdefault(body, []).append(name)
    return {name: same[body] for name, body in called.items()}


def guarded_cycles(path: str, live: int, steps: int) -> int:
    """Cycles of a kernel whose long pieces run `live` times, behind a guard."""
    found = [region.bundles for region in tpu_schedule.regions(path) if region.depth]
    long = sum(bundles for bundles in found if bundles >= LONG_PIECE)
    return live * long + steps * (sum(found) - long)


def multiplies(path: str) -> bool:
    """Whether an instruction uses the matrix unit."""
    return any(region.has("vmatmul") for region in tpu_schedule.regions(path))


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


def scheduled(
    dump: str, before: set[str], guarded: dict[str, tuple[int, int]]
) -> dict[str, tuple[float, bool]]:
    """(cycles, whether it multiplies matrices) of each scheduled instruction but the attention.

    Args:
      dump: the compiler's folder.
      before: files in it that are not the program's.
      guarded: by kernel how often its long pieces run, and its steps.
    """
    found: dict[str, tuple[float, bool]] = {}
    for path in sorted(set(tpu_schedule.find(dump)) - before):
        match = FILE.search(os.path.basename(path))
        name = match[1] if match else ""
        kernel = name.partition(".")[0]
        if kernel == "segment_paged_attention":
            continue
        if kernel in guarded:
            cycles = guarded_cycles(path, *guarded[kernel])
        else:
            cycles = tpu_schedule.pipelined_cycles(path)
        found[name] = cycles, multiplies(path)
    return found


def guards(num_tokens: int, prefix_len: int, num_heads: int) -> dict[str, tuple[int, int]]:
    """How often the long pieces and the steps of the kernels beside attention run."""
    from packscore.paging import PAGE_SIZE
    from packscore.program import most_page_writes
    from packscore_kernels.hardware import cdiv
    from packscore_kernels.projections.kernel import block_tokens, num_passes

    tiles = cdiv(num_tokens, block_tokens(num_tokens, 2))
    steps = tiles * (num_passes(num_heads, KV_HEADS) + 1)
    return {
        "project_qkv": (tiles, steps),
        "write_kv_pages": (cdiv(prefix_len, PAGE_SIZE), most_page_writes(num_tokens)),
    }


def page_write_bytes(prefix_len: int) -> int:
    """HBM bytes of one layer's page writes, whose copies nothing hides: tokens and a page in, a
    page out."""
    from packscore.paging import PAGE_SIZE
    from packscore_kernels.hardware import cdiv

    pages = cdiv(prefix_len, PAGE_SIZE)
    return pages * KV_HEADS * HEAD_DIM * 2 * 2 * (3 * PAGE_SIZE + ALIGNMENT)


def predict(chip: str, model: str, job: Job) -> dict[str, Any]:
    """Compile the program for a chip and count it."""
    kernel = Kernel(job, chip)  # before anything imports jax
    attention_files = set(tpu_schedule.find(kernel.dump))
    from transformers import Qwen3Config

    from packscore.ahead import compile_ahead
    from packscore_kernels import SegmentLayout
    from packscore_kernels.hardware import CHIPS

    shape, facts = MODELS[model], CHIPS[chip]
    config = Qwen3Config(
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
    layout = SegmentLayout.single(job.prefix_len, [job.item_len] * job.num_items)
    ahead = compile_ahead(config, layout, chip=chip)
    guarded = guards(ahead.num_tokens, job.prefix_len, shape["heads"])
    cycles = scheduled(kernel.dump, attention_files, guarded)
    hlo = ahead.compiled.as_text()
    same, scanned = twins(hlo), scanned_instructions(hlo)
    attention = shape["layers"] * kernel.cycles(job)["cycles"]
    parts = {"attention": attention, "matmuls": 0.0, "rest": 0.0, "once": 0.0}
    for name, (count, has_product) in cycles.items():
        for twin in same.get(name, [name]):
            if twin != name and twin in cycles:
                continue
            if twin in scanned:
                parts["matmuls" if has_product else "rest"] += shape["layers"] * count
            else:
                parts["once"] += count
    copies_ms = 1e3 * shape["layers"] * page_write_bytes(job.prefix_len) / facts.hbm_bytes_per_s
    total_ms = sum(parts.values()) / facts.clock_hz * 1e3 + copies_ms
    floor = floor_ms(shape, job, facts.peak_flops)
    return {
        "chip": chip,
        "model": model,
        "prefix_len": job.prefix_len,
        "num_items": job.num_items,
        "item_len": job.item_len,
        "num_tokens": ahead.num_tokens,
        "predicted": True,
        "clock_hz": facts.clock_hz,
        "mega_cycles": {part: round(cycles / 1e6, 2) for part, cycles in parts.items()},
        "page_copies_ms": copies_ms,
        "total_ms": total_ms,
        "items_per_s": job.num_items / total_ms * 1e3,
        "floor_ms": floor,
        "share_of_floor": floor / total_ms,
        "weights_hbm_ms": ahead.weight_bytes / facts.hbm_bytes_per_s * 1e3,
        "weight_bytes": ahead.weight_bytes,
        "temporary_bytes": ahead.temporary_bytes,
        "code_bytes": ahead.code_bytes,
        "pool_bytes": ahead.pool_bytes,
        "compile_cpu_seconds": ahead.compile_cpu_seconds,
    }


def main() -> None:
    """Predict and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", choices=sorted(TOPOLOGIES), default="v6e")
    parser.add_argument("--model", choices=sorted(MODELS), default="0.6B")
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
    got = predict(args.chip, args.model, job)
    if args.json:
        print(json.dumps(got))
        return
    print(
        f"Qwen3-{got['model']}, query {args.prefix}, {args.items} items x {args.item_len}, "
        f"bfloat16, one {got['chip']} chip: predicted from the compiler's schedule"
    )
    for part, mega in got["mega_cycles"].items():
        print(f"  {part:12} {mega:8.2f} M cycles {1e9 * mega / got['clock_hz']:8.2f} ms")
    print(f"  page copies  {got['page_copies_ms']:17.2f} ms")
    print(f"  total        {got['total_ms']:17.2f} ms, {got['items_per_s']:,.0f} items/s")
    print(f"  arithmetic   {got['floor_ms']:17.2f} ms, {got['share_of_floor']:.0%} of it reached")
    print(
        f"  weights {got['weight_bytes'] / 2**30:.2f} GiB ({got['weights_hbm_ms']:.2f} ms of HBM), "
        f"pages {got['pool_bytes'] / 2**30:.2f} GiB, "
        f"temporaries {got['temporary_bytes'] / 2**20:.0f} MiB, "
        f"code {got['code_bytes'] / 1e6:.1f} MB, "
        f"compiled in {got['compile_cpu_seconds']:.0f} s of one core"
    )


if __name__ == "__main__":
    main()
