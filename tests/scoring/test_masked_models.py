"""Models that only a mask can serve: `auto` says why, and is exact; what is not is refused."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from helpers import (
    LABELS,
    SMALL,
    one_by_one,
    random_decoder,
    random_ids,
    random_qwen3,
    spread_scores,
)
from packscore import (
    MultiItemScorer,
    NotPatchedError,
    UnsupportedModelError,
    is_patched,
    patch_model,
    program_of,
    unpatch_model,
    verify_parity,
)
from packscore.torch_engine import dense
from packscore_kernels import SegmentLayout
from tolerances import PROBABILITY_MAX_FLOAT32

pytestmark = pytest.mark.usefixtures("quick_programs")

QUERY = random_ids(61, seed=1)
ITEMS = [random_ids(n, seed=n) for n in (5, 33, 1, 0, 9, 21)]
# windows that end inside the query, inside an item, and at a token
WINDOW = {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}
GEMMA2: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "num_hidden_layers": 3,
    "sliding_window": 17,
    # so low that they change every score
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 4.0,
}


def gemma2(**options: Any) -> PreTrainedModel:
    config = Gemma2Config(**{**SMALL, **GEMMA2, **options})
    # the one that caps, which is not every version's own choice
    return spread_scores(Gemma2ForCausalLM._from_config(config, attn_implementation="eager"))


def gemma3(**options: Any) -> PreTrainedModel:
    own = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 17}
    kinds = {"num_hidden_layers": 3, "layer_types": [*["sliding_attention"] * 2, "full_attention"]}
    return spread_scores(
        Gemma3ForCausalLM(Gemma3TextConfig(**{**SMALL, **own, **kinds, **options}))
    )


def gpt_oss() -> PreTrainedModel:
    own = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 17}
    model = spread_scores(GptOssForCausalLM(GptOssConfig(**{**SMALL, **own})))
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.self_attn.sinks.fill_(2.0)
    return model


def mistral(**options: Any) -> PreTrainedModel:
    sizes = {**SMALL, "sliding_window": 17, **options}
    return spread_scores(MistralForCausalLM(MistralConfig(**sizes)))


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "qwen3": (lambda: random_qwen3(**WINDOW), "sliding_window=17 hides keys"),
    "qwen2": (lambda: random_decoder("qwen2", **WINDOW), "sliding_window=17 hides keys"),
    "qwen3_moe": (lambda: random_decoder("qwen3_moe", **WINDOW), "sliding_window=17 hides keys"),
    "mistral": (mistral, "sliding_window=17 hides keys"),
    "gemma2": (gemma2, "attn_logit_softcapping=1.5 caps its scores"),
    "gemma3": (gemma3, "sliding_window=17 hides keys"),
    "gpt_oss": (gpt_oss, "its attention has sinks"),
}
IN_PROGRAMS = ["qwen3", "qwen2", "qwen3_moe", "mistral", "gemma2"]


def error_of(model: PreTrainedModel, expected: torch.Tensor, **options: Any) -> float:
    scorer = MultiItemScorer(model, label_token_ids=LABELS)
    assert scorer.mask_impl == "dense"
    found = scorer.score(QUERY, ITEMS, return_usage=True, **options)
    assert found.usage.mask_impl == ("causal" if options.get("flow") == "plain" else "dense")
    return float((torch.tensor(found.scores) - expected).abs().max())


@pytest.mark.parametrize("is_patched_first", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_auto_takes_a_mask_says_so_once_and_equals_one_by_one(
    name: str, is_patched_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make, reason = MODELS[name]
    model = make()
    expected = one_by_one(copy.deepcopy(model), QUERY, ITEMS, LABELS)
    if is_patched_first:
        assert is_patched(patch_model(model))
    with caplog.at_level(logging.WARNING, logger="packscore"):
        scorer = MultiItemScorer(model, label_token_ids=LABELS)
        scores = [scorer.score(QUERY, ITEMS), scorer.score(QUERY, ITEMS)]
    (told,) = [record.message for record in caplog.records]
    assert f"packscore scores this {type(model).__name__} under a dense mask" in told
    assert reason in told
    assert scorer.mask_impl == "dense"
    assert (torch.tensor(scores) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert error_of(model, expected, flow="plain") <= PROBABILITY_MAX_FLOAT32
    with scorer.prefix(QUERY) as held:
        assert (torch.tensor(held.score(ITEMS)) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    with pytest.raises(UnsupportedModelError, match=f"not exact for this .* for {reason}"):
        MultiItemScorer(model, label_token_ids=LABELS, mask_impl="segment")


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2"])
def test_sdpa_and_eager_have_masks_of_their_own(name: str) -> None:
    model = MODELS[name][0]()
    expected = one_by_one(copy.deepcopy(model), QUERY, ITEMS, LABELS)
    model.set_attn_implementation("eager")
    assert error_of(model, expected) <= PROBABILITY_MAX_FLOAT32
    assert error_of(patch_model(model), expected) <= PROBABILITY_MAX_FLOAT32


@pytest.mark.parametrize("name", MODELS)
def test_controls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its window, cap or sinks a model has other scores."""
    model = MODELS[name][0]()
    expected = one_by_one(copy.deepcopy(model), QUERY, ITEMS, LABELS)
    if name == "gemma2":
        for module in model.modules():
            vars(module).pop("attn_logit_softcapping", None)
        for layer in model.get_decoder().layers:
            layer.self_attn.attn_logit_softcapping = 1e9
    elif name == "gpt_oss":
        with torch.no_grad():
            for layer in model.get_decoder().layers:
                layer.self_attn.sinks.fill_(-1e9)
    else:
        monkeypatch.setattr(dense, "windows_of", lambda model: [None])
    assert error_of(model, expected) > 100 * PROBABILITY_MAX_FLOAT32


