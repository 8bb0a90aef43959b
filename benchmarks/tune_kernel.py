"""Try block sizes with the compiler and keep the best as a row of the tuned table.

    python benchmarks/tune_kernel.py --chip v6e                      heads of the reference job
    python benchmarks/tune_kernel.py --chip v5e --heads 32 8 --head-dim 128 --dtype bfloat16

Every candidate is compiled in a process of its own and counted on the reference job's packed
flow by `kernel_cycles.py`: predictions of the compiler's schedule, not measurements.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import provenance
from packscore_kernels.hardware import CHIPS
from workloads import REFERENCE

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "jax_kernels" / "packscore_kernels" / "attention"
# block_q x q heads a kv head: the rows of a tile.
ROWS = (1024, 2048, 4096)
BLOCK_KV = (256, 512)


def candidates(group_size: int) -> list[tuple[int, int, int, int]]:
    """(block_q, block_kv, chunk_kv, num_slots) worth a try."""
    out = []
    for rows in ROWS:
        block_q = max(128, rows // group_size // 128 * 128)
        out += [(block_q, block_kv, 2048, 6) for block_kv in BLOCK_KV]
    return list(dict.fromkeys(out))


def cycles(args: argparse.Namespace, sizes: tuple[int, ...]) -> float | None:
    """Predicted cycles of one layer, None where the compiler refuses the sizes."""
    command = [
        sys.executable,
        str(HERE / "kernel_cycles.py"),
        *("--chip", args.chip, "--json", "--block-sizes", ",".join(map(str, sizes))),
        *("--heads", *map(str, args.heads)),
        *("--head-dim", str(args.head_dim), "--dtype", args.dtype),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"  {sizes}: refused, {done.stderr.strip().splitlines()[-1][:120]}")
        return None
    got = json.loads(done.stdout)
    print(f"  {sizes}: {got['cycles'] / 1e6:.3f} M cycles")
    return float(got["cycles"])


def main() -> None:
    """Sweep, and write the best row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chip", required=True, choices=sorted(CHIPS))
    parser.add_argument("--heads", type=int, nargs=2, default=(16, 8), help="q heads, kv heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--dry-run", action="store_true", help="do not write the table")
    args = parser.parse_args()
    group_size = args.heads[0] // args.heads[1]
    tried = {sizes: cycles(args, sizes) for sizes in candidates(group_size)}
    counted = {sizes: c for sizes, c in tried.items() if c is not None}
    if not counted:
        sys.exit("no candidate compiles")
    # The fewest rows within 1 % of the best: small tiles waste less on a batch's last one.
    least = min(counted.values())
    best = next(sizes for sizes, c in counted.items() if c <= 1.01 * least)
    names = ("block_q", "block_kv", "chunk_kv", "num_slots")
    row = {
        "head_dim": args.head_dim,
        "group_size": group_size,
        "dtype": args.dtype,
        "block_sizes": dict(zip(names, best, strict=True)),
        "predicted_cycles": round(counted[best]),
        "job": f"{args.heads[0]} q heads, {args.heads[1]} kv heads, prefix {REFERENCE.prefix_len}, "
        f"{REFERENCE.num_items} items of {REFERENCE.item_len}",
        "chip": args.chip,
        "compiler": "libtpu " + provenance.versions("libtpu")["libtpu"],
        "date": provenance.today(),
    }
    print(json.dumps(row))
    if args.dry_run:
        return
    table = PACKAGE / "tuned" / f"{args.chip}.json"
    table.parent.mkdir(exist_ok=True)
    rows = json.loads(table.read_text()) if table.exists() else []
    key = ("head_dim", "group_size", "dtype")
    rows = [r for r in rows if any(r[k] != row[k] for k in key)] + [row]
    rows.sort(key=lambda r: (r["head_dim"], r["group_size"], r["dtype"]))
    table.write_text("[\n" + ",\n".join("  " + json.dumps(r) for r in rows) + "\n]\n")


if __name__ == "__main__":
    main()
