"""LangChain, LlamaIndex and rerankers, against the real packages."""

from __future__ import annotations

import asyncio
import copy
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.documents import BaseDocumentCompressor, Document
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import ValidationError
from rerankers.documents import Document as RerankersDocument
from transformers import PreTrainedModel

from packscore import CrossEncoder, InputError, InputTypeError, MultiItemScorer, shipped_model_path
from packscore.integrations.langchain import PackscoreReranker
from packscore.integrations.llama_index import PackscoreRerank
from packscore.integrations.rerankers import PackscoreRanker
from tolerances import PROBABILITY_MAX_FLOAT32, PROBABILITY_REORDERED

QUERY = "shuffle a list"
TEXTS = ["Rename a file.", "Shuffle list x in place.", "", "Return a shuffled list of files.", "x"]
MODEL = str(shipped_model_path())
FLOAT32 = {"dtype": torch.float32}


@pytest.fixture(scope="module")
def scorer(shipped: PreTrainedModel, tokenizer: Any) -> MultiItemScorer:
    return MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker")


@pytest.fixture(scope="module")
def ranked(scorer: MultiItemScorer) -> list[tuple[int, float]]:
    """(index, score), best first, and not the order the texts came in."""
    found = [(entry["corpus_id"], entry["score"]) for entry in scorer.rank(QUERY, TEXTS)]
    assert [i for i, _ in found] != sorted(i for i, _ in found)
    assert len({score for _, score in found}) == len(TEXTS)
    return found


