"""Scores that are not finite, through everything that is built on the scorer."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from transformers import pipeline

from packscore import (
    CrossEncoder,
    InputError,
    NonFiniteScoreError,
    PromptSpec,
    ScoringError,
    register_pipelines,
)
from packscore.flows.jobs import Run
from packscore.integrations.langchain import PackscoreReranker
from packscore.integrations.llama_index import PackscoreRerank
from packscore.integrations.rerankers import PackscoreRanker

BAD = "a café"  # the embedding of "é" is NaN
DOCUMENTS = ["tea with milk", BAD, "a boat", "green tea leaves"]
QUERY = "what is tea?"


@pytest.fixture
def folder(broken_model_folder: str) -> str:
    return broken_model_folder


def encoder_of(folder: str, **options: Any) -> CrossEncoder:
    return CrossEncoder(folder, template="qwen3-reranker", device="cpu", **options)


def test_cross_encoder(folder: str) -> None:
    pairs = [(f"{QUERY} {k}", text) for k in range(2) for text in DOCUMENTS]
    # launches of one query each: what one says must hold for all
    with pytest.raises(NonFiniteScoreError, match=r"inputs\[1\], inputs\[5\]") as info:
        encoder_of(folder).predict(pairs, batch_size=2)
    told = encoder_of(folder, on_non_finite="report")
    found = told.predict(pairs, batch_size=2)
    assert np.flatnonzero(np.isnan(found)).tolist() == [1, 5]
    np.testing.assert_array_equal(found, info.value.scores.numpy())
    zeros = told.predict(pairs, activation_fn=torch.nn.Threshold(100.0, 0.0))
    assert np.flatnonzero(np.isnan(zeros)).tolist() == [1, 5]
    for encoder in (told, copy.deepcopy(told), pickle.loads(pickle.dumps(told))):
        ranked = encoder.rank(QUERY, DOCUMENTS, return_documents=True)
        assert [entry["corpus_id"] for entry in ranked][-1] == 1
        numbers = [entry["score"] for entry in ranked[:-1]]
        assert numbers == sorted(numbers, reverse=True)
        assert [entry["corpus_id"] for entry in encoder.rank(QUERY, DOCUMENTS, 2)] == [
            entry["corpus_id"] for entry in ranked[:2]
        ]
    with pytest.raises(NonFiniteScoreError):
        encoder_of(folder).rank(QUERY, DOCUMENTS)
    with pytest.raises(InputError, match="on_non_finite='skip'"):
        encoder_of(folder, on_non_finite="skip")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests whose query asks for it fail while they run."""
    begin = Run._begin

    def fails(self: Run, number: int, *where: Any) -> Any:
        if len(self._requests[number].items) == 2:
            raise RuntimeError("two items")
        return begin(self, number, *where)

    monkeypatch.setattr(Run, "_begin", fails)


@pytest.mark.usefixtures("failing")
def test_launches_of_a_cross_encoder_outlive_one_that_fails(folder: str) -> None:
    pairs = [("one", "tea"), ("two", "tea"), ("two", "boat"), ("three", "tea")]
    with pytest.raises(ScoringError, match=r"1 of 3 launches failed.*two items") as info:
        encoder_of(folder).predict(pairs, batch_size=1)
    assert np.isnan(info.value.scores.numpy()).tolist() == [False, True, True, False]


def make_pipeline(folder: str, **options: Any) -> Any:
    register_pipelines()
    return pipeline("multi-item-scoring", model=folder, device="cpu", dtype="float32", **options)


def same(found: Any, expected: Any) -> None:
    """Equal entries, NaN to NaN; other launches may have run for them."""
    scores = [[[entry["score"] for entry in one] for one in many] for many in (found, expected)]
    for one, other in zip(*scores, strict=True):
        assert one == pytest.approx(other, abs=1e-6, nan_ok=True)


