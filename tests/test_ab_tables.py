"""The A/B tables: the JSON adds up, docs/ab.md shows it, and wrong scores are never timed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import ab_measure
import ab_pictures
import ab_tables
import cpu_peers
from packscore_kernels import Group, SegmentLayout, build_schedule, segment_paged_attention
from packscore_kernels.attention.types import BlockSizes
from predict_tpu import dense_attention
from tolerances import KERNEL_FLOAT32, PROBABILITY_MAX_FLOAT32
from tpu_compiler.program import Cost, instructions, summary

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = ab_tables.load()
    return found


def test_every_part_says_where_it_comes_from(results: dict[str, Any]) -> None:
    for part in (*results["predicted"].values(), results["measured"]):
        made = part["made"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", made["date"])
        assert re.fullmatch(r"[0-9a-f]{7,}\+?", made["commit"])
        assert made["command"].startswith("python benchmarks/ab_tables.py")
        assert made["machine"]["cpu"]
        assert made["machine"]["cores"] >= 1
        assert {"torch", "transformers", "jax", "libtpu", "torchax"} <= set(made["versions"])


def test_no_row_is_missing(results: dict[str, Any]) -> None:
    assert set(results["predicted"]) == set(ab_tables.CHIPS)
    for chip, part in results["predicted"].items():
        rows = [(row["mask"], row["flow"]) for row in part["rows"]]
        assert rows == [(mask, flow) for mask in ab_tables.MASKS for flow in ab_tables.FLOWS]
        for one in part["programs"]:
            assert one["chip"] == chip
            assert one.get("refused") or one["ms"] > 0
    published = [one["items_per_s"] for one in results["published"]]
    assert published == [52, 105, 518, 1850, 29_000]
    for one in results["measured"]["results"]:
        assert [row["system"] for row in one["rows"]] == [
            "one by one",
            "dense packed",
            "dense prefill + extend",
            "segment packed",
            "segment prefill + extend",
        ]


def test_derived_numbers_follow_from_the_others(results: dict[str, Any]) -> None:
    for part in results["predicted"].values():
        assert ab_tables.predicted_rows(part["programs"]) == part["rows"]
        for one in part["programs"]:
            if "ms" in one:
                assert sum(one["parts_ms"].values()) == pytest.approx(one["ms"])
                # no faster than its cycles alone, or its bytes alone
                assert one["ms"] >= 0.999 * max(one["cycles_ms"], one["hbm_ms"])
        for row in part["rows"]:
            if "ms" in row:
                assert sum(row["parts_ms"].values()) == pytest.approx(row["ms"])
                assert row["items_per_s"] == pytest.approx(500 / row["ms"] * 1e3)
    for one in results["measured"]["results"]:
        for row in one["rows"]:
            assert row["items_per_s"] == pytest.approx(1e3 * one["num_items"] / row["ms"])
            assert row["ms_min"] <= row["ms"] <= row["ms_max"]
            assert row["max_difference"] <= PROBABILITY_MAX_FLOAT32


def test_the_page_shows_the_results(results: dict[str, Any]) -> None:
    text = (ROOT / "docs/ab.md").read_text()
    assert ab_pictures.page(text, results) == text
    for name in ab_tables.tables(results):
        assert f"<!-- table: {name} -->\n" in text, f"docs/ab.md has no place for {name!r}"
    # and would not, were a number another
    results = {**results, "published": [{**results["published"][0], "items_per_s": 53}]}
    assert ab_pictures.page(text, results) != text


def test_the_charts_show_the_results(results: dict[str, Any], tmp_path: Path) -> None:
    # matplotlib notes each text it draws as a comment
    def texts(path: Path) -> list[str]:
        return re.findall(r"<!-- (.+?) -->", path.read_text())

    for name, figure in ab_pictures.pictures(results).items():
        figure.savefig(tmp_path / name)
        assert texts(tmp_path / name) == texts(ROOT / "docs/pictures" / name)
        assert f"(pictures/{name})" in (ROOT / "docs/ab.md").read_text()


@pytest.fixture(scope="module")
def tiny() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def workload() -> Any:
    return cpu_peers.Workload("tiny", 20, (5, 3, 7), 2)


@pytest.mark.parametrize("device", [None, "jax"])
@pytest.mark.usefixtures("quick_programs")
def test_a_tiny_model_is_measured(
    tiny: Qwen3ForCausalLM, workload: Any, device: str | None
) -> None:
    systems = ab_measure.systems_of(tiny, device)
    rows = ab_measure.measure(systems, workload, 2, PROBABILITY_MAX_FLOAT32)
    assert [row["system"] for row in rows] == list(systems)
    base = rows[0]
    assert (base["scaled_from_items"], base["times_one_by_one"]) == (2, 1.0)
    for row in rows:
        assert row["items_per_s"] == pytest.approx(3e3 / row["ms"])


@pytest.mark.parametrize("error", [1e-3, float("nan")], ids=["off", "nan"])
def test_wrong_scores_are_not_timed(tiny: Qwen3ForCausalLM, workload: Any, error: float) -> None:
    systems = ab_measure.systems_of(tiny)
    right = systems["segment packed"]
    calls: list[Any] = []

    def wrong(prefix: list[int], items: list[list[int]]) -> torch.Tensor:
        calls.append((prefix, items))
        return right(prefix, items) + error

    few = {"one by one": systems["one by one"], "wrong": wrong}
    with pytest.raises(ab_measure.WrongScoresError, match=r"wrong is .* off one-by-one"):
        ab_measure.measure(few, workload, 2, PROBABILITY_MAX_FLOAT32)
    assert len(calls) == 1  # the round before the timed ones


def test_no_query_is_seen_twice(workload: Any) -> None:
    rounds = [ab_measure.inputs_of(workload, number) for number in range(5)]
    assert len({tuple(prefix) for prefix, _ in rounds}) == 5
    assert len({tuple(item) for _, items in rounds for item in items}) == 15


def test_dense_attention_of_the_prediction_computes_the_same() -> None:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    q, k, v, pages = (normal(4, 128, 16), normal(2, 128, 16), normal(2, 128, 16), None)
    items = np.array([20, 30, 5], np.int32)
    cached = Group(0, items, 40, np.array([2, 0, 1], np.int32))
    for group, page_size in ((Group(33, items), 0), (cached, 16)):
        layout = SegmentLayout((group,), 128)
        schedule = build_schedule(
            layout,
            block_sizes=BlockSizes(128, 128, 128),
            page_size=page_size,
            max_pages=8 if page_size else 0,
        )
        pages = normal(3, 2, 2, 16, 16) if page_size else None
        want = segment_paged_attention(
            q, k, v, pages, layout, sm_scale=0.25, implementation="reference"
        )
        real = layout.num_real_tokens
        for num_pages in (None, len(group.page_indices)):  # the whole table, and what is used
            got = dense_attention(q, k, v, pages, schedule, sm_scale=0.25, num_pages=num_pages)
            assert float(jnp.abs(got - want)[:, :real].max()) <= KERNEL_FLOAT32


HLO = """HloModule program
%body.1 (arg: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %stack = bf16[28,64,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  ROOT %fusion.7 = bf16[8,64]{1,0:T(8,128)(2,1)} fusion(%x, %stack), kind=kOutput
}
%condition.1 (arg: (s32[], bf16[8,64])) -> pred[] {
  %most = s32[]{:T(128)} constant(28), backend_config={}
  ROOT %less = pred[]{:T(512)} compare(%i, %most), direction=LT
}
ENTRY %main (a: bf16[8,64]) -> f32[8] {
  %a = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %loop = (s32[], bf16[8,64]) while(%t), condition=%condition.1, body=%body.1, metadata={}
  ROOT %fusion.9 = f32[8]{0:T(128)} fusion(%a), kind=kLoop
}
"""


def test_a_program_is_counted_by_its_text(tmp_path: Path) -> None:
    files = []
    for name in ("fusion.7", "fusion.9", "fusion.70"):
        files.append(tmp_path / f"1-{name}-01-packed-bundles-post-ra.txt")
        files[-1].write_text("")
    found = instructions(
        HLO,
        list(map(str, files)),
        cost_of=lambda name, path: Cost(1000.0, 5.0, 4) if name == "fusion.9" else None,
        layers=28,
    )
    inner, last = found  # fusion.70 is of another program
    # in HBM: a layer's 64 x 64 and the result of 8 x 64, both padded to 128 lanes
    assert (inner.name, inner.times, inner.hbm_bytes) == ("fusion.7", 28, 2 * 128 * (64 + 8))
    assert inner.milliseconds(clock_hz=1e6, hbm_bytes_per_s=1e6) == pytest.approx(28 * 18.432)
    assert (last.name, last.times, last.hbm_bytes) == ("fusion.9", 1, 5.0)
    assert last.milliseconds(clock_hz=1e6, hbm_bytes_per_s=1e6) == pytest.approx(1.0)
    assert summary(found, 1e6, 1e6)["grid_step_ms"] == pytest.approx(4 * 90e-6)


def test_a_loop_whose_turns_are_data_is_counted_as_told(tmp_path: Path) -> None:
    schedule = tmp_path / "1-fusion.7-01-packed-bundles-post-ra.txt"
    schedule.write_text("")
    traced = HLO.replace("constant(28)", "get-tuple-element(%arg), index=3")
    (inner,) = instructions(traced, [str(schedule)], turns_of=lambda line: 3 * ("%loop" in line))
    assert (inner.name, inner.times) == ("fusion.7", 3)


def test_a_few_layers_are_counted_as_all_of_a_models(tmp_path: Path) -> None:
    """The loop over all but the last, and what gives a stack outside of it."""
    files = [
        tmp_path / f"1-{name}-01-packed-bundles-post-ra.txt" for name in ("fusion.7", "copy.1")
    ]
    for file in files:
        file.write_text("")
    stack = "bf16[13,64,128]{2,1,0:T(8,128)(2,1)}"
    copied = f"  %w = {stack} parameter(1)\n  %copy.1 = {stack} copy(%w)\n  ROOT"
    text = HLO.replace("constant(28)", "constant(12)").replace("bf16[28,64,64]", "bf16[13,64,64]")
    head, _, entry = text.rpartition("  ROOT")
    inner, copy = instructions(
        f"{head}{copied}{entry}", list(map(str, files)), layers=13, all_layers=39
    )
    assert (inner.name, inner.times, inner.hbm_bytes) == ("fusion.7", 38, 2 * 128 * (64 + 8))
    assert (copy.times, copy.hbm_bytes) == (1, 2 * 2 * 39 * 64 * 128)
