"""What the host does for one request beside the device, in milliseconds on one core.

    python benchmarks/host_work.py            query 2 000, 500 items x 20, token ids given
    python benchmarks/host_work.py --json benchmarks/results/host_work.json

The model has Qwen3-0.6B's modules and tensors, and no values. The engine is that of compiled
programs, each of which answers at once: what is left of a request is the host's, but that arrays
travel to the device and back. Requests with the look at the model for changes take turns with
those of a watch that sees nothing, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax looks for a TPU

import numpy as np
import torch
from transformers import Qwen3ForCausalLM

import provenance
from packscore import MultiItemScorer, patch_model
from packscore.core import ScoringCore
from packscore.encoded import EncodedRequest
from packscore.flows.costs import tpu_cost_model
from packscore.flows.packing import Share, pack
from packscore.flows.reads import LabelRead
from packscore.model.weight_watch import WeightWatch
from packscore.programs.launch_inputs import LaunchInputs, block_sizes_for
from packscore.programs.sizes import ProgramKey, program_key, token_bucket
from packscore.text.labels import Labels
from packscore_kernels import SegmentLayout, build_schedule
from workloads import add_request_arguments, config_of

CHIP = "v6e"
LABEL_IDS = (1, 2)
LINES = {
    "pack": "pack",
    "schedule": "schedule of the attention",
    "arrays": "both, and every array of the program",
    "run_blind": "all: plan, pages, arrays, scores as lists",
    "run": "all, and the look at the model",
    "score_blind": "scorer.score of lists of ids, without a look",
    "score": "scorer.score of lists of ids",
    "look": "looks at the model, one behind the other",
}


def model_without_values() -> Qwen3ForCausalLM:
    """Qwen3-0.6B's modules and tensors, in memory to which nobody wrote but the labels' rows."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config_of("0.6B")).to(torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    with torch.no_grad():
        model.lm_head.weight[list(LABEL_IDS)] = torch.eye(2, model.config.hidden_size).bfloat16()
    return model.eval()


def scorer_that_answers_at_once(model: Qwen3ForCausalLM) -> MultiItemScorer:
    """A scorer with a chip's plans, whose programs give zeros."""
    scorer = MultiItemScorer(patch_model(model, device="jax"), label_token_ids=list(LABEL_IDS))
    engine: Any = scorer._core.copies.first
    program = engine._program

    def answers(key: ProgramKey) -> Any:
        logits = np.zeros((key.num_rows, key.num_labels), np.float32)
        found = logits, np.zeros(key.num_rows, np.float32)
        return lambda weights, pages, inputs: ((found,), pages)

    program._executables.get = answers
    engine.costs = tpu_cost_model(program.sizes, CHIP, 2, token_bucket)
    engine._pages._array = np.zeros(0)  # in place of pages, which nobody reads
    return scorer


def medians_ms(rounds: int, *runs: Callable[[], Any]) -> list[float]:
    """Median time of each, in turns, on the core: other processes are not in it."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, found in zip(runs, times, strict=True):
            start = time.thread_time()
            run()
            if turn:  # the first one makes what later ones find
                found.append(time.thread_time() - start)
    return [1e3 * statistics.median(found) for found in times]


class Blind:
    """A watch that sees nothing."""

    def sees_change(self, model: Any) -> bool:
        """Never."""
        return False


def blindly(weights: Any, run: Callable[[], Any]) -> Callable[[], Any]:
    """The same while nobody looks at the model."""
    watch, blind = weights._watch, Blind()

    def looking_at_nothing() -> Any:
        weights._watch = blind
        try:
            return run()
        finally:
            weights._watch = watch

    return looking_at_nothing


def parts_ms(args: argparse.Namespace, sizes: Any) -> tuple[int, dict[str, float]]:
    """The bucket of the request as one launch, and what its arrays take."""
    items = items_of(args)
    share = Share(0, np.arange(args.prefix), items, np.arange(args.items))
    packed = pack([share])
    key: ProgramKey = program_key(len(packed.token_ids), args.items, 2)
    blocks = block_sizes_for(sizes, "bfloat16", key, CHIP)

    def schedule() -> Any:
        layout = SegmentLayout(packed.layout.groups, key.num_tokens)  # derives everything anew
        return build_schedule(layout, block_sizes=blocks)

    def arrays() -> Any:
        fresh = pack([share])
        return LaunchInputs.of(key, blocks, fresh.layout, fresh.token_ids, LABEL_IDS)

    found = medians_ms(args.rounds, lambda: pack([share]), schedule, arrays)
    return key.num_tokens, dict(zip(("pack", "schedule", "arrays"), found, strict=True))


def items_of(args: argparse.Namespace) -> list[Any]:
    """Different ones: equal items are computed once."""
    return [np.arange(k, k + args.item_len) for k in range(args.items)]


def requests_ms(args: argparse.Namespace, scorer: MultiItemScorer) -> dict[str, float]:
    """Requests of a query that is new, of token ids and of a user's lists, in turns."""
    core, turn = scorer._core, itertools.count()
    engine: Any = core.copies.first
    read = LabelRead((Labels(tuple((i,) for i in LABEL_IDS)),), over_vocabulary=False)
    items = items_of(args)
    lists = [item.tolist() for item in items]

    def query() -> Any:
        ids = np.arange(args.prefix)
        ids[0] = next(turn)
        return ids

    def run() -> Any:
        return ScoringCore.probabilities(core.run_one(EncodedRequest(query(), items), read))

    def score() -> Any:
        return scorer.score(query().tolist(), lists, apply_softmax=True)

    weights = engine._program._weights
    runs = (blindly(weights, run), run, blindly(weights, score), score)
    found = medians_ms(args.rounds, *runs)
    names = ("run_blind", "run", "score_blind", "score")
    return dict(zip(names, found, strict=True))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_request_arguments(parser)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    command = f"python benchmarks/host_work.py --rounds {args.rounds}"
    about = provenance.made(command, "torch", "transformers", "jax")
    torch.set_num_threads(1)
    model = model_without_values()
    scorer = scorer_that_answers_at_once(model)
    bucket, ms = parts_ms(args, scorer._core.copies.first._program.sizes)
    ms |= requests_ms(args, scorer)
    watch = WeightWatch(model)
    (ms["look"],) = medians_ms(args.rounds, lambda: watch.sees_change(model))
    counts = {
        "modules": len(list(model.modules())),
        "parameters": len(list(model.parameters())),
        "buffers": len(list(model.buffers())),
    }
    if args.json:
        found = {**about, "rounds": args.rounds, "bucket": bucket, "model": counts}
        found["ms"] = {name: round(x, 4) for name, x in ms.items()}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"query {args.prefix}, {args.items} items x {args.item_len}, bucket {bucket}")
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    for name, text in LINES.items():
        print(f"{text:44}{ms[name]:6.2f} ms")


if __name__ == "__main__":
    main()
