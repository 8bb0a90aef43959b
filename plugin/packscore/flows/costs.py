"""What a launch costs: by its arithmetic, measured, or from a TPU compiler's schedule."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from packscore.model.sizes import ModelSizes
from packscore_kernels.hardware import CHIPS, KNOWN_ERROR

# A CPU core, until a calibration says better; only the ratios decide.
FLOPS_PER_MS = 2e8
LAYER_LAUNCH_MS = 0.25
# Launches that a calibration times, in tokens, and the items they consist of.
CALIBRATION_TOKENS = (32, 256, 1024, 4096)
CALIBRATION_ITEM = 32
# A step of a kernel's grid on a TPU: memory's answer, which no schedule shows (90 ns, from public
# measurements of kernels with many short steps).
GRID_STEP_MS = 90e-6
# The source of costs that nobody measured: only their ratios mean something.
FROM_SHAPE = "estimated from the model's shape"
# The chip whose schedule speaks for those that have no table.
REFERENCE_CHIP = "v6e"


def _no_steps(num_tokens: int) -> int:
    return 0


@dataclass(frozen=True)
class CostModel:
    """Predicted milliseconds of one launch.

    Args:
      source: where the numbers come from, for `explain`.
      launch_ms: what a launch costs whatever its size.
      tokens: ascending launch sizes at which the cost of everything but attention is known.
      tokens_ms: that cost; between the sizes it is interpolated, beyond the last extrapolated.
      pair_ms: one query row that sees one key, all layers and heads.
      padded: the tokens that a launch of so many runs with.
      causal_pair_ms: one such pair among the rows of one prefix, which see ever more of it; None
        is what others cost.
      steps: of kernels' grids, in a launch of so many tokens.
      known_error: how far such costs were off where others measured; empty where nobody did.
    """

    source: str
    launch_ms: float
    tokens: tuple[float, ...]
    tokens_ms: tuple[float, ...]
    pair_ms: float
    padded: Callable[[int], int] = int
    causal_pair_ms: float | None = None
    steps: Callable[[int], int] = _no_steps
    known_error: str = ""

    def launch(self, num_tokens: int, num_pairs: float, causal_pairs: float = 0.0) -> float:
        """Milliseconds of a launch.

        Args:
          num_tokens: tokens it computes.
          num_pairs: (row, key) pairs that see each other, but for
          causal_pairs: those of rows and keys of one prefix, both computed here.
        """
        size = self.padded(num_tokens)
        last, ms = self.tokens[-1], self.tokens_ms[-1]
        grown = max(size - last, 0) * ms / last
        causal_ms = self.pair_ms if self.causal_pair_ms is None else self.causal_pair_ms
        return (
            self.launch_ms
            + float(np.interp(size, self.tokens, self.tokens_ms))
            + grown
            + num_pairs * self.pair_ms
            + causal_pairs * causal_ms
            + GRID_STEP_MS * self.steps(num_tokens)
        )


def flops_cost_model(
    sizes: ModelSizes, padded: Callable[[int], int] = int, *, whole_last: bool = False
) -> CostModel:
    """A CPU's costs from the model's arithmetic, for want of a calibration.

    The ratios are those of the 0.6B's layers on one core of an AMD EPYC in bfloat16 (measured): a
    launch costs what some ten tokens do, and activations beyond its caches a fifth more a token. Of
    the last layer a token costs keys and values, unless it runs whole; the rows read are left out.
    """
    layers = sizes.layers - int(not whole_last)
    last = 0 if whole_last else 2 * sizes.hidden * sizes.kv
    token_ms = 2 * (layers * sizes.weights + last) / FLOPS_PER_MS
    return CostModel(
        source=FROM_SHAPE,
        launch_ms=sizes.layers * LAYER_LAUNCH_MS + 8 * token_ms,
        tokens=(1, 4096, 12_288),
        tokens_ms=(token_ms, 4096 * token_ms, 12_288 * 1.2 * token_ms),
        pair_ms=4 * layers * sizes.q / FLOPS_PER_MS,
        padded=padded,
    )


def measured_cost_model(
    timed: Callable[[int, Sequence[int]], float], before: CostModel, seconds: float
) -> CostModel:
    """Costs from a few launches of growing size, until the time is used up.

    Args:
      timed: milliseconds of a launch of (prefix tokens, tokens of each item).
      before: the costs to replace, whose padding is kept.
      seconds: about how long measuring may take.
    """
    spent, sizes, found = 0.0, [], []
    for size in CALIBRATION_TOKENS:
        items = [min(size, CALIBRATION_ITEM)] * max(size // CALIBRATION_ITEM, 1)
        runs = [timed(0, items) for _ in range(2)]  # the first may compile or allocate
        spent += sum(runs)
        sizes.append(sum(items))
        found.append(min(runs))
        if spent * 4 > 1e3 * seconds:  # the next size takes about four times as long
            break
    rest, prefix = [CALIBRATION_ITEM] * max(sizes[-1] // CALIBRATION_ITEM, 1), sizes[-1]
    # the same tokens with and without a prefix before them: what remains is what pairs cost
    both = min(timed(prefix, rest) for _ in range(2))
    alone = min(timed(0, [*rest, *rest]) for _ in range(2))
    pairs = prefix**2 / 2 + sum(rest) * prefix
    launch = max(found[0] - sizes[0] * (found[-1] / sizes[-1]), 0.0)
    return replace(
        before,
        source="measured on this machine",
        launch_ms=launch,
        tokens=tuple(sizes),
        tokens_ms=tuple(max(ms - launch, 1e-6) for ms in found),
        pair_ms=max(both - alone, 0.0) / pairs,
        causal_pair_ms=None,
        steps=_no_steps,  # they are in what was timed
        known_error="",
    )


@dataclass(frozen=True)
class TpuCycles:
    """Cycles of a chip that its published peak does not tell, from the compiler's schedule.

    Args:
      column: of products, beyond the peak: a token and column.
      rotated: of norms, rotations and the like: a token and column of queries and keys.
      pair: of attention: a (row, key) pair and head, of head_dim 128.
      causal: the same of the rows of one prefix among themselves.
      row: of attention: a token and head.
      head: of attention: a launch, layer and head.
      weight: of the waiting for weights that nothing hides: a launch and weight.
    """

    column: float
    rotated: float
    pair: float
    causal: float
    row: float
    head: float
    weight: float

    def parts(
        self,
        sizes: ModelSizes,
        flops_per_cycle: float,
        num_tokens: int,
        num_pairs: float,
        causal_pairs: float,
    ) -> dict[str, float]:
        """Cycles of one launch, by part; together what the methods below give."""
        heads, qkv = sizes.layers * sizes.q / 128, sizes.q + 2 * sizes.kv
        kernels = {  # (weights, columns) of a layer
            "project_qkv": (sizes.hidden * qkv, qkv),
            "project_out": (sizes.hidden * sizes.q, sizes.hidden),
            "gated_mlp": (3 * sizes.hidden * sizes.inner, sizes.hidden + 2 * sizes.inner),
        }
        found = {
            name: sizes.layers * num_tokens * (2 * w / flops_per_cycle + self.column * columns)
            for name, (w, columns) in kernels.items()
        }
        rotated = self.rotated * (sizes.q + sizes.kv)
        found["project_qkv"] += sizes.layers * num_tokens * rotated
        pairs = self.pair * num_pairs + self.causal * causal_pairs
        found["attention"] = heads * (pairs + self.row * num_tokens + self.head)
        return {**found, "rest": self.weight * sizes.all_weights}

    def of_token(self, sizes: ModelSizes, flops_per_cycle: float) -> float:
        """Cycles of one token in all layers, but for the keys it sees."""
        layer = 2 * sizes.weights / flops_per_cycle + self.column * sizes.columns
        layer += self.rotated * (sizes.q + sizes.kv) + self.row * sizes.q / 128
        return layer * sizes.layers

    def of_launch(self, sizes: ModelSizes) -> float:
        """Cycles that a launch takes beside those of its tokens and pairs."""
        return self.head * sizes.layers * sizes.q / 128 + self.weight * sizes.all_weights


@functools.cache
def tpu_table(chip: str) -> dict[str, Any]:
    """A chip's table, as `benchmarks/tpu_costs.py` wrote it; empty where there is none."""
    file = resources.files("packscore") / "tpu_costs" / f"{chip}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def predicted_parts(
    sizes: ModelSizes, chip: str, num_tokens: int, num_pairs: float, causal_pairs: float = 0.0
) -> dict[str, float]:
    """Milliseconds of one launch on a chip, by part; empty where there is no table of it."""
    table = tpu_table(chip)
    if not table:
        return {}
    facts = CHIPS[chip]
    cycles = TpuCycles(**table["cycles"])
    pairs = num_pairs, causal_pairs
    found = cycles.parts(sizes, facts.peak_flops / facts.clock_hz, num_tokens, *pairs)
    return {part: 1e3 * count / facts.clock_hz for part, count in found.items()}


