"""A dense mask in programs: the same scores in every flow, beside the segments of one model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from helpers import LABELS, engine_of, one_by_one, random_ids, random_qwen3
from packscore import (
    MaskTooLargeError,
    MultiItemScorer,
    UnexpectedCompileError,
    UnsupportedModelError,
    patch_model,
    program_of,
)
from packscore.flows.page_pool import PAGE_SIZE
from packscore.model import masks
from packscore.model.sizes import ModelSizes
from packscore.programs import dense, traced_model
from packscore.programs.dense import pair_bytes
from packscore.programs.sizes import DenseKey, ProgramKey
from tolerances import PROBABILITY_MAX_FLOAT32

pytestmark = pytest.mark.usefixtures("quick_programs")

QUERY = random_ids(149, seed=1)
ITEMS = [random_ids(n, seed=n) for n in (5, 33, 1, 0, 9, 21)]
CACHE_BYTES = 12 * ModelSizes.of(random_qwen3().config).page_bytes(PAGE_SIZE, 4)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return one_by_one(random_qwen3(), QUERY, ITEMS, LABELS)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return patch_model(random_qwen3(), device="jax")


def scorer_of(model: PreTrainedModel, mask_impl: Any) -> MultiItemScorer:
    options: dict[str, Any] = {"label_token_ids": LABELS, "prefix_cache_bytes": CACHE_BYTES}
    return MultiItemScorer(model, mask_impl=mask_impl, **options)


@pytest.fixture(scope="module")
def scorers(model: PreTrainedModel) -> dict[str, MultiItemScorer]:
    """Both on one model."""
    return {mask: scorer_of(model, mask) for mask in ("dense", "segment")}


def close(found: Any, expected: torch.Tensor) -> bool:
    return float((torch.tensor(found) - expected).abs().max()) <= PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize("flow", ["packed", "extend", "chunked"])
def test_both_masks_equal_one_by_one_and_each_other(
    scorers: dict[str, MultiItemScorer], expected: torch.Tensor, flow: Any
) -> None:
    found = {}
    for mask, scorer in scorers.items():
        scorer.clear_prefixes()
        if flow == "extend":
            scorer.prefix(QUERY).release()
        result = scorer.score(QUERY, ITEMS, flow=flow, return_usage=True)
        assert (result.usage.flow, result.usage.mask_impl) == (flow, mask)
        # where the query is in pages, its last token alone is computed again for the empty item
        assert result.usage.computed_prefix_tokens == (1 if flow == "extend" else len(QUERY))
        assert close(result.scores, expected)
        found[mask] = torch.tensor(result.scores)
    assert close(found["dense"].tolist(), found["segment"])


def test_masks_share_the_weights_and_no_executable(
    model: PreTrainedModel, scorers: dict[str, MultiItemScorer]
) -> None:
    for scorer in scorers.values():
        scorer.score(QUERY, ITEMS)
    engines = [engine_of(scorer) for scorer in scorers.values()]
    program: Any = program_of(model)
    assert {id(engine._program) for engine in engines} == {id(program)}
    weight: Any = model.get_decoder().norm.weight
    assert program._weights.arrays["norm"]["weight"].unsafe_buffer_pointer() == weight.data_ptr()
    keys = program._executables.by_key
    dense_keys = {key for key in keys if isinstance(key, DenseKey)}
    assert dense_keys
    assert keys.keys() - dense_keys
    assert engines[0].pool is not engines[1].pool


def test_a_held_query_beside_another(
    scorers: dict[str, MultiItemScorer], expected: torch.Tensor
) -> None:
    other = random_ids(260, seed=2)
    want = one_by_one(random_qwen3(), other, ITEMS, LABELS)
    dense, segment = scorers.values()
    with dense.prefix(QUERY) as first, dense.prefix(other) as second, segment.prefix(other) as same:
        for held, scores in ((second, want), (first, expected), (same, want)):
            found = held.score(ITEMS, return_usage=True)
            assert found.usage.computed_prefix_tokens == 1  # for the empty item
            assert close(found.scores, scores)
    assert engine_of(dense).pool.num_pinned_pages == 0


def test_warm_up_and_the_cache_on_disk_keep_them_apart(
    expected: torch.Tensor, tmp_path: Path
) -> None:
    counts = []
    for mask in ("segment", "dense", "dense"):
        model = patch_model(random_qwen3(), device="jax", compile_cache=tmp_path)
        program: Any = program_of(model)
        options: dict[str, Any] = {"max_tokens": 128}
        assert program.warmup(**options, mask_impl=mask, prefix_cache_bytes=0) == 1
        counts.append(len([path for path in tmp_path.iterdir() if "cache" in path.name]))
        program.strict = True
        both = {
            name: MultiItemScorer(
                model, label_token_ids=LABELS, mask_impl=name, prefix_cache_bytes=0
            )
            for name in ("segment", "dense")
        }
        want = one_by_one(random_qwen3(), QUERY[:9], ITEMS, LABELS, apply_softmax=True)
        for name, scorer in both.items():
            if name == mask:
                assert close(scorer.score(QUERY[:9], ITEMS, apply_softmax=True), want)
                continue
            with pytest.raises(UnexpectedCompileError, match=r"Key\(num_tokens=128"):
                scorer.score(QUERY[:9], ITEMS, apply_softmax=True)
    assert counts[0] < counts[1] == counts[2]  # the last one was loaded


class Memory:
    available = 0


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    """What jax's CPU and this machine have free; a test says how much that is."""
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    return Memory


