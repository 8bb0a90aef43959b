"""Ordinary calls of a model with programs: the same outputs, and torch for all that is not one."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, pipeline

from helpers import VOCAB_SIZE, random_classifier, random_decoder, random_ids, random_qwen3
from packscore import (
    MultiItemScorer,
    UnexpectedCompileError,
    UnsupportedModelError,
    patch_model,
    program_of,
    unpatch_model,
)
from packscore.calls import ServedForward
from packscore.programs.sizes import HeadKey
from tolerances import (
    PROBABILITY_MAX_BFLOAT16,
    PROBABILITY_MAX_FLOAT32,
    PROBABILITY_MEAN_BFLOAT16,
)

pytestmark = pytest.mark.usefixtures("quick_programs")

COLUMNS = 30
# ids without the classifiers' padding token
IDS = torch.tensor([random_ids(COLUMNS, seed=n) for n in (1, 2, 3)]).clamp(min=1)
ALL = torch.ones_like(IDS)
LEFT = torch.tensor([[1] * 30, [0] * 5 + [1] * 25, [0] * 29 + [1]])
MASKS = {"no-mask": None, "left": LEFT, "right": LEFT.flip(1), "bool": LEFT.bool()}
KEPT: dict[str, Any] = {
    "all": 0,
    "last": 1,
    "last-7": 7,
    "more-than-there-are": 40,
    "columns": torch.tensor([0, 2, 29, 2]),
    "minus-one": torch.tensor([-1]),
}


def both(model: Any) -> tuple[Any, Any]:
    """A model served by programs and its unpatched copy."""
    return patch_model(model, device="jax"), copy.deepcopy(model)


def kept(mask: torch.Tensor | None, logits_to_keep: Any) -> torch.Tensor:
    """bool[batch, kept columns]: whose logits are not at padding."""
    found = ALL if mask is None else mask
    if isinstance(logits_to_keep, int):
        return found[:, -logits_to_keep:].bool()
    return found[:, logits_to_keep].bool()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.device == expected.device
    error = (found.float().softmax(-1) - expected.float().softmax(-1)).abs()
    if found.dtype == torch.float32:
        assert error.max() <= PROBABILITY_MAX_FLOAT32
    else:
        assert error.max() <= PROBABILITY_MAX_BFLOAT16
        assert error.mean() <= PROBABILITY_MEAN_BFLOAT16


@pytest.fixture
def no_torch_forward(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes calls that run in torch an error, so that what follows is served by programs."""

    def forbid() -> None:
        def forward(*_: Any, **__: Any) -> None:
            raise AssertionError("the call ran in torch")

        monkeypatch.setattr(ServedForward, "_in_torch", forward)

    return forbid


