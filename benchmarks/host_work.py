"""What the host does for one request beside the device, in milliseconds on one core.

python benchmarks/host_work.py            query 2 000, 500 items x 20, token ids given

Everything from token ids to scores is in it, but that the weights are looked at for changes before
each run, and that arrays travel to the device and back.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from packscore.core import ScoringCore
from packscore.encoded import EncodedRequest
from packscore.flows.costs import tpu_cost_model
from packscore.flows.engine import Limits, Readout, RowLogits
from packscore.flows.packing import PackedBatch, Share, pack
from packscore.flows.page_pool import PREFIX_CACHE_BYTES, PagePool
from packscore.flows.runner import Runner
from packscore.model.sizes import ModelSizes
from packscore.programs.launch_inputs import LaunchInputs, block_sizes_for
from packscore.programs.pages import pages_within
from packscore.programs.program import Launched
from packscore.programs.sizes import MAX_GROUPS, NAMED_PAGES, ProgramKey, program_key, token_bucket
from packscore.results import Flow, MaskImpl
from packscore_kernels import BlockSizes, SegmentLayout, build_schedule
from workloads import add_request_arguments, config_of

SIZES = ModelSizes.of(config_of("0.6B"))


class Host:
    """An engine whose device answers at once: what is left of a request is the host's."""

    mask_impl: MaskImpl = "segment"
    only_flow: Flow | None = None

    def __init__(self, chip: str) -> None:
        self.num_pages = pages_within(SIZES, "bfloat16", PREFIX_CACHE_BYTES)
        self.pool: PagePool | None = PagePool(self.num_pages)
        self.costs = tpu_cost_model(SIZES, chip, 2, token_bucket)
        self.limits = Limits(16_384, 16_384, MAX_GROUPS, NAMED_PAGES)
        self._chip = chip

    def refresh(self, *, force: bool = False) -> None:
        """No weights that could have changed."""

    def launch(self, batch: PackedBatch, readout: Readout) -> Launched:
        """Every array of the program, and results as the device would give them."""
        num_items, num_tokens = len(batch.layout.scored_rows), len(batch.token_ids)
        label_ids, over_vocabulary = readout.label_ids, readout.over_vocabulary
        key = program_key(num_tokens, num_items, len(label_ids), over_vocabulary, self.num_pages)
        blocks = block_sizes_for(SIZES, "bfloat16", key, self._chip)
        leases = [share.lease for share in batch.shares]
        LaunchInputs.of(key, blocks, batch.layout, batch.token_ids, label_ids, leases=leases)
        logits: Any = np.zeros((key.num_items, key.num_labels), np.float32)
        return Launched(logits, None, num_items, len(label_ids))

    def read(self, launched: Sequence[Launched]) -> RowLogits:
        """What the device has already answered."""
        found = [one.read() for one in launched]
        logits, normalizer = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return torch.from_numpy(logits), torch.from_numpy(normalizer)


def median_ms(run: Callable[[], Any], rounds: int) -> float:
    """Median time of `rounds` runs after one, on the core: other processes are not in it."""
    run()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_request_arguments(parser)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    prefix = np.arange(args.prefix)
    # different ones: equal items are computed once
    items = [np.arange(k, k + args.item_len) for k in range(args.items)]
    share = Share(0, prefix, items, np.arange(args.items))

    def batch() -> Any:
        return pack([share])

    packed = batch()
    key: ProgramKey = program_key(len(packed.token_ids), args.items, 2, False)
    blocks: BlockSizes = block_sizes_for(SIZES, "bfloat16", key, "v6e")

    def layout() -> SegmentLayout:
        return SegmentLayout(packed.layout.groups, key.num_tokens)  # derives everything anew

    def inputs() -> Any:
        fresh = batch()
        return LaunchInputs.of(key, blocks, fresh.layout, fresh.token_ids, [0, 1])

    runner, turn = Runner(Host("v6e")), itertools.count()

    def request() -> Any:
        own = prefix.copy()
        own[0] = next(turn)  # a query that is new
        (result,) = runner.run([EncodedRequest(own, items)], Readout((0, 1), over_vocabulary=False))
        if isinstance(result, Exception):
            raise result
        return ScoringCore.probabilities(result)

    found = {
        "pack_ms": median_ms(batch, args.rounds),
        "schedule_ms": median_ms(lambda: build_schedule(layout(), block_sizes=blocks), args.rounds),
        "arrays_ms": median_ms(inputs, args.rounds),
        "request_ms": median_ms(request, args.rounds),
    }
    if args.json:
        print(json.dumps(found))
        return
    print(f"query {args.prefix}, {args.items} items x {args.item_len}, bucket {key.num_tokens}")
    print(f"pack                                       {found['pack_ms']:6.2f} ms")
    print(f"schedule of the attention                  {found['schedule_ms']:6.2f} ms")
    print(f"both, and every array of the program       {found['arrays_ms']:6.2f} ms")
    print(f"all: plan, pages, arrays, scores as lists  {found['request_ms']:6.2f} ms")


if __name__ == "__main__":
    main()
