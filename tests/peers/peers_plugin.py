"""What pytest loads into the tests of sentence-transformers: the drop-in in their class's place."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import sentence_transformers
import sentence_transformers.cross_encoder
import stand_ins
import tokenizers
from transformers import Qwen3ForSequenceClassification

import packscore

THEIRS = sentence_transformers.CrossEncoder
OURS = packscore.CrossEncoder
TOKENIZER = tokenizers.Tokenizer
HOMES = (sentence_transformers, sentence_transformers.cross_encoder)
# Tests of a large checkpoint on a GPU: here the scores of their own class on a small one are what
# the drop-in must give.
COMPARED = "test_qwen3_reranker"


def pytest_configure() -> None:
    """Give tokenizers their class back, which only their conftest is to see replaced."""
    tokenizers.Tokenizer = TOKENIZER  # type: ignore[misc]  # a class put back


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Let the tests that ask for a GPU compare both classes on the CPU."""
    for item in items:
        if item.name.startswith(COMPARED):
            item.own_markers = [mark for mark in item.own_markers if mark.name != "skipif"]
            item.obj = _compared(item.obj)


def _compared(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test whose expected scores are those that sentence-transformers' own class gives it."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        scope = test.__globals__
        ours, seen = scope["CrossEncoder"], _Seen()
        try:
            scope["CrossEncoder"] = THEIRS
            scope["pytest"] = SimpleNamespace(approx=lambda *_, **__: seen)
            test(*args, **kwargs)
            scope["CrossEncoder"] = ours
            expected = functools.partial(pytest.approx, seen.scores)
            scope["pytest"] = SimpleNamespace(approx=lambda _, **options: expected(**options))
            return test(*args, **kwargs)
        finally:
            scope["CrossEncoder"], scope["pytest"] = ours, pytest

    return run


class _Seen:
    """Equal to any scores, and remembers them."""

    __array_ufunc__ = None  # so that numpy leaves the comparison to this

    def __eq__(self, scores: object) -> bool:
        self.scores = scores
        return True

    __hash__ = object.__hash__


def _load_dataset(name: str, *args: Any, **kwargs: Any) -> Any:
    if name != "sentence-transformers/stsb":
        raise ConnectionError(f"{name} is not among the stand-ins")
    texts = [f"A person does thing {i}." for i in range(20)]
    rows = {"sentence1": texts, "sentence2": texts[::-1], "score": [i / 20 for i in range(20)]}
    splits = ("train", "validation", "test")
    return datasets.DatasetDict({split: datasets.Dataset.from_dict(rows) for split in splits})


def _tokenizer(name: str) -> Any:
    return stand_ins.letters().backend_tokenizer


def _put_in_place() -> None:
    datasets.load_dataset = _load_dataset
    tokenizers.Tokenizer = SimpleNamespace(from_pretrained=_tokenizer)
    # a test gives three models one head, under the name that BERT has for it
    Qwen3ForSequenceClassification.classifier = property(lambda model: model.score)
    if "PEERS_WITHOUT" not in os.environ:
        for home in HOMES:
            home.CrossEncoder = OURS


_put_in_place()  # before their conftest imports any of it, which no hook of pytest comes before
