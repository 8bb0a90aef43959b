"""The model that scores is the model as it is now: what changes around it, on both engines.

Each change is made after scores, so that pages and weights of before are there to be wrong with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen3ForCausalLM

from helpers import LABELS, engine_of, one_by_one, random_ids, random_qwen3
from model_changes import (
    CHANGES,
    Change,
    bfloat16,
    fused_step,
    hook_on_the_model,
    layer_in_two_places,
    layer_removed,
    layer_replaced,
    step,
    written_through_data,
)
from packscore import (
    InputError,
    MultiItemScorer,
    NotPatchedError,
    StalePrefixError,
    UnsupportedModelError,
    patch_model,
    unpatch_model,
)
from packscore.model.weight_watch import WeightWatch
from packscore.reading import streams
from packscore.verify import TOLERANCES

PREFIX = random_ids(20, seed=1)
ITEMS = [random_ids(n, 300, seed=k) for k, n in enumerate((5, 6, 1, 0, 9, 3))]


@pytest.mark.parametrize("device", [None, "jax"])
def test_a_layer_of_a_model_that_is_not_patched(device: str | None) -> None:
    """It has a configuration of its own, and so an attention of its own until it is patched too."""
    model, scorer = fresh(device)
    model.model.layers[1] = random_qwen3(tied=False, seed=5).model.layers[1]
    with pytest.raises(NotPatchedError, match=r"model is not patched; call packscore\.patch"):
        scorer.score(PREFIX, ITEMS)
    patch_model(model, device=device)
    expected = reference(model)
    for _ in range(2):
        assert (torch.tensor(scorer.score(PREFIX, ITEMS)) - expected).abs().max() <= 1e-5


def reference(model: Any) -> torch.Tensor:
    """The model as it is, unpatched, one by one."""
    plain = unpatch_model(copy.deepcopy(model))
    return one_by_one(plain, PREFIX, ITEMS, LABELS)


def fresh(device: str | None) -> tuple[Any, MultiItemScorer]:
    model = patch_model(random_qwen3(tied=False), device=device)
    scorer = MultiItemScorer(model, label_token_ids=LABELS)
    scorer.score(PREFIX, ITEMS)  # leaves pages behind
    return model, scorer


@pytest.mark.usefixtures("quick_programs")
@pytest.mark.parametrize("device", [None, "jax"])
@pytest.mark.parametrize("case", CHANGES, ids=lambda case: case.name)
def test_scores_are_those_of_the_model_as_it_is(case: Change, device: str | None) -> None:
    model, scorer = fresh(device)
    before = torch.tensor(scorer.score(PREFIX, ITEMS))
    case.make(model)
    if device and case.refused:
        for call in (scorer.score, scorer.explain):
            with pytest.raises(UnsupportedModelError, match=case.refused):
                call(PREFIX, ITEMS)
        return
    expected = reference(model)
    tolerance = TOLERANCES.get(model.dtype, TOLERANCES[torch.float32]).max_abs
    is_cast = model.dtype != torch.float32  # where pages of before are of another dtype
    moved = (expected - before).abs().max()
    assert is_cast or moved > 1e-4, "the change is too small to be wrong about"
    for _ in range(2):  # computed, then from pages
        scores = torch.tensor(scorer.score(PREFIX, ITEMS))
        assert (scores - expected).abs().max() <= tolerance
    with scorer.prefix(PREFIX) as held:
        assert (torch.tensor(held.score(ITEMS)) - expected).abs().max() <= tolerance
    streamed = torch.tensor(list(scorer.score_stream(PREFIX, iter(ITEMS))))
    assert (streamed - expected).abs().max() <= tolerance


CONTRADICTIONS = {
    "num_hidden_layers": (
        (-1, 0, 3),
        "num_hidden_layers={}.* which has 2 layers; set config.num_h",
    ),
    "num_attention_heads": ((-1, 0), "num_attention_heads={} must be at least 1"),
    "num_key_value_heads": (
        (-1, 1),
        "num_key_value_heads .* contradicts layer 0, where k_proj.out_",
    ),
    "head_dim": ((-1, 32), "head_dim={} in the configuration contradicts layer 0"),
    "hidden_size": ((32,), "hidden_size={} in the configuration contradicts layer 0"),
}


@pytest.mark.parametrize("mask_impl", ["auto", "dense"])
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_size_that_the_modules_contradict_is_refused_by_name(name: str, mask_impl: Any) -> None:
    model = patch_model(random_qwen3(tied=False))
    scorer = MultiItemScorer(model, label_token_ids=LABELS, mask_impl=mask_impl)
    before = torch.tensor(scorer.score(PREFIX, ITEMS))
    own, (values, message) = getattr(model.config, name), CONTRADICTIONS[name]
    for value in values:
        setattr(model.config, name, value)
        for call in (lambda: scorer.score(PREFIX, ITEMS), lambda: patch_model(model)):
            with pytest.raises(UnsupportedModelError, match=message.format(value)):
                call()
        setattr(model.config, name, own)
        again = torch.tensor(scorer.score(PREFIX, ITEMS))
        assert torch.allclose(again, before, atol=TOLERANCES[torch.float32].max_abs)


@pytest.mark.jax
@pytest.mark.usefixtures("quick_programs")
def test_programs_refuse_more_layers_than_there_are() -> None:
    model, scorer = fresh("jax")
    model.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers=3 contradicts the model"):
        scorer.score(PREFIX, ITEMS)


@pytest.mark.parametrize("make", [fused_step, written_through_data, layer_replaced])
def test_without_the_watch_pages_of_before_are_read(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[Any], None]
) -> None:
    """The control: what the test above sees is the watch's doing."""
    model, scorer = fresh(None)
    monkeypatch.setattr(WeightWatch, "sees_change", lambda *_: False)
    make(model)
    error = (torch.tensor(scorer.score(PREFIX, ITEMS)) - reference(model)).abs().max()
    assert error > 1e-4