def test_a_window_counts_positions_and_not_places() -> None:
    """By places an item would lose the query behind the items before it."""
    window, prefix_len, lens = 5, 4, (3, 6, 2)
    model = patch_model(mistral(sliding_window=window))
    layout = SegmentLayout.single(prefix_len, lens)
    found = dense.dense_masks(model, layout, torch.device("cpu"), torch.float32)[0, 0]
    expected = torch.zeros_like(found)
    first = prefix_len
    for length in (0, *lens):
        places = [*range(prefix_len), *range(first, first + length)]
        for row in range(len(places)):
            expected[places[row], places[max(row - window + 1, 0) : row + 1]] = True
        first += length
    assert torch.equal(found, expected)
    assert expected[-1, :prefix_len].any()  # which is further away than the window by places


def test_a_cap_on_the_logits_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gemma2(final_logit_softcapping=1.0)
    for softmax in (True, False):
        expected = one_by_one(model, QUERY, ITEMS, LABELS, apply_softmax=softmax)
        assert error_of(model, expected, apply_softmax=softmax) <= PROBABILITY_MAX_FLOAT32
        monkeypatch.setattr("packscore.model.label_head.final_cap", lambda model: None)
        assert error_of(model, expected, apply_softmax=softmax) > 100 * PROBABILITY_MAX_FLOAT32
        monkeypatch.undo()


def test_classes_are_not_capped() -> None:
    config = Gemma2Config(**{**SMALL, **GEMMA2}, pad_token_id=0, num_labels=3)
    model = spread_scores(
        Gemma2ForSequenceClassification._from_config(config, attn_implementation="eager")
    )
    rows = [model(torch.tensor([[*QUERY, *item]])).logits[0] for item in ITEMS]
    expected = torch.stack(rows).softmax(-1)
    found = MultiItemScorer(model).score(QUERY, ITEMS)
    assert (torch.tensor(found) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.jax
@pytest.mark.parametrize("name", IN_PROGRAMS)
def test_programs_hold_them(name: str) -> None:
    reference = MODELS[name][0]()
    model = patch_model(MODELS[name][0](), device="jax")
    expected = one_by_one(reference, QUERY, ITEMS, LABELS)
    cache = {"prefix_cache_bytes": 2**20}
    scorer = MultiItemScorer(model, label_token_ids=LABELS, **cache)
    for flow in ("packed", "extend"):
        if flow == "extend":
            scorer.prefix(QUERY).release()
        found = scorer.score(QUERY, ITEMS, flow=flow, return_usage=True)
        assert found.usage.mask_impl == "dense"
        assert (torch.tensor(found.scores) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    program: Any = program_of(model)
    count = program.compile_count
    ids = torch.tensor([QUERY])
    got = model(input_ids=ids).logits
    torch.testing.assert_close(got, reference(input_ids=ids).logits, atol=1e-4, rtol=0)
    assert program.compile_count > count  # not in torch


@pytest.mark.jax
@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("mistral", "sliding_window", 9),
        ("qwen3", "layer_types", ["sliding_attention"] * 2),
        ("gemma2", "final_logit_softcapping", 9.0),
    ],
)
def test_programs_follow_a_configuration_or_refuse_it(name: str, option: str, value: Any) -> None:
    model = patch_model(MODELS[name][0](), device="jax")
    scorer = MultiItemScorer(model, label_token_ids=LABELS, prefix_cache_bytes=0)
    before = torch.tensor(scorer.score(QUERY, ITEMS))
    setattr(model.config, option, value)
    expected = one_by_one(unpatch_model(copy.deepcopy(model)), QUERY, ITEMS, LABELS)
    assert (before - expected).abs().max() > 100 * PROBABILITY_MAX_FLOAT32
    if option == "layer_types":  # of which modules hold a copy
        with pytest.raises(UnsupportedModelError, match=r"layer_type is .* and by the model's"):
            scorer.score(QUERY, ITEMS)
        return
    found = torch.tensor(scorer.score(QUERY, ITEMS))
    assert (found - expected).abs().max() <= PROBABILITY_MAX_FLOAT32


