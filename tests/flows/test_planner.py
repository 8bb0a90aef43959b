"""The planner takes the cheapest flow, divides items within the limits, and says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from helpers import QWEN3, engine_of, random_ids, random_qwen3
from packscore import InputError, MultiItemScorer, patch_model
from packscore.flows.costs import (
    CostModel,
    TpuCycles,
    flops_cost_model,
    measured_cost_model,
    tpu_cost_model,
    tpu_table,
)
from packscore.flows.engine import Limits
from packscore.flows.planner import Plan, Planner, Workload
from packscore.model.sizes import ModelSizes
from packscore.programs.sizes import token_bucket
from packscore_kernels.hardware import CHIPS, KNOWN_ERROR
from tolerances import COST_CALIBRATED, COST_FITTED, PROBABILITY_REORDERED

COSTS = {
    "v6e": tpu_cost_model(ModelSizes.of(QWEN3), "v6e", 2, token_bucket),
    "cpu": flops_cost_model(ModelSizes.of(random_qwen3().config)),
    "buckets": CostModel("test", 0.2, (1, 16_384), (0.003, 40.0), 2e-7, token_bucket),
    "dear launches": CostModel("test", 50.0, (1,), (0.01,), 1e-6),
    "dear pairs": CostModel("test", 0.01, (1,), (0.001,), 1e-4),
}


def workload(rng: np.random.Generator) -> Workload:
    prefix = int(rng.choice([0, 1, 20, 300, 2000, 9000]))
    count = int(rng.choice([1, 2, 7, 40, 300]))
    lens = np.sort(rng.integers(0, int(rng.choice([2, 30, 500])), count))
    cached = int(rng.choice([0, prefix // 2, prefix]))
    return Workload(prefix, cached, lens.astype(np.int64), bool(prefix and rng.random() < 0.8))


def cost_by_hand(planner: Planner, work: Workload, bounds: list[tuple[int, int]]) -> float:
    """The cost of a division, item by item."""
    total, cached = 0.0, work.cached_len if work.is_kept else 0
    for start, end in bounds:
        items = work.item_lens[start:end].tolist()
        own = work.prefix_len - cached
        own += int(own == 0 and work.prefix_len > 0 and 0 in items)
        pairs = own * cached
        pairs += sum(length * work.prefix_len + length * length / 2 for length in items)
        total += planner.costs.launch(own + sum(items), pairs, own * own / 2)
        cached = work.prefix_len if work.is_kept else 0
    return total


def every_division(work: Workload, limits: Limits) -> list[list[tuple[int, int]]]:
    """Greedy divisions of every launch size of a fine ladder, by a method of their own."""
    found = []
    for most in np.unique(np.geomspace(1, limits.max_tokens, 60).astype(int)):
        bounds, start, size = [], 0, 0
        cached = work.cached_len if work.is_kept else 0
        own = work.prefix_len - cached
        for i, length in enumerate(work.item_lens.tolist()):
            if i > start and own + size + length > max(most, own):
                bounds.append((start, i))
                start, size = i, 0
                own = 0 if work.is_kept else work.prefix_len
            size += length
        found.append([*bounds, (start, len(work.item_lens))])
    return found


@pytest.mark.parametrize("name", COSTS)
def test_the_choice_is_within_ten_percent_of_the_best(name: str) -> None:
    rng = np.random.default_rng(0)
    limits = Limits(16_384, 4096, 8)
    planner = Planner(COSTS[name], limits)
    flows = set()
    for _ in range(200):
        work = workload(rng)
        if not work.is_kept:
            work = Workload(work.prefix_len, 0, work.item_lens, False)
        chosen = planner.choose(work)
        flows.add(chosen.flow)
        own = [plan.cost_ms for plan in planner.explain(work).plans]
        others = [cost_by_hand(planner, work, b) for b in every_division(work, limits)]
        assert chosen.cost_ms <= 1.1 * min(own + others)
        if chosen.flow != "plain":
            by_hand = cost_by_hand(planner, work, list(chosen.bounds))
            assert chosen.cost_ms == pytest.approx(by_hand)
    assert flows >= {"packed", "extend"}


def check_bounds(plan: Plan, work: Workload, limits: Limits) -> None:
    assert plan.bounds[0][0] == 0
    assert plan.bounds[-1][1] == len(work.item_lens)
    cached = plan.prefix_ends[-1] if plan.prefix_ends else work.cached_len
    pieces = np.diff([work.cached_len, *plan.prefix_ends])
    assert ((pieces > 0) & (pieces <= limits.max_tokens)).all()
    for (start, end), following in zip(plan.bounds, [*plan.bounds[1:], None], strict=True):
        assert end > start
        assert following is None or following[0] == end
        if plan.flow != "plain" and end - start > 1:
            own = work.prefix_len - cached
            assert own + work.item_lens[start:end].sum() <= limits.max_tokens
        cached = work.prefix_len if work.is_kept else 0


@pytest.mark.parametrize("max_tokens", [1, 100, 4096])
@pytest.mark.parametrize("flow", ["packed", "extend", "chunked", "plain"])
def test_every_launch_is_within_the_limit_or_one_item(flow: Any, max_tokens: int) -> None:
    rng = np.random.default_rng(1)
    limits = Limits(max_tokens, max_tokens, 8)
    planner = Planner(COSTS["cpu"], limits)
    refused = 0
    for _ in range(60):
        work = workload(rng)
        if not work.is_kept:
            work = Workload(work.prefix_len, 0, work.item_lens, False)
        try:
            plan = planner.choose(work, flow)
        except InputError:
            refused += 1
            continue
        assert plan.flow == flow
        check_bounds(plan, work, limits)
    assert refused < 60


def test_nothing_is_refused_for_its_size() -> None:
    planner = Planner(COSTS["cpu"], Limits(64, 64, 1))
    for lens in ([10_000], [10_000, 10_000], [0, 0], [1] * 3000):
        for kept in (True, False):
            work = Workload(5000, 0, np.array(lens, np.int64), kept)
            check_bounds(planner.choose(work), work, planner.limits)


def test_explain_prints_the_alternatives(capsys: pytest.CaptureFixture[str]) -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()), label_token_ids=[1, 2])
    prefix, items = random_ids(500, seed=1), [random_ids(20, seed=k) for k in range(30)]
    found = scorer.explain(prefix, items)
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert "prefix 500 tokens, 0 of them in pages; 30 items, 600 tokens" in printed
    assert f"> {found.chosen.flow}" in printed
    assert "extend   500 prefix tokens are not in pages" in printed
    # and it is what runs
    result = scorer.score(prefix, items, return_usage=True)
    assert result.usage.flow == found.chosen.flow
    assert result.usage.computed_tokens == found.chosen.computed_tokens
    warm = scorer.explain(prefix, items)
    assert warm.chosen.flow == "extend"
    assert "packed   the prefix is in pages already" in str(warm)


def test_calibration_measures_this_model() -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()), label_token_ids=[1, 2])
    before = scorer.score([1, 2, 3], [[4], [5, 6]])
    scorer.calibrate(seconds=0.5)
    costs = engine_of(scorer).costs
    assert costs.source == "measured on this machine"
    assert costs.launch(1000, 0) > costs.launch(10, 0) > 0
    again = scorer.score([1, 2, 3], [[4], [5, 6]])
    assert torch.allclose(torch.tensor(before), torch.tensor(again), atol=PROBABILITY_REORDERED)


def test_measured_costs_are_those_of_the_machine() -> None:
    """A machine whose costs are known: 2 ms a launch, 10 us a token, 1 ns a pair."""
    truth = CostModel("truth", 2.0, (1, 1_000_000), (0.01, 10_000.0), 1e-6)

    def timed(prefix_len: int, item_lens: Any) -> float:
        tokens = prefix_len + sum(item_lens)
        return truth.launch(tokens, prefix_len**2 / 2 + sum(item_lens) * prefix_len)

    found = measured_cost_model(timed, COSTS["cpu"], 100.0)
    for tokens, pairs in ((100, 0.0), (4000, 1e6), (20_000, 1e7)):
        assert found.launch(tokens, pairs) == pytest.approx(
            truth.launch(tokens, pairs), rel=COST_CALIBRATED
        )
    # out of time after the first launches
    assert len(measured_cost_model(timed, COSTS["cpu"], 0.001).tokens) == 1


@pytest.mark.parametrize("chip", ["v6e", "v5e"])
def test_the_costs_of_a_tpu_are_those_of_its_schedules(chip: str) -> None:
    """At every program that was counted, and for models of other sizes by their arithmetic."""
    table = tpu_table(chip)
    assert "predicted, not measured" in table["kind"]
    assert set(table["versions"]) == {"jax", "libtpu"}
    facts, cycles = CHIPS[chip], TpuCycles(**table["cycles"])
    for point in table["points"]:
        small = point["model"] == "0.6B"
        heads = 16 if small else 32
        shape = (
            ModelSizes(28, 16, 8, 128, 1024, 3072)
            if small
            else ModelSizes(36, 32, 8, 128, 2560, 9728)
        )
        prefix, count, length = point["prefix_len"], point["num_items"], point["item_len"]
        pairs = cycles.causal * prefix**2 / 2
        pairs += cycles.pair * count * (length * prefix + length**2 / 2)
        fitted = point["num_tokens"] * cycles.of_token(shape, facts.peak_flops / facts.clock_hz)
        fitted += shape.layers * heads * pairs + cycles.of_launch(shape)
        error = fitted / (1e-3 * facts.clock_hz * sum(point["parts_ms"].values())) - 1
        print(f"{chip} {point['model']} {point['num_tokens']:6} tokens: {error:+.1%}")
        assert abs(error) <= COST_FITTED


def test_a_tpu_launch_costs_at_least_its_weights() -> None:
    costs = tpu_cost_model(ModelSizes.of(QWEN3), "v6e", 2, token_bucket)
    assert costs.source == "from the compiler's schedule for v6e, predicted"
    weights_ms = 1e3 * 2 * 28 * 15_728_640 / 1.64e12
    assert costs.launch(1, 0) - costs.launch_ms == pytest.approx(weights_ms)
    # the reference job, as the whole program's schedule has it
    (reference,) = [p for p in tpu_table("v6e")["points"] if p["num_items"] == 500]
    expected_ms = sum(reference["parts_ms"].values())
    assert costs.launch(12_000, 20.1e6, 2e6) == pytest.approx(expected_ms, rel=COST_FITTED)
    assert costs.launch(24_576, 0) - costs.launch_ms == pytest.approx(
        2 * (costs.launch(12_288, 0) - costs.launch_ms)
    )
    # what is predicted is printed with its known error; what is measured has none
    explained = Planner(costs, Limits(32_768, 32_768, 8)).explain(
        Workload(100, 0, np.array([20]), True)
    )
    assert str(explained).splitlines()[-1] == explained.known_error == KNOWN_ERROR
    measured = measured_cost_model(lambda prefix, items: 1.0, costs, 1.0)
    assert measured.known_error == flops_cost_model(ModelSizes.of(QWEN3)).known_error == ""
    # a chip that was never compiled for says so
    other = tpu_cost_model(ModelSizes.of(QWEN3), "v5p", 2, token_bucket)
    assert other.source == (
        "from the compiler's schedule for v6e and the published peak of v5p, predicted"
    )
    assert other.launch(12_000, 22.1e6) == pytest.approx(2 * costs.launch(12_000, 22.1e6))