def test_a_held_prefix_of_other_weights_is_stale() -> None:
    model, scorer = fresh(None)
    held = scorer.prefix(PREFIX)
    step(model, fused=True)
    with pytest.raises(StalePrefixError, match="other weights"):
        held.score(ITEMS)


def test_a_stream_goes_on_where_the_model_changes_at_any_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, scorer = fresh(None)
    still_held = streams._still_held

    def changed(*args: Any) -> Any:
        lease = still_held(*args)
        step(model, fused=True)  # behind the look whether the query is still held
        return lease

    monkeypatch.setattr(streams, "_still_held", changed)
    streamed = list(scorer.score_stream(PREFIX, iter(ITEMS), max_items=len(ITEMS)))
    error = (torch.tensor(streamed) - reference(model)).abs().max()
    assert error <= TOLERANCES[torch.float32].max_abs


def test_an_optimizer_of_another_model_changes_nothing() -> None:
    _, scorer = fresh(None)
    step(random_qwen3(seed=5), fused=True)
    usage = scorer.score(PREFIX, ITEMS, return_usage=True).usage
    assert usage.flow == "extend"


def test_values_that_no_sample_holds_are_the_users_to_tell() -> None:
    """One value of a large tensor, written behind torch's back: `refresh` is for that."""
    model = patch_model(random_qwen3(hidden_size=256, intermediate_size=2048, num_heads=8))
    scorer = MultiItemScorer(model, label_token_ids=LABELS)
    scorer.score(PREFIX, ITEMS)
    model.model.layers[0].mlp.up_proj.weight.detach().numpy()[3, 5] += 50.0
    scorer.refresh()
    error = (torch.tensor(scorer.score(PREFIX, ITEMS)) - reference(model)).abs().max()
    assert error <= TOLERANCES[torch.float32].max_abs


def test_layers_of_one_number_under_a_hook() -> None:
    """They run whole, and a cache would let one attend to the other's keys."""
    model, scorer = fresh(None)
    layer_in_two_places(model)
    hook_on_the_model(model)
    error = (torch.tensor(scorer.score(PREFIX, ITEMS)) - reference(model)).abs().max()
    assert error <= TOLERANCES[torch.float32].max_abs


class Halved(Qwen3ForCausalLM):
    def forward(self, input_ids: Any = None, **options: Any) -> Any:
        output = super().forward(input_ids=input_ids, **options)
        output.logits = output.logits / 2
        return output


