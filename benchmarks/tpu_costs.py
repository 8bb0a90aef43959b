"""What the planner needs to know of a TPU: a few coefficients, fitted to the compiler's schedules.

    python benchmarks/tpu_costs.py --chip v6e                   compiles every point, minutes each
    python benchmarks/tpu_costs.py --chip v6e --figures FILE    from earlier predict_tpu.py --json

Every point is a whole program, counted by `predict_tpu.py` in a process of its own. Products take
what the chip's published peak says, some cycles for each column they write, and some for each
weight, once; the rest and attention are lines. Writes plugin/packscore/tpu_costs/<chip>.json, with
the points which a test compares with the fit. Predictions, not measurements.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

import provenance
from packscore.model.sizes import ModelSizes
from packscore_kernels.hardware import CHIPS
from workloads import REFERENCE, config_of

HERE = Path(__file__).parent
TABLES = HERE.parent / "plugin" / "packscore" / "tpu_costs"
ITEM_LEN = REFERENCE.item_len
# (model, query tokens, items of so many)
POINTS = (
    ("0.6B", 100, 7),
    ("0.6B", 300, 36),
    ("0.6B", 4000, 4),
    ("4B", 1000, 150),
    ("0.6B", REFERENCE.prefix_len, REFERENCE.num_items),
)


def figures(chip: str) -> list[dict[str, Any]]:
    """Compile and count every point."""
    found = []
    for model, prefix, items in POINTS:
        command = [sys.executable, str(HERE / "predict_tpu.py"), "--chip", chip, "--model", model]
        command += ["--prefix", str(prefix), "--items", str(items), "--item-len", str(ITEM_LEN)]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(done.stdout.splitlines()[-1], flush=True)
    return found


def fit(points: list[dict[str, Any]], clock_hz: float, peak_flops: float) -> dict[str, float]:
    """Coefficients of small errors relative to each point's whole program.

    Each part is fitted by itself: by least squares, with no coefficient below 0 (what no point
    shows is 0). Points that it misses most gain weight (Lawson's algorithm), and the fit whose
    worst point is best is kept.
    """
    cycles = {
        part: np.array([1e-3 * clock_hz * point["parts_ms"][part] for point in points])
        for part in points[0]["parts_ms"]
    }
    total = sum(cycles.values())
    shapes = [ModelSizes.of(config_of(point["model"])) for point in points]
    tokens = np.array([point["num_tokens"] for point in points], float)
    layers = np.array([shape.layers for shape in shapes], float)
    heads = layers * [shape.heads for shape in shapes]
    causal, others = np.array([pairs_of(point) for point in points]).T
    at_peak = 2 * tokens * layers * [shape.weights for shape in shapes] * clock_hz / peak_flops
    # by part: what the peak does not say of it, and what that is proportional to
    parts = (
        (
            cycles["matmuls"] - at_peak,
            {
                "column": tokens * layers * [shape.columns for shape in shapes],
                "weight": np.array([float(shape.all_weights) for shape in shapes]),
            },
        ),
        (
            cycles["rest"] + cycles["once"],
            {"rotated": tokens * layers * [shape.q + shape.kv for shape in shapes]},
        ),
        (
            cycles["attention"],
            {
                "pair": heads * others,
                "causal": heads * causal,
                "row": heads * tokens,
                "head": heads,
            },
        ),
    )
    coefficients: dict[str, float] = {}
    for values, columns in parts:
        matrix, wanted = np.stack(list(columns.values()), 1) / total[:, None], values / total
        weights, best, worst = np.ones(len(points)), np.zeros(len(columns)), np.inf
        for _ in range(100):
            root = np.sqrt(weights)
            solved, _ = nnls(matrix * root[:, None], wanted * root)
            errors = np.abs(matrix @ solved - wanted)
            if errors.max() < worst:
                best, worst = solved, errors.max()
            weights *= errors
            weights /= weights.sum()
        coefficients |= dict(zip(columns, best.tolist(), strict=True))
    return coefficients


def pairs_of(point: dict[str, Any]) -> tuple[float, float]:
    """(row, key) pairs that see each other: of the query's rows among themselves, and others."""
    prefix, items, length = (point[name] for name in ("prefix_len", "num_items", "item_len"))
    return prefix**2 / 2, items * (length * prefix + length**2 / 2)


def main() -> None:
    """Fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", choices=sorted(CHIPS), required=True)
    parser.add_argument("--figures", type=Path, help="lines of predict_tpu.py --json")
    parser.add_argument("--date", default=provenance.today(), help="of the figures")
    args = parser.parse_args()
    if args.figures:
        points = [json.loads(line) for line in args.figures.read_text().splitlines()]
    else:
        points = figures(args.chip)
    facts = CHIPS[args.chip]
    cycles = fit(points, facts.clock_hz, facts.peak_flops)
    names = ("model", "prefix_len", "num_items", "item_len", "num_tokens", "parts_ms")
    table = {
        "chip": args.chip,
        "kind": "fitted to the compiler's schedules: predicted, not measured",
        "date": args.date,
        "versions": provenance.versions("jax", "libtpu"),
        "command": f"python benchmarks/tpu_costs.py --chip {args.chip}",
        "cycles": {name: float(f"{value:.4g}") for name, value in cycles.items()},
        "points": [{name: point[name] for name in names} for point in points],
    }
    TABLES.mkdir(exist_ok=True)
    (TABLES / f"{args.chip}.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table["cycles"]))


if __name__ == "__main__":
    main()