def tpu_cost_model(
    sizes: ModelSizes,
    chip: str,
    itemsize: int,
    padded: Callable[[int], int] = int,
    steps: Callable[[int], int] | None = None,
) -> CostModel:
    """A TPU's costs as its compiler schedules Qwen3's programs, scaled by arithmetic.

    A launch reads all weights once: most of that hides behind the work of many tokens and bounds
    that of few. What the host does is not in it.

    Args:
      sizes: of the model.
      chip: a name in `hardware.CHIPS`; one without a table gets the v6e's, by its peak.
      itemsize: bytes of a weight.
      padded: the tokens that a launch of so many runs with.
      steps: of kernels' grids, in such a launch.
    """
    known = bool(tpu_table(chip))
    table = tpu_table(chip if known else REFERENCE_CHIP)
    facts = CHIPS[chip if known else REFERENCE_CHIP]
    scale = 1.0 if known else facts.peak_flops / CHIPS[chip].peak_flops
    source = f"from the compiler's schedule for {facts.name}"
    source += ", predicted" if known else f" and the published peak of {chip}, predicted"
    cycles = TpuCycles(**table["cycles"])
    cycle_ms = 1e3 * scale / facts.clock_hz
    token_ms = cycle_ms * cycles.of_token(sizes, facts.peak_flops / facts.clock_hz)
    weights_ms = 1e3 * sizes.all_weights * itemsize / CHIPS[chip].hbm_bytes_per_s
    hidden_tokens = max(weights_ms / token_ms, 1.0)  # whose work takes as long as the weights
    heads = sizes.layers * sizes.q / 128
    return CostModel(
        source=source,
        launch_ms=cycles.of_launch(sizes) * cycle_ms,
        tokens=(1, hidden_tokens),
        tokens_ms=(hidden_tokens * token_ms, hidden_tokens * token_ms),
        pair_ms=cycles.pair * heads * cycle_ms,
        padded=padded,
        causal_pair_ms=cycles.causal * heads * cycle_ms,
        steps=steps or _no_steps,
        known_error=KNOWN_ERROR,
    )
