"""What must hold on a chip; without one the same functions run on jax's CPU.

    pytest -m tpu -n 0 tests/tpu

needs a TPU that no other process holds. Real weights of Qwen3-0.6B are taken where they are in
Hugging Face's cache, random ones of its shape elsewhere; on the CPU a small model of its kind.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from helpers import QWEN3, VOCAB_SIZE, logits_one_by_one, probabilities, random_ids, random_qwen3
from packscore import MultiItemScorer, patch_model
from packscore.calls import program_of
from packscore.results import MaskChoice
from packscore.verify import twin_of
from packscore_kernels import Group, SegmentLayout, segment_paged_attention
from tolerances import PROBABILITY_MAX_FLOAT32

LABELS = [5, 17]
QUERY = random_ids(150, seed=1)
ITEMS = [random_ids(n, seed=k) for k, n in enumerate((20, 1, 7, 0, 33, 20, 64))]
BETWEEN_MASKS = 1e-4
DEVICES = ["jax", pytest.param("tpu", marks=pytest.mark.tpu)]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Any:
    if request.param == "jax":  # its compiler's optimisations change nothing, and take long
        request.getfixturevalue("quick_programs")
    return request.param


@pytest.fixture(scope="module")
def models(device: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(patched for the device, as it was loaded), in float32, of the same weights."""
    model = _real_or_random() if device == "tpu" else random_qwen3(head_dim=128)
    return patch_model(twin_of(model), device=device), model


def _real_or_random() -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", dtype=torch.float32).eval()
    except OSError:
        torch.manual_seed(0)
        model: PreTrainedModel = Qwen3ForCausalLM(QWEN3).eval()
        return model


def scorer_of(model: PreTrainedModel, mask_impl: MaskChoice = "segment") -> MultiItemScorer:
    return MultiItemScorer(model, label_token_ids=LABELS, mask_impl=mask_impl)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_equals_its_reference(device: str, dtype: str) -> None:
    heads, kv_heads, head_dim, page_size = 4, 2, 128, 16
    groups = (
        Group(40, np.array([20, 1, 33], np.int32)),
        Group(3, np.array([9, 0], np.int32), 20, np.array([5, 2], np.int32)),
    )
    layout = SegmentLayout(groups, 128)
    rng = np.random.default_rng(0)

    def array(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = array(heads, layout.num_tokens, head_dim)
    k, v = (array(kv_heads, layout.num_tokens, head_dim) for _ in range(2))
    pages = array(8, kv_heads, 2, page_size, head_dim)
    given = q, k, v, pages, layout
    options: dict[str, Any] = {"sm_scale": head_dim**-0.5}
    with jax.default_device(jax.devices("tpu" if device == "tpu" else "cpu")[0]):
        found = segment_paged_attention(*given, **options)
    expected = segment_paged_attention(*given, **options, implementation="reference")
    bound = 1e-5 if dtype == "float32" else 0.02
    assert jnp.abs(found.astype(jnp.float32) - expected.astype(jnp.float32)).max() <= bound


def test_scores_are_those_of_eager_torch(models: Any) -> None:
    patched, plain = models
    expected = probabilities(logits_one_by_one(plain, QUERY, ITEMS), LABELS, True)
    found = torch.tensor(scorer_of(patched).score(QUERY, ITEMS, apply_softmax=True))
    assert (found - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert expected.std(0).max() > BETWEEN_MASKS  # items differ, or nothing was compared


@pytest.mark.parametrize("flow", ["packed", "prefill + extend"])
def test_a_dense_mask_gives_what_segments_give(models: Any, flow: str) -> None:
    found = []
    for mask_impl in ("segment", "dense"):
        scorer = scorer_of(models[0], mask_impl)
        if flow == "packed":
            result = scorer.score(QUERY, ITEMS, flow="packed", return_usage=True)
            assert result.usage.mask_impl == mask_impl
            found.append(torch.tensor(result.scores))
        else:
            with scorer.prefix(QUERY) as held:
                found.append(torch.tensor(held.score(ITEMS)))
    assert (found[0] - found[1]).abs().max() <= BETWEEN_MASKS


def test_prefill_and_extend_compute_no_more_than_packed(models: Any) -> None:
    scorer = scorer_of(models[0])
    filled = [item for item in ITEMS if item]  # an empty item reads the query's last token again
    packed = scorer.score(QUERY, filled, flow="packed", return_usage=True)
    scorer.clear_prefixes()
    with scorer.prefix(QUERY) as held:
        extended = held.score(filled, return_usage=True)
    assert extended.usage.computed_prefix_tokens == 0
    assert extended.usage.computed_tokens + len(QUERY) == packed.usage.computed_tokens
    difference = np.abs(np.array(extended.scores) - np.array(packed.scores)).max()
    assert difference <= PROBABILITY_MAX_FLOAT32


def test_what_is_no_number_in_an_item_reaches_no_other(models: Any) -> None:
    patched, plain = models
    poison = min(set(range(VOCAB_SIZE)) - {*QUERY, *itertools.chain(*ITEMS)})
    scorer = MultiItemScorer(patched, label_token_ids=LABELS, on_non_finite="report")
    bad = [*ITEMS[:2], [poison, *ITEMS[2][1:]], *ITEMS[3:]]
    before = np.array(scorer.score(QUERY, bad, apply_softmax=True, flow="packed"))
    weight = plain.get_input_embeddings().weight  # shared with the patched one
    kept = weight[poison].clone()
    try:
        with torch.no_grad():
            weight[poison] = torch.nan
        scorer.refresh()
        found = np.array(scorer.score(QUERY, bad, apply_softmax=True, flow="packed"))
    finally:
        with torch.no_grad():
            weight[poison] = kept
        scorer.refresh()
    assert np.isnan(found[2]).all()
    others = [k for k in range(len(bad)) if k != 2]
    np.testing.assert_array_equal(found[others], before[others])


def test_nothing_is_compiled_behind_a_warm_up(models: Any) -> None:
    program: Any = program_of(models[0])
    program.warmup(max_tokens=300)
    before, program.strict = program.compile_count, True
    try:
        scorer = scorer_of(models[0])
        for seed, (length, count) in enumerate([(150, 3), (7, 30), (1, 1), (200, 40)]):
            query = random_ids(length, seed=50 + seed)
            items = [random_ids(1 + k % 2, seed=90 + k) for k in range(count)]
            scorer.score(query, items, apply_softmax=True)
            with scorer.prefix(query) as held:
                held.score(items, apply_softmax=True)
    finally:
        program.strict = False
    assert program.compile_count == before
