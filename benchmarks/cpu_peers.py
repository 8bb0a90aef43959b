"""packscore on the CPU against what Hugging Face users do today, same weights, same inputs.

    python benchmarks/cpu_peers.py                      # everything, about 40 minutes on one core
    python benchmarks/cpu_peers.py --workloads rerank-short --dtypes bfloat16 --rounds 3

The model is a 4-layer slice of Qwen3-0.6B's shape with random weights. Every system reads two label
logits at each item's last token; the scores of all systems are compared with one-by-one before
anything is timed. Systems run in an order that is turned around every round, and what is reported
is the median over rounds of each system's time divided by packscore's in the same round, with the
smallest and largest. One by one and the padded batch are timed on the first items of a workload and
scaled to all of them where that is marked, because they would take an hour.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, Qwen3ForCausalLM

import provenance
from packscore import MultiItemScorer, patch_model
from workloads import PEERS_VOCAB_SIZE, REFERENCE, make_model

LABELS = [3, 5]
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Workload:
    """One query and its items, in tokens."""

    name: str
    prefix_len: int
    item_lens: tuple[int, ...]
    sampled_items: int  # how many of them the slow systems are timed on

    @property
    def scale(self) -> float:
        """Tokens of all items, each behind its own prefix, over those of the sampled ones."""
        lens = [self.prefix_len + n for n in self.item_lens]
        return sum(lens) / sum(lens[: self.sampled_items])


WORKLOADS = [
    Workload("rerank-short", 128, (24,) * 50, 50),
    Workload("rerank-reference", REFERENCE.prefix_len, REFERENCE.item_lens, 6),
    Workload("many-tiny", 64, (8,) * 200, 50),
    Workload("mixed-lengths", 200, tuple(5 + 59 * k % 296 for k in range(40)), 20),
    Workload("one-item", 128, (24,), 1),
]

Ids = list[int]
System = Callable[[Ids, list[Ids]], torch.Tensor]


class HuggingFace:
    """What users do with the unpatched model; only the label rows of the head are computed."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.decoder = model.get_decoder()
        self.head = model.lm_head.weight[LABELS].float()

    def labels(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] -> probabilities [num_rows, num_labels]."""
        return torch.nn.functional.linear(hidden.float(), self.head).softmax(-1)

    def one_by_one(self, prefix: Ids, items: list[Ids]) -> torch.Tensor:
        """One forward for each item."""
        rows = [
            self.decoder(torch.tensor([prefix + item]), use_cache=False).last_hidden_state[0, -1]
            for item in items
        ]
        return self.labels(torch.stack(rows))

    def padded_batch(self, prefix: Ids, items: list[Ids], batch_size: int = 32) -> torch.Tensor:
        """Whole prompts, sorted by length, padded on the right."""

        def run(batch: list[Ids]) -> torch.Tensor:
            ids, mask = pad([prefix + item for item in batch])
            return self.decoder(ids, attention_mask=mask, use_cache=False).last_hidden_state

        return self.labels(by_length(items, batch_size, len(prefix), run))

    def prefix_cache(self, batch_size: int) -> System:
        """The query once, then batches of items behind copies of its cache."""

        def score(prefix: Ids, items: list[Ids]) -> torch.Tensor:
            cache = DynamicCache(config=self.decoder.config)
            self.decoder(torch.tensor([prefix]), past_key_values=cache)

            def run(batch: list[Ids]) -> torch.Tensor:
                ids, mask = pad(batch)
                mask = torch.cat([mask.new_ones(len(batch), len(prefix)), mask], dim=1)
                copies = copy.deepcopy(cache)
                copies.batch_repeat_interleave(len(batch))
                return self.decoder(
                    ids, attention_mask=mask, past_key_values=copies
                ).last_hidden_state

            return self.labels(by_length(items, batch_size, 0, run))

        return score


def pad(rows: list[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, attention mask), both [len(rows), longest]."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])


def by_length(
    items: list[Ids], batch_size: int, offset: int, run: Callable[[list[Ids]], torch.Tensor]
) -> torch.Tensor:
    """Hidden states at the last token of each item, batched by length, in the order given."""
    order = sorted(range(len(items)), key=lambda i: len(items[i]))
    out: list[torch.Tensor | None] = [None] * len(items)
    for start in range(0, len(order), batch_size):
        index = order[start : start + batch_size]
        hidden = run([items[i] for i in index])
        for row, i in enumerate(index):
            out[i] = hidden[row, offset + len(items[i]) - 1]
    return torch.stack([row for row in out if row is not None])


def packed(model: Qwen3ForCausalLM, mask_impl: str) -> System:
    """packscore's own call, from token ids to a list of probabilities."""
    scorer = MultiItemScorer(model, mask_impl=mask_impl, label_token_ids=LABELS)
    return lambda prefix, items: torch.tensor(scorer.score(prefix, items, apply_softmax=True))