@pytest.fixture(scope="module")
def served() -> tuple[Any, Any]:
    model = random_qwen3()
    reference = copy.deepcopy(model)
    return patch_model(model, device="jax"), reference


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("mask", MASKS)
def test_logits_of_a_language_model(
    served: tuple[Any, Any], no_torch_forward: Callable[[], None], mask: str, keep: str
) -> None:
    model, reference = served
    inputs = {"attention_mask": MASKS[mask], "logits_to_keep": KEPT[keep]}
    expected = reference(IDS, **inputs, use_cache=False).logits
    no_torch_forward()
    found = model(IDS, **inputs)
    assert found.past_key_values is None
    real = kept(MASKS[mask], KEPT[keep])
    assert_close(found.logits[real], expected[real])
    assert found.logits.shape == expected.shape
    assert not found.logits[~real].any()


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_other_families_in_bfloat16(family: str) -> None:
    model = random_decoder(family, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model = model.bfloat16()
    expected = model(IDS, attention_mask=LEFT, use_cache=False).logits
    found = patch_model(model, device="jax")(IDS, attention_mask=LEFT).logits
    assert found.dtype == torch.bfloat16
    assert_close(found[LEFT.bool()], expected[LEFT.bool()])


def test_the_forms_of_a_call(served: tuple[Any, Any], no_torch_forward: Callable[[], None]) -> None:
    model, reference = served
    expected = reference(IDS, LEFT, use_cache=False).logits[:, -1]
    no_torch_forward()
    calls = [
        model(IDS, LEFT),
        model(IDS.int(), LEFT.bool()),
        model(input_ids=IDS, attention_mask=LEFT, use_cache=False, return_dict=True),
        model(IDS, attention_mask=LEFT, labels=None, position_ids=None, output_attentions=False),
        model.forward(IDS, LEFT),
    ]
    for output in calls:
        assert type(output) is type(calls[0])
        assert_close(output.logits[:, -1], expected)
    (logits,) = model(IDS, LEFT, return_dict=False)
    assert_close(logits[:, -1], expected)
    assert inspect.signature(model.forward) == inspect.signature(reference.forward)


def test_what_the_programs_hold_is_bounded() -> None:
    model = patch_model(random_qwen3(num_layers=1), device="jax")
    program: Any = program_of(model)
    model(torch.tensor([random_ids(300, seed=1)] * 2))
    keys = set(program._executables.by_key)
    heads = {key for key in keys if isinstance(key, HeadKey)}
    assert {key.num_rows for key in heads} == {128}  # of 600 tokens
    assert all(key.num_labels == 0 for key in keys - heads)


EMBEDS = torch.ones(1, 4, 64)
FOUR = torch.zeros(3, 1, COLUMNS, COLUMNS).masked_fill_(
    ~torch.ones(COLUMNS, COLUMNS).tril().bool(), -1e9
)
HOLE = ALL.clone()
HOLE[1, 4] = 0
HIDDEN_ROW = ALL.clone()
HIDDEN_ROW[1] = 0
TORCH_CALLS: dict[str, dict[str, Any]] = {
    "use_cache": {"input_ids": IDS, "use_cache": True},
    "position_ids": {"input_ids": IDS, "position_ids": torch.arange(COLUMNS)[None] + 3},
    "labels": {"input_ids": IDS, "labels": IDS},
    "inputs_embeds": {"inputs_embeds": EMBEDS},
    "output_hidden_states": {"input_ids": IDS, "output_hidden_states": True},
    "4-D-mask": {"input_ids": IDS, "attention_mask": FOUR},
    "hole-in-mask": {"input_ids": IDS, "attention_mask": HOLE},
    "row-of-zeros": {"input_ids": IDS, "attention_mask": HIDDEN_ROW},
    "keyword-of-attention": {"input_ids": IDS, "is_causal": True},
    "rows-with-columns": {"input_ids": IDS, "logits_to_keep": torch.tensor([[1], [2], [3]])},
}


@pytest.mark.parametrize("name", TORCH_CALLS)
def test_everything_else_runs_in_torch(served: tuple[Any, Any], name: str) -> None:
    model, reference = served
    program: Any = program_of(model)
    before = program.compile_count
    expected, found = (m(**TORCH_CALLS[name]) for m in (reference, model))
    assert list(found) == list(expected)
    assert torch.equal(found.logits, expected.logits)
    assert program.compile_count == before
    assert found.logits.grad_fn is not None


def test_a_call_on_a_cache_runs_in_torch(served: tuple[Any, Any]) -> None:
    model, reference = served
    cached = [m(IDS, use_cache=True).past_key_values for m in (model, reference)]
    found, expected = (
        m(IDS[:, :2], past_key_values=cache)
        for m, cache in zip((model, reference), cached, strict=True)
    )
    assert torch.equal(found.logits, expected.logits)


def test_training_runs_in_torch() -> None:
    model = patch_model(random_qwen3(num_layers=1), device="jax").train()
    model(IDS).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad is not None
    assert model.eval()(IDS).logits.grad_fn is None


def test_hooks_inside_run_and_those_of_transformers_do_not_matter(
    no_torch_forward: Callable[[], None],
) -> None:
    model = patch_model(random_qwen3(num_layers=1), device="jax")
    seen: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_hook(lambda *found: seen.append(found[2]))
    model(IDS)
    assert len(seen) == 1
    hook.remove()
    assert model(IDS, output_hidden_states=True).hidden_states
    no_torch_forward()
    assert model(IDS).logits.shape == (3, COLUMNS, VOCAB_SIZE)


def test_errors_are_those_of_transformers(served: tuple[Any, Any]) -> None:
    model, reference = served
    calls: list[tuple[Any, ...]] = [(torch.tensor([[VOCAB_SIZE]]),), (torch.tensor([[-1]]),), ()]
    for args in calls:
        with pytest.raises((IndexError, ValueError)) as expected:
            reference(*args)
        with pytest.raises(expected.type, match=str(expected.value)[:20]):
            model(*args)
    with pytest.raises(TypeError, match="multiple values"):
        model(IDS, input_ids=IDS)


def test_large_batches_are_split_and_long_rows_run_in_torch(
    caplog: pytest.LogCaptureFixture, no_torch_forward: Callable[[], None]
) -> None:
    model = random_qwen3()
    ids = torch.tensor([random_ids(100, seed=n) for n in range(3)])
    long = torch.tensor([random_ids(129, seed=1)])
    expected, expected_long = (model(x, use_cache=False).logits for x in (ids, long))
    program: Any = program_of(patch_model(model, device="jax"))
    program.max_tokens = 128
    with caplog.at_level(logging.INFO, "packscore"):
        assert torch.equal(model(long, use_cache=False).logits, expected_long)
    assert "a row of 129 tokens is longer than the largest program (128)" in caplog.text
    # the last logits alone of a long row need all of it, its first ones do not
    no_torch_forward()
    assert_close(model(ids).logits, expected)
    columns = torch.arange(128)
    assert_close(model(long, logits_to_keep=columns).logits, expected_long[:, :128])


def test_warmup_compiles_for_plain_calls_too() -> None:
    model = patch_model(random_qwen3(num_layers=1), device="jax")
    program: Any = program_of(model)
    compiled = program.warmup(max_tokens=200, plain_calls=True)
    assert compiled == program.compile_count == 6  # of two buckets two, and two heads
    program.strict = True
    for rows, columns in ((1, 1), (1, 128), (3, 50), (2, 100)):
        ids = torch.tensor([random_ids(columns, seed=n) for n in range(rows)])
        model(ids)
        model(ids, logits_to_keep=1)
    assert program.compile_count == compiled
    with pytest.raises(UnexpectedCompileError, match="is not compiled and strict=True"):
        model(torch.tensor([random_ids(300, seed=1)]))


def test_threads_get_what_one_thread_gets(served: tuple[Any, Any]) -> None:
    model, _ = served
    expected = model(IDS, LEFT).logits
    found: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: found.append(model(IDS, LEFT).logits)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(logits, expected) for logits in found)


