"""Bad input: typed errors that name argument, value and remedy, before the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import packscore.torch_engine.engine
import packscore.torch_engine.forward
from helpers import random_qwen3
from packscore import (
    InputError,
    InputTypeError,
    MaskTooLargeError,
    MultiItemScorer,
    NotPatchedError,
    PackscoreError,
    UnsupportedModelError,
    patch_model,
)
from tolerances import PROBABILITY_REORDERED

Call = Callable[[MultiItemScorer], Any]


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the model ran before the input was checked")

    monkeypatch.setattr(packscore.torch_engine.engine, "scored_rows", fail)


IDS: list[tuple[str, Call, type[PackscoreError], str]] = [
    (
        "no-items",
        lambda s: s.explain([1], []),
        InputError,
        r"items=\[\] is empty; pass at least one",
    ),
    (
        "items-none",
        lambda s: s.score([1], None),
        InputTypeError,
        r"items=None is a NoneType; pass a",
    ),
    (
        "items-string",
        lambda s: s.score([1], "abc"),
        InputTypeError,
        r"items='abc' is a str; pass a l",
    ),
    ("items-dict", lambda s: s.score([1], {"a": 1}), InputTypeError, r"items=.* is a dict"),
    ("items-int", lambda s: s.score([1], 5), InputTypeError, r"items=5 is a int"),
    (
        "item-none",
        lambda s: s.score([1], [[2], None]),
        InputTypeError,
        r"items\[1\]=None is a None",
    ),
    (
        "query-none",
        lambda s: s.score(None, [[1]]),
        InputTypeError,
        r"query=None is a NoneType; it mu",
    ),
    (
        "query-int",
        lambda s: s.score(3, [[1]]),
        InputTypeError,
        r"query=3 is a int; it must be a str",
    ),
    (
        "negative",
        lambda s: s.score([1], [[2, -1]]),
        InputError,
        r"items\[0\]\[1\]=-1 is not in the v",
    ),
    ("too-big", lambda s: s.score([320], [[2]]), InputError, r"query\[0\]=320.*must be 0 to 319"),
    ("huge", lambda s: s.score([2**70], [[2]]), InputError, r"an id that no vocabulary holds"),
    ("bool", lambda s: s.score([1], [[True]]), InputTypeError, r"items\[0\]\[0\]=True is a bool"),
    (
        "float",
        lambda s: s.score([1.0], [[1]]),
        InputTypeError,
        r"query\[0\]=1.0 is a float; token id",
    ),
    ("nested", lambda s: s.score([1], [[[1]]]), InputTypeError, r"items\[0\]\[0\]=\[1\] is a list"),
    (
        "float-array",
        lambda s: s.score([1], [np.ones(2)]),
        InputTypeError,
        r"items\[0\] is float64\[2\]; token ids must be one row of integers",
    ),
    (
        "matrix",
        lambda s: s.score(torch.ones(1, 2, dtype=torch.int64), [[1]]),
        InputTypeError,
        r"query is int64\[1, 2\]; token ids must be one row of integers",
    ),
    (
        "bool-array",
        lambda s: s.score([1], [np.array([True])]),
        InputTypeError,
        r"items\[0\] is bool\[1\]; token ids must be one row of integers",
    ),
    (
        "nothing-to-score-at",
        lambda s: s.score([], [[1], []]),
        InputError,
        r"items\[1\] and query are both empty, so there is no token to score at",
    ),
    (
        "text-no-tokenizer",
        lambda s: s.score([1], ["a"]),
        InputTypeError,
        r"has no tokenizer; pass to",
    ),
    ("top-k-0", lambda s: s.rank([1], [[1]], top_k=0), InputError, r"top_k=0 must be at least 1"),
    (
        "top-k-text",
        lambda s: s.rank([1], [[1]], top_k="2"),
        InputTypeError,
        r"top_k='2' must be an in",
    ),
    (
        "rank-bad-id",
        lambda s: s.rank([1], [[-5]]),
        InputError,
        r"documents\[0\]\[0\]=-5 is not in t",
    ),
    (
        "pair-of-3",
        lambda s: s.predict([([1], [2], [3])]),
        InputTypeError,
        r"pairs\[0\]=.* must be \(q",
    ),
    (
        "pair-string",
        lambda s: s.predict(["ab"]),
        InputTypeError,
        r"pairs\[0\]='ab' must be \(query, d",
    ),
    (
        "pair-bad-id",
        lambda s: s.predict([([1], [2]), ([3], [4]), ([1], [999])]),
        InputError,
        r"pairs\[2\]\[1\]\[0\]=999 is not in the vocabulary",
    ),
    (
        "pair-none",
        lambda s: s.predict([(None, [2])]),
        InputTypeError,
        r"pairs\[0\]\[0\]=None is a No",
    ),
    (
        "labels-twice",
        lambda s: s.score([1], [[1]], label_token_ids=[3, 3]),
        InputError,
        r"token ids \[3, 3\] hold one label twice; name each label once",
    ),
    (
        "label-sequences-twice",
        lambda s: s.score([1], [[1]], label_token_ids=[[3, 4], [5], [3, 4]]),
        InputError,
        r"token ids \[\[3, 4\], 5, \[3, 4\]\] hold one label twice",
    ),
    (
        "label-sequence-empty",
        lambda s: s.score([1], [[1]], label_token_ids=[[3, 4], []]),
        InputError,
        r"label_token_ids\[1\]=\[\] is 0 tokens; a label must have one or more",
    ),
    (
        "label-sequence-range",
        lambda s: s.score([1], [[1]], label_token_ids=[[3], [4, 320]]),
        InputError,
        r"label_token_ids\[1\]\[1\]=320 is not in the vocabulary",
    ),
    (
        "label-sequences-and-ids",
        lambda s: s.score([1], [[1]], label_token_ids=[[3, 4], 5]),
        InputTypeError,
        r"label_token_ids\[1\]=5 is one id and others are lists; pass one id for each label",
    ),
    (
        "label-begins-another",
        lambda s: s.score([1], [[1]], label_token_ids=[[3, 4], [3]], apply_softmax=True),
        InputError,
        r"labels: token ids \[3\] are a label and begin another one.*; to compare the two, end",
    ),
    (
        "label-range",
        lambda s: s.score([1], [[1]], label_token_ids=[320]),
        InputError,
        r"label_token_ids\[0\]=320 is not in the vocabulary",
    ),
    (
        "label-bool",
        lambda s: s.score([1], [[1]], label_token_ids=[True]),
        InputTypeError,
        r"label_token_ids\[0\]=True is a bool",
    ),
    (
        "no-labels",
        lambda s: s.score([1], [[1]], label_token_ids=[]),
        InputError,
        r"label_token_ids=\[",
    ),
    (
        "labels-and-ids",
        lambda s: s.score([1], [[1]], label_token_ids=[1], labels=["a"]),
        InputError,
        r"labels and label_token_ids are two ways to say one thing",
    ),
    (
        "labels-no-tokenizer",
        lambda s: s.score([1], [[1]], labels=["a"]),
        InputError,
        r"labels=\['a'\] needs a tokenizer; pass label_token_ids",
    ),
]


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("call", "error", "message"), [c[1:] for c in IDS], ids=[c[0] for c in IDS]
)
def test_token_ids(call: Call, error: type[PackscoreError], message: str) -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()), label_token_ids=[1, 2])
    with pytest.raises(error, match=message):
        call(scorer)


TEXT: list[tuple[str, Call, type[PackscoreError], str]] = [
    (
        "empty-query",
        lambda s: s.score("", ["a"]),
        InputError,
        r"query='' is empty, and the prompt a",
    ),
    ("blank-query", lambda s: s.score(" \n", ["a"]), InputError, r"query=' \\n' is empty"),
    (
        "ids",
        lambda s: s.score([1, 2], ["a"]),
        InputTypeError,
        r"must be text for this prompt; pass pr",
    ),
    ("item-ids", lambda s: s.score("q", [[1]]), InputTypeError, r"must be text for this prompt"),
    (
        "mixed",
        lambda s: s.score("q", ["a", [1]]),
        InputTypeError,
        r"items\[1\]=\[1\] and items\[0\]='a' mix text and token ids; pass one kind",
    ),
    (
        "mixed-tuple",
        lambda s: s.rank("q", ("a", (1, "b"))),
        InputTypeError,
        r"documents\[1\]=\(1, 'b'\) and documents\[0\]='a' mix text and token ids",
    ),
    (
        "item-float",
        lambda s: s.score("q", [1.5]),
        InputTypeError,
        r"items\[0\]=1.5 is a float; it mu",
    ),
    ("item-bytes", lambda s: s.score("q", [b"a"]), InputTypeError, r"items\[0\]=b'a' is a bytes"),
    (
        "item-first",
        lambda s: s.score("q", ["a"], item_first=True),
        InputError,
        r"item_first=True has no meaning in a prompt; pass prompt='plain'",
    ),
    (
        "empty-label",
        lambda s: s.score("q", ["a"], labels=[""]),
        InputError,
        r"labels\[0\]='' is 0 tok",
    ),
    (
        "label-int",
        lambda s: s.score("q", ["a"], labels=[5]),
        InputTypeError,
        r"labels\[0\]=5 must be ",
    ),
    (
        "labels-string",
        lambda s: s.score("q", ["a"], labels="yes"),
        InputTypeError,
        r"labels='yes' is ",
    ),
    (
        "label-past-the-tokenizer",
        lambda s: s.score("q", ["a"], label_token_ids=[3072]),
        InputError,
        r"label_token_ids\[0\]=3072 is not in the vocabulary; ids must be 0 to 3071",
    ),
    (
        "pair-empty-query",
        lambda s: s.predict([("", "a")]),
        InputError,
        r"pairs\[0\]\[0\]='' is empty",
    ),
]


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("call", "error", "message"), [c[1:] for c in TEXT], ids=[c[0] for c in TEXT]
)
def test_text(
    shipped: PreTrainedModel,
    tokenizer: Any,
    call: Call,
    error: type[PackscoreError],
    message: str,
) -> None:
    scorer = MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker")
    with pytest.raises(error, match=message):
        call(scorer)


OPTIONS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("unknown", {"masks": "dense"}, TypeError, r"unexpected keyword argument 'masks'"),
    (
        "mask",
        {"mask_impl": "flash"},
        InputError,
        r"mask_impl='flash' must be one of 'auto', 'segment'",
    ),
    ("long", {"on_long": "skip"}, InputError, r"on_long='skip' must be one of 'truncate', 'error'"),
    (
        "prompt",
        {"prompt": "bge"},
        InputError,
        r"prompt='bge' must be a PromptSpec or one of ctxl-rerank-v2",
    ),
    (
        "needs-tokenizer",
        {"prompt": "yes-no"},
        InputError,
        r"prompt='yes-no' is text, which needs a to",
    ),
    ("budget", {"max_tokens": 0}, InputError, r"max_tokens=0 must be at least 1 and at most 32768"),
    (
        "budget-high",
        {"max_tokens": 99999},
        InputError,
        r"max_tokens=99999 must be at least 1 and at m",
    ),
    ("budget-float", {"max_tokens": 5.0}, InputTypeError, r"max_tokens=5.0 must be an int or None"),
    (
        "labels",
        {"label_token_ids": [-1]},
        InputError,
        r"label_token_ids\[0\]=-1 is not in the vocab",
    ),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), [o[1:] for o in OPTIONS], ids=[o[0] for o in OPTIONS]
)
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiItemScorer(patch_model(random_qwen3()), **options)


def test_options_are_keyword_only() -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()), label_token_ids=[1, 2])
    for call in (
        lambda: MultiItemScorer(scorer.model, None, "plain"),
        lambda: scorer.score([1], [[1]], [1]),
        lambda: scorer.rank([1], [[1]], 3),
        lambda: scorer.predict([([1], [1])], torch.sigmoid),
        lambda: scorer.score([1], [[1]], softmax=True),
    ):
        with pytest.raises(TypeError, match=r"positional|unexpected keyword"):
            call()


@pytest.mark.usefixtures("no_forward")
def test_labels_are_asked_for_when_nobody_named_them() -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()))
    with pytest.raises(
        InputError, match=r"labels are missing, and the prompt has none; pass labels="
    ):
        scorer.score([1], [[2]])
    for labels in ([3], [3, 4, 5]):
        three = MultiItemScorer(scorer.model, label_token_ids=labels)
        with pytest.raises(InputError, match=rf"compare two.*this scorer has {len(labels)}; pass"):
            three.rank([1], [[2]])


@pytest.mark.usefixtures("no_forward")
def test_item_longer_than_the_budget() -> None:
    model = patch_model(random_qwen3())
    strict = MultiItemScorer(model, label_token_ids=[1, 2], max_tokens=10, on_long="error")
    with pytest.raises(InputError, match=r"items\[1\] has 8 tokens, 1 over max_tokens=10"):
        strict.score([1, 2, 3], [[1] * 7, [1] * 8])
    with pytest.raises(InputError, match=r"pairs\[1\]\[1\] has 8 tokens"):
        strict.predict([([1, 2, 3], [1]), ([1, 2, 3], [1] * 8)])
    with pytest.raises(InputError, match=r"query and its prompt have 10 tokens, which leaves none"):
        strict.score([1] * 10, [[1]])


def test_the_models_own_limit_is_the_default_budget() -> None:
    model = patch_model(random_qwen3(max_position_embeddings=12))
    scorer = MultiItemScorer(model, label_token_ids=[1, 2])
    result = scorer.score([1] * 4, [[2] * 8, [2] * 9], return_usage=True)
    assert result.usage.truncated_items == (1,)
    assert result.scores[0] == pytest.approx(result.scores[1], abs=PROBABILITY_REORDERED)


@pytest.mark.usefixtures("no_forward")
def test_model_in_train_mode() -> None:
    scorer = MultiItemScorer(patch_model(random_qwen3()).train(), label_token_ids=[1, 2])
    for call in (
        lambda: scorer.score([1], [[2]]),
        lambda: scorer.rank([1], [[2]]),
        lambda: scorer.predict([([1], [2])]),
    ):
        with pytest.raises(InputError, match=r"model is in train mode.*call model.eval\(\)"):
            call()


def test_model_not_patched(fresh: PreTrainedModel) -> None:
    with pytest.raises(NotPatchedError, match=r"model is not patched; call packscore\.patch_model"):
        MultiItemScorer(fresh)
    scorer = MultiItemScorer(patch_model(fresh), label_token_ids=[1, 2])
    packscore.unpatch_model(fresh)
    with pytest.raises(NotPatchedError, match="model is not patched"):
        scorer.score([1], [[2]])
    dense = MultiItemScorer(fresh, mask_impl="dense", label_token_ids=[1, 2])
    assert len(dense.score([1], [[2], [3]])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.index_fill_(0, torch.tensor([7]), 0.0),
            r"row of token 7 is all zero, so it was never trained",
        ),
        (lambda w: w.zero_(), r"row of token 7 is all zero"),
        (lambda w: w.fill_(torch.nan), r"row of token 7 is not finite"),
        (lambda w: w.fill_(0.5), r"rows of tokens \[7, 8\] are not all different, so it was never"),
    ],
)
def test_untrained_heads_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    model = random_qwen3(tied=False)
    with torch.no_grad():
        change(model.lm_head.weight)
    with pytest.raises(UnsupportedModelError, match=message):
        MultiItemScorer(patch_model(model), label_token_ids=[7, 8])


def test_dense_says_what_its_mask_needs_and_refuses_what_does_not_fit(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch_model(random_qwen3())
    scorer = MultiItemScorer(model, label_token_ids=[1, 2], mask_impl="dense")
    with caplog.at_level("INFO", logger="packscore"):
        scorer.score([1] * 400, [[2] * 100, [3] * 100])
    # bool and float32 for each of 600 x 600 pairs
    assert "mask_impl='dense' needs 2 MiB for 600 tokens (5 bytes for each pair" in caplog.text

    class Memory:
        available = 600 * 600 * 5 - 1

    monkeypatch.setattr(packscore.torch_engine.forward.psutil, "virtual_memory", Memory)
    with pytest.raises(MaskTooLargeError, match=r"needs 2 MiB for 600 tokens.*use mask_impl='segm"):
        scorer.score([1] * 400, [[2] * 100, [3] * 100])
    segment = MultiItemScorer(model, label_token_ids=[1, 2])
    assert len(segment.score([1] * 400, [[2] * 100, [3] * 100])) == 2


def test_dense_counts_the_scores_of_all_heads_for_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_qwen3()
    model.set_attn_implementation("eager")
    scorer = MultiItemScorer(model, label_token_ids=[1, 2], mask_impl="dense")

    class Memory:
        available = 0

    monkeypatch.setattr(packscore.torch_engine.forward.psutil, "virtual_memory", Memory)
    with pytest.raises(MaskTooLargeError, match=r"\(53 bytes for each pair of tokens\)"):
        scorer.score([1], [[2], [3]])


def test_a_terabyte_mask_is_refused_on_this_machine() -> None:
    scorer = MultiItemScorer(random_qwen3(num_layers=1), label_token_ids=[1, 2], mask_impl="dense")
    with pytest.raises(MaskTooLargeError, match=r"needs [\d,]+ MiB for 1,000,001 tokens"):
        scorer.score([1], [[*([2] * 18), k % 250, k // 250] for k in range(50_000)])