class Listwise(Qwen3ForCausalLM):
    def forward(self, input_ids: Any, documents: Any) -> Any:
        raise NotImplementedError


class Scalar(Qwen3ForCausalLM):
    def forward(self, input_ids: Any = None, **options: Any) -> Any:
        output = super().forward(input_ids=input_ids, **options)
        output.logits = output.logits.mean(-1)
        return output


def test_a_forward_of_a_class_of_its_own_is_what_scores(caplog: pytest.LogCaptureFixture) -> None:
    model = Halved(random_qwen3(tied=False).config).eval()
    model.load_state_dict(random_qwen3(tied=False).state_dict())
    scorer = MultiItemScorer(patch_model(model), label_token_ids=LABELS)
    result = scorer.score(PREFIX, ITEMS, return_usage=True)
    error = (torch.tensor(result.scores) - reference(model)).abs().max()
    assert error <= TOLERANCES[torch.float32].max_abs
    # nothing is shared, and the log says so
    assert result.usage.flow == "plain"
    assert result.usage.computed_tokens == len(ITEMS) * len(PREFIX) + sum(map(len, ITEMS))
    assert "runs each item by itself, for the model has a forward of its own" in caplog.text
    labels = [[5], [17, 300]]
    many = scorer.score(PREFIX, ITEMS, label_token_ids=labels)
    packed = MultiItemScorer(patch_model(random_qwen3(tied=False)), label_token_ids=labels)
    assert (torch.tensor(many) - torch.tensor(packed.score(PREFIX, ITEMS))).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("model_class", "says"),
    [(Listwise, r"Listwise.forward\(input_ids=...\) fails"), (Scalar, "gives logits of shape")],
)
def test_a_forward_that_scores_something_else_is_refused(model_class: Any, says: str) -> None:
    model = patch_model(model_class(random_qwen3().config).eval())
    with pytest.raises(UnsupportedModelError, match=says):
        MultiItemScorer(model, label_token_ids=LABELS).score(PREFIX, ITEMS)


@pytest.mark.parametrize("mask_impl", ["segment", "dense"])
def test_a_hook_that_goes_again_is_gone(mask_impl: Any) -> None:
    model = patch_model(random_qwen3(tied=False))
    scorer = MultiItemScorer(model, label_token_ids=LABELS, mask_impl=mask_impl)
    hook = model.lm_head.register_forward_hook(lambda _, __, out: 3 * out)
    hooked = scorer.score(PREFIX, ITEMS, return_usage=True)
    assert (torch.tensor(hooked.scores) - reference(model)).abs().max() <= 1e-5
    assert hooked.usage.flow == "plain"
    explained = scorer.explain(PREFIX, ITEMS)
    assert explained.chosen.flow == "plain"
    assert "one item at a time" in str(explained)
    hook.remove()
    free = scorer.score(PREFIX, ITEMS, return_usage=True)
    assert (torch.tensor(free.scores) - reference(model)).abs().max() <= 1e-5
    assert free.usage.flow == "packed"


def test_global_hooks_are_seen() -> None:
    model, scorer = fresh(None)
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: 2 * out if module is model.lm_head else None
    )
    try:
        expected = reference_with_the_hooks_of(model)
        scores = torch.tensor(scorer.score(PREFIX, ITEMS))
    finally:
        hook.remove()
    assert (scores - expected).abs().max() <= 1e-5


def reference_with_the_hooks_of(model: Any) -> torch.Tensor:
    """The instance itself: ordinary calls of a patched model are the model's own."""
    return one_by_one(model, PREFIX, ITEMS, LABELS)