def test_undo_is_bit_identical_and_leaves_nothing() -> None:
    model = random_qwen3()
    expected = model(IDS).logits
    patch_model(patch_model(model, device="jax"), device="jax")
    assert model(IDS).past_key_values is None
    unpatch_model(model)
    assert "forward" not in model.__dict__
    assert torch.equal(model(IDS).logits, expected)


def test_a_forward_that_was_there_before_is_kept() -> None:
    model = random_qwen3(num_layers=1)
    calls: list[str] = []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append("theirs")
        return type(model).forward(model, *args, **kwargs)

    model.forward = theirs
    patch_model(model, device="jax")
    model(IDS)  # it may compute anything, so that programs leave the call to it
    model(IDS, use_cache=True)
    assert calls == ["theirs", "theirs"]
    with pytest.raises(UnsupportedModelError, match="a forward put on the Qwen3ForCausalLM"):
        MultiItemScorer(model, label_token_ids=[1, 2]).score([1], [[2]])
    assert unpatch_model(model).forward is theirs


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_run_in_torch_on_their_own_weights(duplicate: Callable[[Any], Any]) -> None:
    model = random_qwen3(num_layers=1)
    expected = model(IDS).logits
    clone = duplicate(patch_model(model, device="jax"))
    assert program_of(clone) is None
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    del model
    assert torch.equal(clone(IDS).logits, expected)
    assert program_of(patch_model(clone, device="jax")) is not None
    assert clone(IDS).past_key_values is None


