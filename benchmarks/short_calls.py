"""Calls of a few short documents beside sentence-transformers, milliseconds on one core.

    python benchmarks/short_calls.py
    python benchmarks/short_calls.py --json benchmarks/results/short_calls.json

Both are `CrossEncoder.predict` on one checkpoint. Every call has new documents, and a new query or
the one of the call before; the two take turns, and whoever is first goes second the next time.
What is reported is the median of each, and of the ratios of neighbours with their quartiles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
from transformers import AutoConfig, Qwen3ForCausalLM
from transformers.utils import logging

import provenance
from packscore import CrossEncoder, shipped_model_path
from workloads import config_of

SHIPPED, SLICE = "shipped", "0.6B, 4 layers"
# By model: numbers of documents, and the share of the runs that its calls get.
COUNTS = {SHIPPED: (1, 2, 5, 40), SLICE: (1, 2, 5)}
SHARES = {SHIPPED: 1, SLICE: 5}
WARM_UP = 10
WORDS = ("read", "write", "file", "socket", "thread", "lock", "queue", "json", "date", "time")
# Of scores, in the mean of a call; in bfloat16 each rounds in its own way.
MAX_DIFFERENCE = {"float32": 1e-5, "bfloat16": 0.02}
PACKAGES = ("torch", "transformers", "sentence-transformers")


@dataclass(frozen=True)
class Row:
    """One kind of call; milliseconds, and packscore's over sentence-transformers'."""

    model: str
    dtype: str
    query: str
    num_documents: int
    packscore_ms: float
    sentence_transformers_ms: float
    ratio: float
    ratio_quartiles: tuple[float, float]


def checkpoints(folder: Path) -> dict[str, str]:
    """The shipped model, and four layers of Qwen3-0.6B's shape with its tokenizer."""
    shipped = shipped_model_path()
    target = folder / "slice"
    shutil.copytree(shipped, target)
    config = config_of("0.6B")
    config.num_hidden_layers = 4
    config.layer_types = config.layer_types[:4]
    small = AutoConfig.from_pretrained(shipped)
    for name in ("vocab_size", "pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(config, name, getattr(small, name))
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(target)
    return {SHIPPED: str(shipped), SLICE: str(target)}


def calls(num_documents: int, *, new_query: bool) -> Iterator[list[tuple[str, str]]]:
    """The pairs of one call after the other: queries of 4 to 6 words, documents of 12 to 30."""
    rng = random.Random(num_documents)

    def text(fewest: int, most: int, mark: int) -> str:
        return " ".join([*rng.choices(WORDS, k=rng.randint(fewest, most)), str(mark)])

    query = ""
    for number in itertools.count():
        if new_query or not query:
            query = text(4, 6, number)
        yield [(query, text(12, 30, number)) for _ in range(num_documents)]


def timed(model: Any, pairs: list[tuple[str, str]]) -> tuple[float, Any]:
    """Milliseconds of one call, and its scores."""
    start = time.perf_counter()
    scores = model.predict(pairs, show_progress_bar=False)
    return 1e3 * (time.perf_counter() - start), scores


def measure(
    ours: Any, theirs: Any, pairs: Iterator[list[tuple[str, str]]], runs: int, bound: float
) -> tuple[list[float], list[float]]:
    """Milliseconds of both, call by call, behind a warm-up; their scores are compared."""
    spent: tuple[list[float], list[float]] = [], []
    for number, call in enumerate(itertools.islice(pairs, WARM_UP + runs)):
        order = [(0, ours), (1, theirs)][:: -1 if number % 2 else 1]
        found = {which: timed(model, call) for which, model in order}
        difference = abs(found[0][1] - found[1][1]).mean()
        assert difference <= bound, f"scores differ by {difference}"
        if number >= WARM_UP:
            for which in (0, 1):
                spent[which].append(found[which][0])
    return spent


def rows(name: str, path: str, dtype: str, runs: int) -> Iterator[Row]:
    """Every kind of call on one model."""
    options: dict[str, Any] = {"device": "cpu", "model_kwargs": {"dtype": getattr(torch, dtype)}}
    ours = CrossEncoder(path, **options)
    theirs = sentence_transformers.CrossEncoder(path, **options)
    for count, query in itertools.product(COUNTS[name], ("new", "same")):
        pairs = calls(count, new_query=query == "new")
        mine, other = measure(ours, theirs, pairs, runs, MAX_DIFFERENCE[dtype])
        ratios = [x / y for x, y in zip(mine, other, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        medians = statistics.median(mine), statistics.median(other)
        yield Row(name, dtype, query, count, *medians, middle, (low, high))


def main() -> None:
    """Print a line of the page's table for every kind of call."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=101, help="calls of each, of every kind")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    about = provenance.made("python benchmarks/short_calls.py", *PACKAGES)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, path in checkpoints(Path(folder)).items():
            for dtype in args.dtypes:
                for row in rows(name, path, dtype, args.runs // SHARES[name]):
                    low, high = row.ratio_quartiles
                    print(
                        f"| {row.model} | {row.dtype} | {row.query} | {row.num_documents} "
                        f"| {row.packscore_ms:.2f} | {row.sentence_transformers_ms:.2f} "
                        f"| {row.ratio:.2f} ({low:.2f}-{high:.2f}) |",
                        flush=True,
                    )
                    found.append(asdict(row))
    if args.json:
        about["machine"]["load_at_end"] = provenance.load()
        args.json.write_text(json.dumps({**about, "runs": args.runs, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