@pytest.mark.parametrize("device", [None, "jax"])
def test_under_autocast_and_behind_it(device: str | None) -> None:
    model, scorer = fresh(device)
    alone = reference(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = reference(model)
        for _ in range(2):
            error = (torch.tensor(scorer.score(PREFIX, ITEMS)) - expected).abs()
            assert error.max() <= TOLERANCES[torch.bfloat16].max_abs
            assert error.mean() <= TOLERANCES[torch.bfloat16].mean_abs
    assert (torch.tensor(scorer.score(PREFIX, ITEMS)) - alone).abs().max() <= 1e-5


def test_float64_under_autocast_stays_float64() -> None:
    model, scorer = fresh(None)
    model.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = (torch.tensor(scorer.score(PREFIX, ITEMS)) - reference(model)).abs().max()
    assert error <= TOLERANCES[torch.float32].max_abs


@pytest.mark.parametrize("device", [None, "jax"])
def test_defaults_of_the_process_change_nothing(device: str | None) -> None:
    model, scorer = fresh(device)
    expected = reference(model)
    model.config.return_dict = False
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            scores = scorer.score(PREFIX, ITEMS)
            others = scorer.score([5, *PREFIX], ITEMS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (torch.tensor(scores) - expected).abs().max() <= 1e-5
    again = torch.tensor(scorer.score([5, *PREFIX], ITEMS))
    assert (again - torch.tensor(others)).abs().max() <= 1e-5


def test_dropout_of_a_part_is_refused_by_its_name() -> None:
    model, scorer = fresh(None)
    model.model.layers[0].mlp.down_proj = nn.Sequential(
        model.model.layers[0].mlp.down_proj, nn.Dropout(0.1).eval()
    )
    scorer.score(PREFIX, ITEMS)
    model.model.layers[0].mlp.down_proj[1].train()
    with pytest.raises(InputError, match=r"model.model.layers.0.mlp.down_proj.1 is in train mode"):
        scorer.score(PREFIX, ITEMS)


def test_activations_quantised_over_the_sequence_are_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(random_qwen3(tied=False))
    with pytest.raises(UnsupportedModelError, match="scales activations by the whole sequence's"):
        patch_model(model)
    model, scorer = fresh(None)
    torch.ao.quantization.quantize_dynamic(model, inplace=True)
    with pytest.raises(UnsupportedModelError, match="scales activations by the whole sequence's"):
        scorer.score(PREFIX, ITEMS)


@pytest.mark.parametrize("size", [330, 312])
@pytest.mark.parametrize("device", [None, "jax"])
def test_a_vocabulary_of_another_size(device: str | None, size: int) -> None:
    model, scorer = fresh(device)
    model.resize_token_embeddings(size, mean_resizing=False)
    prefix = [size - 1, *random_ids(20, 300, seed=1)]
    expected = one_by_one(unpatch_model(copy.deepcopy(model)), prefix, ITEMS, LABELS)
    assert (torch.tensor(scorer.score(prefix, ITEMS)) - expected).abs().max() <= 1e-5
    with pytest.raises(InputError, match=rf"query\[0\]={size} is not in the vocabulary"):
        scorer.score([size], ITEMS)
    with pytest.raises(InputError, match=rf"{size}.*vocabulary"):
        scorer.score(prefix, ITEMS, label_token_ids=[1, size])


def test_labels_that_the_head_lost() -> None:
    model, scorer = fresh(None)
    model.resize_token_embeddings(200, mean_resizing=False)
    with pytest.raises(InputError, match="label_token_ids: 300 is no row of the head, which now"):
        scorer.score([1], [[2]])


def test_pages_go_with_the_model_and_are_accounted_for() -> None:
    model, scorer = fresh(None)
    for make in (bfloat16, fused_step, layer_replaced):
        make(model)
        scorer.score(PREFIX, ITEMS)
        pool = engine_of(scorer).pool
        assert pool.num_pinned_pages == 0
        assert pool.num_free_pages == pool.num_pages - 1


@pytest.mark.jax
@pytest.mark.usefixtures("quick_programs")
def test_fewer_layers_of_more_pages_are_not_the_same_pages() -> None:
    """Two layers of 96 pages are an array of the shape of three layers of 64."""
    model = patch_model(random_qwen3(tied=False, num_layers=3), device="jax")
    room = 64 * 3 * 128 * 2 * 2 * 16 * 4
    scorer = MultiItemScorer(model, label_token_ids=LABELS, prefix_cache_bytes=room)
    scorer.score(PREFIX, ITEMS)
    layer_removed(model)
    error = (torch.tensor(scorer.score(PREFIX, ITEMS)) - reference(model)).abs().max()
    assert error <= TOLERANCES[torch.float32].max_abs
