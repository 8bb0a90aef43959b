"""Copies of a model on a list of torch's devices: the scores of one, whatever becomes of the model.

Here all of them are on the CPU; on several GPUs this is untried.
"""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from helpers import LABELS, random_classifier, random_ids, random_qwen3
from packscore import (
    Choice,
    Hidden,
    InputError,
    InputTypeError,
    MultiItemScorer,
    Noul,
    NoulAnswer,
    StalePrefixError,
    UnsupportedModelError,
    is_patched,
    patch_model,
    shipped_model_path,
    unpatch_model,
)
from packscore.torch_engine.replicas import copied, replicas_of
from tolerances import PROBABILITY_MAX_FLOAT32, PROBABILITY_REORDERED

PREFIX = random_ids(300, seed=1)
ITEMS = [random_ids(n, seed=k) for k, n in enumerate((5, 26, 0, 9, 9, 40, 3))]
MANY = [(random_ids(550, seed=40 + k), ITEMS[: 2 + k % 5]) for k in range(9)]
TWO = ["cpu", "cpu"]


def scorer_of(model: Any, device: Any = None, **options: Any) -> MultiItemScorer:
    options.setdefault("label_token_ids", LABELS)
    return MultiItemScorer(patch_model(model, device=device), **options)


def close(found: Any, expected: Any, most: float = PROBABILITY_REORDERED) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=most)


def same_scores(
    several: MultiItemScorer, one: MultiItemScorer, most: float = PROBABILITY_REORDERED
) -> None:
    """In a request that is cut or not, in many, and of a query that is held."""
    close(several.score(PREFIX, ITEMS), one.score(PREFIX, ITEMS), most)
    for found, expected in zip(several.score_many(MANY), one.score_many(MANY), strict=True):
        close(found, expected, most)
    if several.prefix_cache_bytes:
        with several.prefix(PREFIX) as held:
            close(held.score(ITEMS), one.score(PREFIX, ITEMS), most)


def launches_of(scorer: MultiItemScorer, patch: pytest.MonkeyPatch) -> list[int]:
    """How many each copy runs from now on."""
    counts = [0] * len(scorer._core.copies)
    for k, engine in enumerate(scorer._core.copies):

        def launch(*args: Any, k: int = k, launch: Any = engine.launch) -> Any:
            counts[k] += 1
            return launch(*args)

        patch.setattr(engine, "launch", launch)
    return counts


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (random_qwen3, {}),
        (random_qwen3, {"mask_impl": "dense"}),
        (random_qwen3, {"prefix_cache_bytes": 0}),
        (random_classifier, {"label_token_ids": None}),
    ],
    ids=["qwen3", "dense", "no-pages", "classifier"],
)
def test_scores_are_those_of_one(make: Any, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, three = scorer_of(make(), **options), scorer_of(make(), ["cpu"] * 3, **options)
    assert len(three._core.copies) == three._core.num_copies == 3
    assert "3 copies" in repr(three)
    assert "copies" not in repr(one)
    counts = launches_of(three, monkeypatch)
    same_scores(three, one)
    assert all(counts)


def test_streams_decisions_and_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (
        MultiItemScorer.from_pretrained(
            shipped_model_path(), prompt="qwen3-reranker", device="cpu", dtype="float32"
        )
        for _ in "ab"
    )
    patch_model(two.model, device=TWO)
    counts = launches_of(two, monkeypatch)
    documents = ["Shuffle a list in place.", "Open a file.", "Parse JSON text."] * 4
    query = "shuffle a list"
    close([*two.score_stream(query, iter(documents))], [*one.score_stream(query, iter(documents))])
    questions = {
        "lists": Noul("Is it about lists?"),
        "topic": Choice("What is it about?", {"files": "files", "lists": None, "texts": None}),
    }
    for state in ("shuffle a list", {"text": "open a file"}, "parse json"):
        answers = [scorer.decide(state, questions).answers for scorer in (two, one)]
        for name in questions:
            found, expected = (numbers(each[name]) for each in answers)
            assert found == pytest.approx(expected, abs=PROBABILITY_REORDERED)
    hidden = [
        s.score(query, documents, readout=Hidden(lambda h: [x[0, :2] for x in h]))
        for s in (two, one)
    ]
    np.testing.assert_allclose(hidden[0], hidden[1], rtol=0, atol=1e-5)
    assert all(counts)


def numbers(answer: Any) -> list[float]:
    own = [answer.noul] if isinstance(answer, NoulAnswer) else [*answer.probabilities.values()]
    return [*own, answer.label_mass]


def in_place(model: Any) -> None:
    model.get_input_embeddings().weight.mul_(1.5)


def replaced(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        model.model.layers[0].mlp.up_proj.weight * 2
    )


def another_module(model: Any) -> None:
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[0].mlp)


def a_configuration(model: Any) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 0.5


def an_adapter(model: Any) -> None:
    peft = pytest.importorskip("peft", reason="adapters are another package's")
    torch.manual_seed(0)
    options = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=4)
    assert isinstance(peft.get_peft_model(model, options), peft.PeftModel)


