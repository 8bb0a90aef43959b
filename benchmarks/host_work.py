"""What the host does for one request beside the device, in milliseconds on one core.

python benchmarks/host_work.py            query 2 000, 500 items x 20, token ids given
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from packscore.packing import Share, pack
from packscore.program import ProgramKey, block_sizes_for, program_inputs, program_key
from packscore_kernels import BlockSizes, SegmentLayout, build_schedule


class Config:
    """The shape of Qwen3-0.6B's attention."""

    num_attention_heads, num_key_value_heads, head_dim, hidden_size = 16, 8, 128, 1024


def median_ms(run: Callable[[], Any], rounds: int) -> float:
    """Median time of `rounds` runs after one."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prefix", type=int, default=2000)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--item-len", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prefix = np.arange(args.prefix)
    items = [np.arange(args.item_len) for _ in range(args.items)]

    def batch() -> Any:
        return pack([Share(0, prefix, items, np.arange(len(items)))])

    packed = batch()
    key: ProgramKey = program_key(len(packed.token_ids), args.items, 2, False)
    blocks: BlockSizes = block_sizes_for(Config, "bfloat16", key.num_tokens, "v6e")

    def layout() -> SegmentLayout:
        return SegmentLayout(packed.layout.groups, key.num_tokens)  # derives everything anew

    def inputs() -> Any:
        fresh = batch()
        return program_inputs(key, blocks, fresh.layout, fresh.token_ids, [0, 1])

    found = {
        "pack_ms": median_ms(batch, args.rounds),
        "schedule_ms": median_ms(lambda: build_schedule(layout(), block_sizes=blocks), args.rounds),
        "request_ms": median_ms(inputs, args.rounds),
    }
    if args.json:
        print(json.dumps(found))
        return
    print(f"query {args.prefix}, {args.items} items x {args.item_len}, bucket {key.num_tokens}")
    print(f"pack                                       {found['pack_ms']:6.2f} ms")
    print(f"schedule of the attention                  {found['schedule_ms']:6.2f} ms")
    print(f"both, and every array of the program       {found['request_ms']:6.2f} ms")


if __name__ == "__main__":
    main()