def test_a_mask_is_refused_before_it_is_taken(
    model: PreTrainedModel, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(model, "dense")
    program: Any = program_of(model)
    count, runs = program.compile_count, []
    get = program._executables.get
    monkeypatch.setattr(program._executables, "get", lambda key: runs.append(key) or get(key))
    memory.available = 128 * 256 * pair_bytes(program.sizes, 4) - 1
    message = (
        r"mask_impl='dense' needs 2 MiB on .*cpu:0.* for 128 tokens that see up to 256 \(53 bytes "
        r"for each pair\); 2 MiB are free; use mask_impl='segment', which needs no mask"
    )
    for call in (lambda: scorer.score(QUERY, ITEMS), lambda: scorer.prefix(QUERY)):
        with pytest.raises(MaskTooLargeError, match=message):
            call()
    assert (runs, program.compile_count) == ([], count)
    assert engine_of(scorer).pool.num_pinned_pages == 0
    assert scorer_of(model, "segment").score(QUERY, ITEMS)  # which takes none
    assert runs


def test_a_large_request_is_cut_into_launches_whose_masks_fit(
    model: PreTrainedModel, memory: type[Memory], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = [random_ids(40, seed=k) for k in range(12)]
    scorer = scorer_of(model, "dense")
    program: Any = program_of(model)
    taken: list[int] = []
    check = dense.check_dense_fits

    def counted(model: Any, sizes: Any, itemsize: int, device: Any, key: Any, *rest: Any) -> None:
        check(model, sizes, itemsize, device, key, *rest)
        taken.append(key.num_tokens * key.num_keys * pair_bytes(sizes, itemsize))

    monkeypatch.setattr("packscore.programs.program.check_dense_fits", counted)
    # 256 tokens fit beside one page, and beside the query's no more than 128
    memory.available = 256 * 512 * pair_bytes(program.sizes, 4)
    found = scorer.score(QUERY, items, return_usage=True)
    assert found.usage.flow == "extend"  # of what the first try left in pages
    assert len(taken) > 2
    assert max(taken) <= memory.available
    assert close(found.scores, one_by_one(random_qwen3(), QUERY, items, LABELS))


def test_bytes_are_those_that_the_compiler_counts(model: PreTrainedModel) -> None:
    program: Any = program_of(model)
    key = DenseKey(512, 512, 64, num_pages=12, read_pages=4)
    needed = program._executables.get(key).memory_analysis().temp_size_in_bytes
    assert key.num_tokens * key.num_keys * pair_bytes(program.sizes, 4) == pytest.approx(
        needed, rel=0.05
    )


def test_a_large_mask_is_told(
    model: PreTrainedModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "TELL_MASK_BYTES", 2**20)
    with caplog.at_level(logging.WARNING, logger="packscore"):
        scorer_of(model, "dense").score(QUERY, ITEMS)
    assert "mask_impl='dense' needs" in caplog.text


WINDOW = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}


@pytest.mark.parametrize("flow", ["packed", "extend"])
def test_windows_that_differ_by_layer(monkeypatch: pytest.MonkeyPatch, flow: Any) -> None:
    reference = random_qwen3(**WINDOW)
    expected = one_by_one(reference, QUERY, ITEMS, LABELS)

    def found() -> Any:
        scorer = scorer_of(patch_model(random_qwen3(**WINDOW), device="jax"), "auto")
        assert scorer.mask_impl == "dense"
        if flow == "extend":
            scorer.prefix(QUERY).release()
        return scorer.score(QUERY, ITEMS, flow=flow)

    assert close(found(), expected)
    # the control: programs that see everything
    monkeypatch.setattr(traced_model, "windows_of", lambda model: [None, None])
    assert not close(found(), expected)


def test_segments_are_refused_where_only_a_mask_can_be() -> None:
    model = patch_model(random_qwen3(**WINDOW), device="jax")
    with pytest.raises(UnsupportedModelError, match="mask_impl='segment' is not exact"):
        scorer_of(model, "segment")
    # ordinary calls run under a mask of their own; short ones need none
    plain: Any = random_qwen3(**WINDOW)
    for length in (149, 30):
        ids = torch.tensor([QUERY[:length], random_ids(length, seed=4)])
        got = model(input_ids=ids).logits
        torch.testing.assert_close(got, plain(input_ids=ids).logits, atol=1e-4, rtol=0)
    keys = program_of(model)._executables.by_key
    kinds = {isinstance(key, DenseKey) for key in keys if isinstance(key, ProgramKey)}
    assert kinds == {True, False}