@pytest.mark.parametrize("mask_impl", ["segment", "dense"])
@pytest.mark.parametrize(
    "change", [in_place, replaced, another_module, a_configuration, an_adapter]
)
def test_copies_follow_the_model(change: Any, mask_impl: Any) -> None:
    model, other = random_qwen3(), random_qwen3()
    two, one = scorer_of(model, TWO, mask_impl=mask_impl), scorer_of(other, mask_impl=mask_impl)
    second = scorer_of(model, TWO, mask_impl=mask_impl)  # over the same copies
    assert replicas_of(model) is not None
    before = two.score(PREFIX, ITEMS)
    close(second.score(PREFIX, ITEMS), before)
    held = [two.prefix(random_ids(200, seed=k)) for k in range(4)]
    with torch.no_grad():
        for each in (model, other):
            change(each)
    for scorer in (two, second):  # what the changes make of the sums is larger
        same_scores(scorer, one, PROBABILITY_MAX_FLOAT32)
    assert np.abs(np.array(two.score(PREFIX, ITEMS)) - np.array(before)).max() > 1e-4
    if mask_impl == "segment":
        for prefix in held:
            with pytest.raises(StalePrefixError):
                prefix.score(ITEMS)


def test_a_change_that_nobody_sees_is_taken_by_refresh() -> None:
    model, other = random_qwen3(), random_qwen3()
    two, one = scorer_of(model, TWO), scorer_of(other)
    same_scores(two, one)
    for each in (model, other):
        each.model.layers[0].mlp.down_proj.weight.data[0, 1:9] += 3
    one.refresh()
    two.refresh()
    same_scores(two, one)


def test_copies_share_nothing_and_know_no_gradients() -> None:
    model = random_qwen3().train()
    made = copied(model, torch.device("cpu"))
    own = {tensor.data_ptr() for tensor in model.parameters()}
    assert not own & {tensor.data_ptr() for tensor in made.parameters()}
    assert made.lm_head.weight is made.get_input_embeddings().weight
    assert not any(tensor.requires_grad for tensor in made.parameters())
    assert not any(module.training for module in made.modules())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.model.layers[0].register_forward_hook(lambda *_: None), "a forward hook of"),
        (lambda m: setattr(m.model, "forward", lambda **_: None), "a forward put on"),
        (lambda m: m.model.layers[1].to("meta"), "tensors on cpu, meta"),
    ],
    ids=["hook", "forward", "meta"],
)
def test_what_a_copy_would_not_follow_is_refused_by_name(change: Any, says: str) -> None:
    model = random_qwen3()
    two = scorer_of(model, TWO)
    two.score(PREFIX, ITEMS)
    change(model)
    for _ in "ab":
        with pytest.raises(UnsupportedModelError, match=f"{says}.*patch the model without a list"):
            two.score(PREFIX, ITEMS)
    fresh = random_qwen3()
    change(fresh)
    with pytest.raises(UnsupportedModelError, match=says):
        patch_model(fresh, device=TWO)
    assert not is_patched(fresh)


@pytest.mark.parametrize(
    ("device", "kind", "says"),
    [
        ([], InputError, r"device=\[\] is empty; pass at least one"),
        (["cpu", "tpu"], InputError, r"entry 1, 'tpu', is no device of torch.*device='tpu' in the"),
        (["auto"], InputError, r"entry 0, 'auto', is no device of torch"),
        (["cpu", "cuda:99"], InputError, r"entry 1, 'cuda:99', cannot be used .*must be a device"),
        (["cpu", "nonsense"], InputError, r"entry 1, 'nonsense', cannot be used"),
        (["cpu", "meta"], InputError, r"entry 1, 'meta', holds no weights"),
        (["cpu", 3], InputTypeError, r"entry 1, 3, is a int, and must be a torch.device"),
        ({"cpu": 1}, InputTypeError, r"device=\{'cpu': 1\}"),
        (7, InputTypeError, r"device=7 must be"),
    ],
)
def test_a_list_of_devices_is_checked(device: Any, kind: Any, says: str) -> None:
    model = random_qwen3()
    with pytest.raises(kind, match=says):
        patch_model(model, device=device)
    with pytest.raises(kind, match=r"^device="):
        patch_model(model, device=device)
    assert replicas_of(model) is None


def test_one_accelerator_is_not_named_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch answers where there is one."""

    class Found:
        device = torch.device("cuda", 0)

    model = random_qwen3()
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Found)
    with pytest.raises(InputError, match="entry 1, 'cuda', names cuda:0 again"):
        patch_model(model, device=["cuda:0", "cuda"])


def test_other_patches_and_their_ends() -> None:
    model = random_qwen3()
    plain = scorer_of(random_qwen3()).score(PREFIX, ITEMS)
    scorer = scorer_of(model, TWO)
    first = replicas_of(model)
    patch_model(model, device=TWO)
    patch_model(model)
    assert replicas_of(model) is first  # patching twice changes nothing
    held = scorer.prefix(PREFIX)
    patch_model(model, device=["cpu"])  # where it is, alone
    assert replicas_of(model) is None
    assert len(scorer._core.copies) == 1
    with pytest.raises(StalePrefixError, match="patched anew"):
        held.score(ITEMS)
    close(scorer.score(PREFIX, ITEMS), plain)
    patch_model(model, device=[torch.device("cpu")] * 3)
    assert len(scorer._core.copies) == 3
    close(scorer.score(PREFIX, ITEMS), plain)
    assert len(copy.deepcopy(scorer)._core.copies) == 1
    unpatch_model(model)
    assert replicas_of(model) is None
    with pytest.raises(InputError, match="compile_cache='x' keeps compiled programs"):
        patch_model(model, device=TWO, compile_cache="x")


def test_copies_go_with_their_model() -> None:
    scorer = scorer_of(random_qwen3(), TWO)
    scorer.score(PREFIX, ITEMS)
    gone = [weakref.ref(engine._model) for engine in scorer._core.copies]
    del scorer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