REQUESTS = [
    {"query": "a boat?", "items": ["tea"]},
    {"query": QUERY, "items": DOCUMENTS},
    {"query": "a boat?", "items": ["milk", "oil", "tea"]},
]


def test_pipeline(folder: str) -> None:
    pipe = make_pipeline(folder, prompt="qwen3-reranker")
    with pytest.raises(NonFiniteScoreError, match=r"inputs\[1\]\['items'\]\[1\]") as info:
        pipe(REQUESTS)
    assert info.value.indices == ((1, 1),)
    found = pipe(REQUESTS, on_non_finite="report", top_k=3)
    assert [entry["index"] for entry in found[1]][:2] == [
        entry["index"] for entry in pipe(REQUESTS[1], on_non_finite="report", top_k=2)
    ]
    assert all(not math.isnan(entry["score"]) for entry in found[1])
    everything = pipe(REQUESTS, on_non_finite="report")
    same(info.value.scores, everything)
    assert pipe(REQUESTS[1], on_non_finite="report", top_k=4)[-1]["index"] == 1
    with pytest.raises(NonFiniteScoreError, match=r"items\[1\]") as info:
        pipe(REQUESTS[1])
    assert info.value.indices == (1,)
    rows = pipe(iter(REQUESTS))
    same([next(rows)], everything[:1])
    with pytest.raises(NonFiniteScoreError, match=r"items\[1\]"):
        next(rows)
    with pytest.raises(InputError, match="on_non_finite='skip'"):
        pipe(REQUESTS, on_non_finite="skip")


def test_pipeline_of_sequences(folder: str) -> None:
    pipe = make_pipeline(folder, prompt=PromptSpec("", "{item}", " is", labels=("a", "b")))
    request = {"sequence": ["tea", BAD], "candidate_labels": ["good", "bad"]}
    found = pipe(request, on_non_finite="report")
    assert [math.isnan(one["scores"][0]) for one in found] == [False, True]
    with pytest.raises(NonFiniteScoreError, match=r"items\[1\]"):
        pipe(request)


@pytest.mark.usefixtures("failing")
def test_requests_of_a_pipeline_outlive_one_that_fails(folder: str) -> None:
    requests = [*REQUESTS[::2], {"query": "q", "items": ["one", "two"]}, REQUESTS[0]]
    pipe = make_pipeline(folder, prompt="qwen3-reranker")
    expected = pipe(REQUESTS[::2])
    for batch_size in (1, 3):
        with pytest.raises(ScoringError, match=r"1 of 4 .* inputs\[2\] .*two items") as info:
            pipe(requests, batch_size=batch_size)
        kept = info.value.scores
        assert kept[2] is None
        same([*kept[:2], kept[3]], [*expected, expected[0]])


def test_frameworks(folder: str, tmp_path: Path) -> None:
    told = {"on_non_finite": "report", "dtype": torch.float32}
    ranked = PackscoreRanker(folder, **told).rank(QUERY, DOCUMENTS)
    order = [result.document.doc_id for result in ranked.results]
    assert order[-1] == 1
    documents = [Document(page_content=text) for text in DOCUMENTS]
    kept = PackscoreReranker.from_pretrained(folder, top_n=4, **told)
    found = kept.compress_documents(documents, QUERY)
    assert [document.page_content for document in found] == [DOCUMENTS[i] for i in order]
    nodes = [NodeWithScore(node=TextNode(text=text)) for text in DOCUMENTS]
    reranked = PackscoreRerank.from_pretrained(folder, top_n=4, **told).postprocess_nodes(
        nodes, query_bundle=QueryBundle(QUERY)
    )
    assert [node.node.get_content() for node in reranked] == [DOCUMENTS[i] for i in order]
    for make in (PackscoreReranker, PackscoreRerank):
        adapter: Any = make.from_pretrained(folder, dtype=torch.float32)
        with pytest.raises(NonFiniteScoreError):
            adapter._ranking(QUERY, DOCUMENTS, 2)