def test_the_model_goes_when_nobody_holds_it() -> None:
    model = patch_model(random_qwen3(num_layers=1), device="jax")
    model(IDS)
    watch, forward = weakref.ref(model), model.forward
    gc.collect()
    gc.disable()
    try:
        del model
        assert watch() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="the model of this forward is gone"):
        forward(IDS)


@pytest.mark.parametrize("num_labels", [1, 2, 5])
def test_logits_of_a_classifier(no_torch_forward: Callable[[], None], num_labels: int) -> None:
    model = random_classifier(num_labels=num_labels)
    calls = [
        {"input_ids": IDS if mask is None else IDS * mask, "attention_mask": mask}
        for mask in MASKS.values()
    ]
    expected = [model(**call).logits for call in calls]
    patch_model(model, device="jax")
    no_torch_forward()
    for call, logits in zip(calls, expected, strict=True):
        found = model(**call).logits
        # logits, for the softmax of one class is 1
        assert (found - logits).abs().max() <= PROBABILITY_MAX_FLOAT32
        assert_close(found, logits)


def test_a_classifier_reads_where_transformers_reads(
    no_torch_forward: Callable[[], None],
) -> None:
    model = random_classifier()
    ids = IDS.clone()
    ids[0, -3:] = 0  # padding tokens that no mask hides
    hidden = ALL.clone()
    hidden[0, 20:] = 0  # the mask hides tokens that are no padding
    calls = [{"input_ids": ids}, {"input_ids": ids, "logits_to_keep": 1}]
    calls += [{"input_ids": IDS, "attention_mask": hidden}]
    expected = [model(**call).logits for call in calls]
    patch_model(model, device="jax")
    assert torch.equal(model(**calls[1]).logits, expected[1])
    assert torch.equal(model(**calls[2]).logits, expected[2])
    no_torch_forward()
    assert_close(model(**calls[0]).logits, expected[0])


def test_a_classifier_without_padding_token() -> None:
    model = random_classifier(pad_token_id=None)
    expected = model(IDS[:1]).logits
    patch_model(model, device="jax")
    assert_close(model(IDS[:1]).logits, expected)
    with pytest.raises(ValueError, match="Cannot handle batch sizes > 1 if no padding token"):
        model(IDS)


TEXTS = ["Return the", "A list of words is", "Delete a directory tree, and all of its files."]


def test_text_classification_pipeline(
    tokenizer: AutoTokenizer, no_torch_forward: Callable[[], None]
) -> None:
    model = random_classifier(
        num_labels=3, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id
    )

    def classify() -> list[list[dict[str, Any]]]:
        run = pipeline("text-classification", model=model, tokenizer=tokenizer)
        return [scores for size in (1, 2) for scores in run(TEXTS, top_k=None, batch_size=size)]

    before = classify()
    patch_model(model, device="jax")
    no_torch_forward()
    for expected, found in zip(before, classify(), strict=True):
        assert [x["label"] for x in found] == [x["label"] for x in expected]
        for x, y in zip(found, expected, strict=True):
            assert x["score"] == pytest.approx(y["score"], abs=PROBABILITY_MAX_FLOAT32)


def test_text_generation_pipeline(fresh: PreTrainedModel, tokenizer: AutoTokenizer) -> None:
    def generate() -> list[Any]:
        run = pipeline("text-generation", model=fresh, tokenizer=copy.deepcopy(tokenizer))
        found: list[Any] = run(TEXTS, max_new_tokens=4, do_sample=False, batch_size=2)
        return found

    before = generate()
    patch_model(fresh, device="jax")
    assert generate() == before
