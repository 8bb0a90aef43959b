"""A model whose layers are kernels has a handful of programs, which serve every length.

Interpreted, memory that nobody wrote holds NaN, and so do the rows behind the last live tile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from helpers import LABELS, QWEN3, one_by_one, random_ids, random_qwen3
from packscore import MultiItemScorer, patch_model, program_of
from packscore.flows.costs import tpu_cost_model
from packscore.model.sizes import ModelSizes
from packscore.programs import engine, sizes
from packscore.programs.compiling import arguments_of
from packscore.programs.fused_layer import grid_steps
from packscore.programs.launch_inputs import LaunchInputs
from packscore.programs.pages import DevicePages
from packscore.programs.sizes import ProgramKey, program_key
from tolerances import PROBABILITY_MAX_FLOAT32

pytestmark = pytest.mark.usefixtures("quick_programs")

TILE = 128
SHIPPED = sizes.CAPACITIES  # as they are outside of this file's `scorer`
SIZES = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "hidden_size": 128}


@pytest.fixture(scope="module")
def scorer() -> Iterator[MultiItemScorer]:
    """A scorer whose programs have room for 128 and for 512 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "CAPACITIES", {128: TILE, 512: TILE})
        model = random_qwen3(**SIZES, num_layers=2, intermediate_size=256)
        scorer = MultiItemScorer(patch_model(model, device="jax"), label_token_ids=LABELS[:2])
        program: Any = program_of(model)
        program._executables.implementation = "pallas_interpret"
        program.max_tokens = 512
        assert program.warmup() == 2
        program.strict = True
        yield scorer


def call(scorer: MultiItemScorer, kind: str, prefix: list[int], items: list[list[int]]) -> Any:
    """(scores, usage, the labels, whether over them alone)."""
    labels = LABELS[:3] if kind == "labels" else LABELS[:2]
    options: dict[str, Any] = {"label_token_ids": labels, "return_usage": True}
    if kind == "prefix":
        with scorer.prefix(prefix) as held:
            found = held.score(items, **options)
    else:
        found = scorer.score(prefix, items, **options, apply_softmax=kind == "rank")
    return found, labels, kind == "rank"


def test_steps_of_grids_are_those_of_the_reference_job() -> None:
    """12 tiles of 1 024 tokens, 6 of 2 048 rows: as the prediction counts 0.48 ms of them."""
    key = program_key(12_000, 500, 2, 9, by_tiles=True)
    found = grid_steps(ModelSizes.of(QWEN3), 2, key, 2048, 12_000)
    assert found == 27 * (12 * 5 + 12 + 12 * 6 + 8 * 6 + 1) + 47 * 3 + 1
    with_steps = tpu_cost_model(ModelSizes.of(QWEN3), "v6e", 2, steps=lambda tokens: found)
    without = tpu_cost_model(ModelSizes.of(QWEN3), "v6e", 2)
    extra = with_steps.launch(12_000, 2e7) - without.launch(12_000, 2e7)
    assert extra == pytest.approx(0.481, abs=0.001)


KINDS = ("score", "rank", "prefix", "labels")


@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.long)])
def test_all_lengths_run_two_programs(scorer: MultiItemScorer, count: int) -> None:
    program: Any = program_of(scorer.model)
    before, rng = program.compile_count, np.random.default_rng(0)
    plain = random_qwen3(**SIZES, num_layers=2, intermediate_size=256)
    lengths, worst = set(), 0.0
    for k, total in enumerate(np.linspace(6, 500, count).astype(int).tolist()):
        num_items = int(rng.integers(1, 6))
        cuts = np.sort(rng.choice(np.arange(1, total), num_items, replace=False))
        lens = np.diff([*cuts, total]).tolist()
        prefix, items = random_ids(int(cuts[0]), seed=k), [random_ids(n, seed=n) for n in lens]
        found, labels, softmax = call(scorer, KINDS[k % len(KINDS)], prefix, items)
        assert found.usage.padding_tokens < TILE
        lengths.add(found.usage.computed_tokens)
        if k % 8 < 4:
            expected = one_by_one(plain, prefix, items, labels, apply_softmax=softmax)
            worst = max(worst, np.abs(np.array(found.scores) - expected.numpy()).max())
    assert len(lengths) >= 0.95 * count
    assert worst <= PROBABILITY_MAX_FLOAT32
    assert program.compile_count == before
    assert len(program._executables.by_key) == 2


def structure(inputs: LaunchInputs) -> Any:
    """What a program was compiled for: of each array its shape and dtype, and what is static."""
    leaves, tree = jax.tree.flatten(inputs)
    return [(np.shape(x), np.asarray(x).dtype) for x in leaves], tree


def test_forty_lengths_are_planned_for_the_programs_of_a_v6e(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Qwen3-0.6B's widths, layers, tiles, costs and pages; in the place of a chip, who counts."""
    monkeypatch.setattr(sizes, "CAPACITIES", SHIPPED)
    monkeypatch.setattr(engine, "chip_of", lambda device: "v6e")
    monkeypatch.setattr(DevicePages, "through", lambda pages, run, leases: run(pages.struct)[0])
    widths = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128, "hidden_size": 1024}
    model = random_qwen3(**widths, num_layers=1, intermediate_size=3072).bfloat16()
    scorer = MultiItemScorer(patch_model(model, device="jax"), label_token_ids=LABELS[:2])
    program: Any = program_of(model)
    program.sizes = ModelSizes.of(QWEN3)
    executables, launches = program._executables, Counter[ProgramKey]()
    executables.implementation = "pallas"

    def compiled(key: ProgramKey) -> Any:
        norm = executables._weights["norm"]["weight"]
        pool, inputs = arguments_of(key, program.sizes, norm, "v6e")
        expected = structure(inputs)

        def run(weights: Any, pages: Any, given: LaunchInputs) -> Any:
            assert (pages, structure(given)) == (pool, expected)
            launches[key] += 1
            logits = np.zeros((key.num_rows, key.num_labels), np.float32)
            return ((logits, logits[:, 0], logits[:, 0]),), pages

        executables.count += 1
        return run

    monkeypatch.setattr(executables, "_compile", compiled)
    assert program.warmup() <= 4
    program.strict = True
    before, rng, live = program.compile_count, np.random.default_rng(0), set()
    for k, total in enumerate(np.geomspace(8, 16_000, 40).astype(int).tolist()):
        num_items = min(int(rng.integers(1, 200)), total // 2)
        cuts = np.sort(rng.choice(np.arange(1, total), num_items, replace=False))
        lens = np.diff([*cuts, total]).tolist()
        prefix = random_ids(int(cuts[0]), seed=k)
        items = [random_ids(n, seed=1000 * k + j) for j, n in enumerate(lens)]
        launches.clear()
        found, *_ = call(scorer, KINDS[k % len(KINDS)], prefix, items)
        assert len(found.scores) == num_items
        # of each launch less than a tile
        assert found.usage.padding_tokens < sum(key.tile * n for key, n in launches.items())
        live.add(found.usage.computed_tokens)
    assert len(live) >= 38
    assert program.compile_count == before
