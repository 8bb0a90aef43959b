"""What the host does for a call of a few short documents, counted: it is most of such a call."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from packscore import CrossEncoder, shipped_model_path
from packscore.integrations import cross_encoder
from packscore.model import family, plain, weight_watch
from packscore.text import tokenizer
from packscore.torch_engine import forward

Counts = collections.Counter[str]


@pytest.fixture(scope="module")
def model() -> CrossEncoder:
    model = CrossEncoder(str(shipped_model_path()), model_kwargs={"dtype": torch.float32})
    model.predict([("what came before", "a document")])
    return model


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """How often each thing was done."""
    found: Counts = collections.Counter()

    def count(home: Any, name: str, what: str, many: Callable[..., int] = lambda *_: 1) -> None:
        function = getattr(home, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            found[what] += many(*args)
            return function(*args, **kwargs)

        monkeypatch.setattr(home, name, counted)

    count(tokenizer, "_ids_of", "calls of the tokenizer")
    count(tokenizer, "_ids_of", "texts encoded", lambda _, texts: len(texts))
    count(PreTrainedTokenizerFast, "_encode_plus", "calls of Hugging Face's tokenizer")
    count(weight_watch, "_walk", "looks at the weights")
    for home in (family, plain, cross_encoder):
        count(home, "modules_of", "walks of the modules")
    # sentence-transformers' own, for the device
    count(nn.Module, "_named_members", "walks of torch's")
    count(nn.Module, "train", "modules told their mode")
    count(psutil, "virtual_memory", "questions for memory")
    return found


@pytest.mark.parametrize("num_documents", [1, 2, 5])
def test_what_a_call_asks_and_walks(
    model: CrossEncoder, counts: Counts, monkeypatch: pytest.MonkeyPatch, num_documents: int
) -> None:
    monkeypatch.setattr(forward, "_idle_bytes", lambda: 2**50)
    query = f"a query that nobody asked of {num_documents}"
    model.predict([(query, f"document {i}") for i in range(num_documents)])
    assert counts == {
        "calls of the tokenizer": 1,
        "texts encoded": 1 + num_documents,  # the frame was encoded when the scorer was made
        "looks at the weights": 1,
        "walks of the modules": 3,  # for modes, for dropout, for the patch
        "walks of torch's": 5,  # three of them only up to the first parameter
    }


def test_memory_is_asked_for_where_little_is_idle(
    model: CrossEncoder, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_idle_bytes", lambda: 0)
    model.predict([("a query", "a document")])
    assert counts["questions for memory"] == 1


def test_a_model_in_train_mode_is_told_its_mode(model: CrossEncoder, counts: Counts) -> None:
    expected = model.predict([("a query", "a document")])
    model[0].model.model.layers[1].train()
    assert model.predict([("a query", "a document")]) == expected
    assert counts["modules told their mode"] > 0
    assert not any(module.training for module in model.modules())