def random_ids(count: int, seed: int) -> Ids:
    """`count` token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: Ids = torch.randint(8, PEERS_VOCAB_SIZE, (count,), generator=generator).tolist()
    return ids


@torch.inference_mode()
def run_workload(workload: Workload, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """Check, then time, every system on one workload."""
    plain = make_model(dtype)
    patched = patch_model(copy.deepcopy(plain))
    hugging_face = HuggingFace(plain)
    systems: dict[str, System] = {
        "packscore segment": packed(patched, "segment"),
        "packscore dense": packed(patched, "dense"),
        "HF one by one": hugging_face.one_by_one,
    }
    if len(workload.item_lens) > 1:
        systems["HF padded batch"] = hugging_face.padded_batch
        systems["HF prefix cache + batch of 8"] = hugging_face.prefix_cache(8)
        systems["HF prefix cache + batch of 32"] = hugging_face.prefix_cache(32)
    prefix = random_ids(workload.prefix_len, seed=0)
    items = [random_ids(n, seed=k + 1) for k, n in enumerate(workload.item_lens)]
    sample = items[: workload.sampled_items]

    def inputs(name: str) -> tuple[list[Ids], float]:
        sampled = name in ("HF one by one", "HF padded batch")
        return (sample, workload.scale) if sampled else (items, 1.0)

    expected = hugging_face.one_by_one(prefix, sample)
    worst = {}
    for name, system in systems.items():
        found = system(prefix, inputs(name)[0])[: len(sample)]
        worst[name] = float((found - expected).abs().max())
        assert worst[name] <= MAX_DIFFERENCE[dtype], (name, worst[name])

    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds):
        for name in list(systems)[:: -1 if turn % 2 else 1]:
            chosen, scale = inputs(name)
            start = time.perf_counter()
            systems[name](prefix, chosen)
            seconds[name].append((time.perf_counter() - start) * scale)

    rows = []
    for name, times in seconds.items():
        ratios = [t / own for t, own in zip(times, seconds["packscore segment"], strict=True)]
        rows.append(
            {
                "system": name,
                "median_seconds": statistics.median(times),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "max_difference": worst[name],
                "scaled_from_items": len(sample) if inputs(name)[1] != 1.0 else None,
            }
        )
    return {"workload": asdict(workload), "dtype": str(dtype).removeprefix("torch."), "rows": rows}


def print_table(result: dict[str, object]) -> None:
    """One workload as lines of text."""
    workload = result["workload"]
    lens = workload["item_lens"]
    shape = f"prefix {workload['prefix_len']}, {len(lens)} items of {min(lens)}-{max(lens)} tokens"
    print(f"\n{workload['name']} ({shape}), {result['dtype']}")
    print(f"{'system':32} {'seconds':>9} {'x segment':>10} {'spread':>14} {'max |dP|':>9}")
    for row in result["rows"]:
        spread = f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}"
        mark = f"  scaled from {row['scaled_from_items']} items" if row["scaled_from_items"] else ""
        print(
            f"{row['system']:32} {row['median_seconds']:9.3f} {row['ratio']:10.2f} {spread:>14} "
            f"{row['max_difference']:9.1e}{mark}",
            flush=True,
        )


def environment() -> dict[str, object]:
    """Where and on what this was measured."""
    return {
        "date": provenance.today(),
        "commit": provenance.commit(),
        "cpu": provenance.cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **provenance.versions("torch", "transformers", "packscore"),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen workloads and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument("--workloads", nargs="+", choices=names, default=names)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    about = {**environment(), "rounds": args.rounds}
    print(json.dumps(about))
    results = []
    for workload in WORKLOADS:
        if workload.name in args.workloads:
            for dtype in args.dtypes:
                results.append(run_workload(workload, getattr(torch, dtype), args.rounds))
                print_table(results[-1])
    if args.json:
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
