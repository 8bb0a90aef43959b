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
import dataclasses
import json
from typing import Any

import numpy as np

import splash_cycles
from packscore_kernels.hardware import CHIPS, KNOWN_ERROR
from tpu_compiler.kernel import Job, Kernel


def line_error(x: list[int], y: list[float]) -> float:
    """Largest relative distance of the points from the line that is nearest in that sense."""
    a = np.stack([np.ones(len(x)), np.asarray(x, float)], axis=1) / np.asarray(y)[:, None]
    fit, *_ = np.linalg.lstsq(a, np.ones(len(x)), rcond=None)
    return float(np.abs(a @ fit - 1).max())


def sweep(kernel: Kernel) -> dict[str, Any]:
    """How cycles grow with items and, in the extend flow, with the prefix."""
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
    parser.add_argument("--chip", default="v6e", choices=sorted(CHIPS))
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
        got = {**splash_cycles.measure(job, args.chip), "known_error": KNOWN_ERROR}
        print(json.dumps(got) if args.json else f"splash, {args.chip}: {got}")
        return
    sizes = None
    if args.block_sizes:
        sizes = tuple(map(int, args.block_sizes.split(",")))
    kernel = Kernel(job, args.chip, sizes)
    flows = {
        flow: kernel.cycles(dataclasses.replace(job, flow=flow)) for flow in ("packed", "extend")
    }
    out: dict[str, Any] = {
        "chip": args.chip,
        "kind": "predicted by the compiler's schedule",
        "known_error": KNOWN_ERROR,
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
    print(f"  {KNOWN_ERROR}")
    for name, got in out.get("sweep", {}).items():
        points = ", ".join(
            f"{v}: {c / 1e6:.3f} M" for v, c in zip(got["values"], got["cycles"], strict=True)
        )
        print(f"  {name}: {points}; at most {got['line_error']:.1%} from a line")


if __name__ == "__main__":
    main()