def lc_documents() -> list[Document]:
    return [Document(text, id=str(i), metadata={"source": i}) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("top_n", [1, 3, 99, None])
def test_langchain_keeps_the_best(scorer: Any, ranked: Any, top_n: int | None) -> None:
    documents = lc_documents()
    compressor = PackscoreReranker(scorer=scorer, top_n=top_n)
    assert isinstance(compressor, BaseDocumentCompressor)
    found = compressor.compress_documents(documents, QUERY)
    assert [(d.metadata["source"], d.metadata["relevance_score"]) for d in found] == ranked[:top_n]
    assert [(d.page_content, d.id) for d in found] == [
        (TEXTS[i], str(i)) for i, _ in ranked[:top_n]
    ]
    assert documents == lc_documents()
    assert compressor.compress_documents([], QUERY) == []


def test_langchain_async_calls_run_at_the_same_time(scorer: Any) -> None:
    compressor = PackscoreReranker(scorer=scorer)
    queries = [QUERY, "rename a file", "delete", "sleep"] * 4
    expected = [compressor.compress_documents(lc_documents(), query) for query in queries]

    async def gather() -> list[Any]:
        return await asyncio.gather(
            *(compressor.acompress_documents(lc_documents(), query) for query in queries)
        )

    for got, want in zip(asyncio.run(gather()), expected, strict=True):
        # which call computes a query and which finds it in the cache changes the order of sums
        assert [d.page_content for d in got] == [d.page_content for d in want]
        scores = [[d.metadata["relevance_score"] for d in found] for found in (got, want)]
        assert scores[0] == pytest.approx(scores[1], abs=PROBABILITY_REORDERED)


def test_langchain_from_a_name_and_from_a_cross_encoder(ranked: Any) -> None:
    by_name = PackscoreReranker.from_pretrained(MODEL, top_n=2, **FLOAT32)
    ours = PackscoreReranker(scorer=CrossEncoder(MODEL, model_kwargs=FLOAT32), top_n=2)
    for compressor in (by_name, ours):
        found = compressor.compress_documents(lc_documents(), QUERY)
        assert [d.metadata["source"] for d in found] == [i for i, _ in ranked[:2]]
        for document, (_, score) in zip(found, ranked[:2], strict=True):
            assert document.metadata["relevance_score"] == pytest.approx(
                score, abs=PROBABILITY_MAX_FLOAT32
            )


def nodes() -> list[NodeWithScore]:
    return [
        NodeWithScore(node=TextNode(text=text, metadata={"n": i}), score=i / 10)
        for i, text in enumerate(TEXTS)
    ]


def scores_of(scorer: MultiItemScorer) -> list[tuple[int, float]]:
    # LlamaIndex gives models the metadata in front of the text
    texts = [f"n: {i}\n\n{text}".strip() for i, text in enumerate(TEXTS)]
    return [(entry["corpus_id"], entry["score"]) for entry in scorer.rank(QUERY, texts)]


@pytest.mark.parametrize("top_n", [1, 2, 99])
def test_llama_index_keeps_the_best(scorer: MultiItemScorer, top_n: int) -> None:
    given = nodes()
    found = PackscoreRerank(scorer=scorer, top_n=top_n).postprocess_nodes(given, query_str=QUERY)
    assert [(n.metadata["n"], n.score) for n in found] == scores_of(scorer)[:top_n]
    assert [n.score for n in given] == [n.score for n in nodes()]


def test_llama_index_keeps_retrieval_scores_and_reports_events(scorer: Any) -> None:
    seen = LlamaDebugHandler(print_trace_on_end=False)
    rerank = PackscoreRerank(
        scorer=scorer, keep_retrieval_score=True, callback_manager=CallbackManager([seen])
    )
    given = nodes()
    found = asyncio.run(rerank.apostprocess_nodes(given, QueryBundle(QUERY)))
    assert len(found) == 2
    for node in found:
        assert node.metadata["retrieval_score"] == node.metadata["n"] / 10
    assert all("retrieval_score" not in node.metadata for node in given)
    assert len(seen.get_event_pairs(CBEventType.RERANKING)) == 1
    assert rerank.postprocess_nodes([], query_str=QUERY) == []
    assert rerank.class_name() == "PackscoreRerank"
    with pytest.raises(InputError, match="query_bundle=None: pass query_str"):
        rerank.postprocess_nodes(given)


def test_llama_index_from_a_name(scorer: MultiItemScorer) -> None:
    rerank = PackscoreRerank.from_pretrained(MODEL, top_n=1, **FLOAT32)
    (node,) = rerank.postprocess_nodes(nodes(), query_str=QUERY)
    assert node.metadata["n"] == scores_of(scorer)[0][0]


def test_rerankers_ranks_texts_and_documents(scorer: Any, ranked: Any) -> None:
    ranker = PackscoreRanker(scorer)
    results = ranker.rank(QUERY, TEXTS)
    assert [(r.doc_id, r.score) for r in results] == ranked
    assert [r.rank for r in results] == [1, 2, 3, 4, 5]
    assert results.top_k(1)[0].text == TEXTS[ranked[0][0]]
    documents = [RerankersDocument(text, doc_id=f"d{i}") for i, text in enumerate(TEXTS)]
    assert [r.doc_id for r in ranker.rank(QUERY, documents)] == [f"d{i}" for i, _ in ranked]
    assert ranker.rank(QUERY, TEXTS, doc_ids=list("abcde"))[0].doc_id == "abcde"[ranked[0][0]]
    assert ranker.rank(QUERY, []).results == []
    assert ranker.score(QUERY, TEXTS[1]) == pytest.approx(
        dict(ranked)[1], abs=PROBABILITY_REORDERED
    )
    asynchronous = asyncio.run(ranker.rank_async(QUERY, TEXTS))
    assert [r.score for r in asynchronous] == [score for _, score in ranked]
    by_name = PackscoreRanker(MODEL, **FLOAT32).rank(QUERY, TEXTS)
    assert [r.doc_id for r in by_name] == [i for i, _ in ranked]


@pytest.mark.parametrize("kind", [PackscoreReranker, PackscoreRerank])
def test_bad_fields_are_refused_by_name(scorer: Any, kind: Any) -> None:
    with pytest.raises(ValidationError, match="top_n"):
        kind(scorer=scorer, top_n=0)
    with pytest.raises(ValidationError, match="topn"):
        kind(scorer=scorer, topn=2)
    with pytest.raises(InputTypeError, match="scorer is a dict; it must be a packscore"):
        kind(scorer={})


def test_rerankers_refuses_what_cannot_rank() -> None:
    with pytest.raises(InputTypeError, match="scorer is a int; it must be a packscore"):
        PackscoreRanker(3)


EXTRAS = {
    "packscore.integrations.cross_encoder": ("sentence_transformers", "sentence-transformers"),
    "packscore.integrations.langchain": ("langchain_core", "langchain"),
    "packscore.integrations.llama_index": ("llama_index", "llama-index"),
    "packscore.integrations.rerankers": ("rerankers", "rerankers"),
    "packscore.plot": ("matplotlib", "plot"),
}


def test_a_path_is_a_name_and_nothing_found_is_nothing_ranked() -> None:
    path = Path(str(shipped_model_path()))
    options: Any = {"dtype": torch.float32}
    assert PackscoreReranker.from_pretrained(path, **options).compress_documents([], "a") == []
    assert (
        PackscoreRerank.from_pretrained(path, **options).postprocess_nodes([], query_str="a") == []
    )
    assert PackscoreRanker(path, **options).rank("a", []).results == []


def test_a_missing_package_names_the_extra() -> None:
    code = f"""
    import importlib, sys
    from packscore.installed import install_command
    for module, (package, extra) in {EXTRAS!r}.items():
        sys.modules[package] = None
        try:
            importlib.import_module(module)
        except ImportError as error:
            assert type(error).__name__ == "MissingPackageError", error
            assert install_command(extra) in str(error), error
        else:
            raise SystemExit(module)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("make", [PackscoreReranker, PackscoreRerank, PackscoreRanker])
def test_adapters_are_copied_and_pickled_with_their_scorer(make: Any, duplicate: Any) -> None:
    path = shipped_model_path()  # a path is a name too
    adapter = make(path) if make is PackscoreRanker else make.from_pretrained(path)
    expected = adapter._ranking(QUERY, TEXTS, 3)
    other = duplicate(adapter)
    assert other._ranking(QUERY, TEXTS, 3) == expected
    assert other._ranking.scorer.model is not adapter._ranking.scorer.model