@pytest.mark.jax
@pytest.mark.parametrize(("make", "kind"), [(gemma3, "gemma3_text"), (gpt_oss, "gpt_oss")])
def test_what_programs_cannot_hold_is_refused_with_the_remedy(make: Any, kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{kind!r} is not held.*without device="):
        patch_model(make(), device="jax")


def test_a_window_that_no_request_reaches_needs_no_mask(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(mistral(sliding_window=94))  # 61 + 33
    expected = one_by_one(mistral(sliding_window=94), QUERY, ITEMS, LABELS)
    with caplog.at_level(logging.WARNING, logger="packscore"):
        scorer = MultiItemScorer(model, label_token_ids=LABELS, max_tokens=94)
        found = scorer.score(QUERY, ITEMS, return_usage=True)
    assert not caplog.records
    assert found.usage.mask_impl == "segment"
    assert (torch.tensor(found.scores) - expected).abs().max() <= PROBABILITY_MAX_FLOAT32
    assert MultiItemScorer(model, label_token_ids=LABELS, max_tokens=95).mask_impl == "dense"
    # labels that go on behind an item make sequences longer
    long = {"label_token_ids": [[5, 17], [44]], "max_tokens": 94}
    assert MultiItemScorer(model, **long).mask_impl == "dense"
    with pytest.raises(UnsupportedModelError, match=r"sliding_window=94 hides keys .* 95 tokens"):
        scorer.score(QUERY, ITEMS, label_token_ids=long["label_token_ids"])
    with pytest.raises(NotPatchedError):
        MultiItemScorer(mistral(sliding_window=94), label_token_ids=LABELS, max_tokens=94)


def test_a_window_set_behind_the_scorers_back_is_refused() -> None:
    model = patch_model(mistral(sliding_window=None))
    scorer = MultiItemScorer(model, label_token_ids=LABELS)
    assert scorer.mask_impl == "segment"
    assert scorer.score(QUERY, ITEMS)
    model.config.sliding_window = 17
    with pytest.raises(UnsupportedModelError, match="sliding_window=17 hides keys"):
        scorer.score(QUERY, ITEMS)


def test_verification_takes_them() -> None:
    report = verify_parity(
        gemma2(), samples=[(QUERY, ITEMS)], label_token_ids=LABELS[:2], show=False
    )
    assert report.passed


def on_sdpa() -> PreTrainedModel:
    model = gemma2()
    model.config._attn_implementation_internal = "sdpa"
    return model


TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma2 both ways": (
        lambda: gemma2(use_bidirectional_attention=True),
        "use_bidirectional_attention=True: the model must be a causal decoder",
    ),
    "gemma3 both ways": (
        lambda: gemma3(use_bidirectional_attention=True),
        "use_bidirectional_attention=True: the model must be a causal decoder",
    ),
    "gemma2 on sdpa": (on_sdpa, "'sdpa' leaves out what 'gemma2' does to its scores"),
    "capped elsewhere": (
        lambda: gemma3(attn_logit_softcapping=5.0),
        "attn_logit_softcapping=5.0 is not supported",
    ),
    "other layers": (
        lambda: random_qwen3(layer_types=["full_attention", "chunked_attention"]),
        "layer_types has 'chunked_attention', which is not supported",
    ),
    "llama4": (
        lambda: Llama4ForCausalLM(
            Llama4TextConfig(**TINY, num_local_experts=2, intermediate_size_mlp=64)
        ),
        "model_type='llama4_text' is not supported",
    ),
    "bloom": (
        lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=4)),
        "model_type='bloom' is not supported",
    ),
    "falcon": (
        lambda: FalconForCausalLM(
            FalconConfig(
                vocab_size=64,
                hidden_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                alibi=True,
            )
        ),
        "model_type='falcon' is not supported",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_exact_under_no_mask_is_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    for refuses in (
        patch_model,
        MultiItemScorer,
        lambda model: MultiItemScorer(model, mask_impl="dense"),
    ):
        with pytest.raises(UnsupportedModelError, match=message):
            refuses(model)
    assert not is_patched(model)
