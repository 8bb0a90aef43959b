"""Every endpoint in the shape of its clients, with the scores that the scorer gives here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from transformers import PreTrainedModel

from packscore import InputError, InputTypeError, MultiItemScorer
from packscore.serve import create_app, decision_app
from serve_helpers import DOCUMENTS, QUERY, STATE, get, post

QUESTIONS: dict[str, Any] = {
    "urgent": {"type": "noul", "instructions": "Is it urgent?"},
    "team": {
        "type": "choice",
        "instructions": {"ask": "which team?"},
        "criteria": {"billing": "payments", "technical": None},
    },
    "mood": {"type": "score", "criteria": ["angry", "neutral", "happy"]},
}
DECISIONS: list[dict[str, Any]] = [
    {"type": "predicate", "name": "urgent", "instructions": "Is it urgent?"},
    {
        "type": "choice",
        "instructions": [{"type": "input_text", "text": "which team?"}],
        "choices": [{"value": True}, {"value": "true", "description": "as text"}],
    },
    {
        "type": "score",
        "name": "mood",
        "instructions": "Which mood?",
        "levels": [{"label": "angry"}, {"label": "happy"}],
    },
]


@pytest.fixture(scope="module")
def by_index(scorer: MultiItemScorer) -> list[float]:
    ranked = scorer.rank(QUERY, DOCUMENTS)
    return [one["score"] for one in sorted(ranked, key=lambda one: one["corpus_id"])]


@pytest.fixture(scope="module")
def raw_by_index(scorer: MultiItemScorer) -> list[float]:
    ranked = scorer.rank(QUERY, DOCUMENTS, activation_fn=torch.nn.Identity())
    return [one["score"] for one in sorted(ranked, key=lambda one: one["corpus_id"])]


def answered(app: Any, path: str, body: Any) -> Any:
    response = post(app, path, body)
    assert response.status_code == 200, response.text
    return response.json()


def best_first(results: list[dict[str, Any]], score: str) -> list[int]:
    assert results == sorted(results, key=lambda one: -one[score])
    return [one["index"] for one in results]


@pytest.mark.parametrize(
    "documents",
    [DOCUMENTS, [{"text": text, "id": "x"} for text in DOCUMENTS]],
    ids=["strings", "objects"],
)
@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_are_put_in_order(
    app: Any, scorer: MultiItemScorer, path: str, documents: list[Any]
) -> None:
    found = answered(app, path, {"model": "tiny", "query": QUERY, "documents": documents})
    echo = path != "/v2/rerank"
    expected = [
        {"index": one["corpus_id"], "relevance_score": one["score"]}
        | ({"document": {"text": DOCUMENTS[one["corpus_id"]]}} if echo else {})
        for one in scorer.rank(QUERY, DOCUMENTS)
    ]
    assert found["results"] == expected
    assert found["model"] == "tiny"
    assert found["id"]
    assert found["meta"]["api_version"]["version"] == "2"
    _, usage = scorer.rank(QUERY, DOCUMENTS), scorer.rank(QUERY, DOCUMENTS, return_usage=True).usage
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] == usage.prompt_tokens
    assert found["usage"]["computed_tokens"] + found["usage"]["saved_tokens"] == usage.prompt_tokens


def test_reranking_takes_the_best_and_gives_texts_as_it_is_asked(app: Any) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS, "top_n": 2, "return_documents": False}
    assert [set(one) for one in answered(app, "/rerank", body)["results"]] == [
        {"index", "relevance_score"}
    ] * 2
    body |= {"return_documents": True, "top_n": 99, "max_tokens_per_doc": None, "user": "me"}
    found = answered(app, "/v2/rerank", body)["results"]
    assert sorted(one["document"]["text"] for one in found) == sorted(DOCUMENTS)


def test_reranking_without_activation_gives_log_odds(app: Any, raw_by_index: list[float]) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS, "use_activation": False}
    for one in answered(app, "/v1/rerank", body)["results"]:
        assert one["relevance_score"] == raw_by_index[one["index"]]


@pytest.mark.parametrize("raw", [None, False, True])
def test_texts_are_ranked_as_tei_does(
    app: Any, by_index: list[float], raw_by_index: list[float], raw: bool | None
) -> None:
    body: dict[str, Any] = {"query": QUERY, "texts": DOCUMENTS, "truncate": True}
    body |= {} if raw is None else {"raw_scores": raw, "return_text": True}
    found = answered(app, "/rerank", body)
    scores = raw_by_index if raw else by_index
    assert sorted(best_first(found, "score")) == list(range(len(DOCUMENTS)))
    for one in found:
        text = {} if raw is None else {"text": DOCUMENTS[one["index"]]}
        assert one == {"index": one["index"], "score": scores[one["index"]]} | text


@pytest.mark.parametrize("options", [{}, {"apply_softmax": True}, {"item_first": True}])
@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_items_are_scored_as_sglang_does(
    app: Any, scorer: MultiItemScorer, path: str, options: dict[str, bool]
) -> None:
    if options.get("item_first"):
        with pytest.raises((InputError, InputTypeError)) as caught:  # as it is for this prompt
            scorer.score(QUERY, DOCUMENTS, **options)
        response = post(app, path, {"query": QUERY, "items": DOCUMENTS, **options})
        assert response.status_code == 400
        assert response.json()["message"] == str(caught.value)
        return
    ids = [9, 4, 300]
    body = {"query": QUERY, "items": DOCUMENTS, "label_token_ids": ids, **options}
    found = answered(app, path, body)
    assert found["scores"] == scorer.score(QUERY, DOCUMENTS, label_token_ids=ids, **options)
    assert (found["object"], found["model"]) == ("scoring", "tiny")
    assert found["usage"]["completion_tokens"] == 0
    alone = answered(app, path, {"query": QUERY, "items": DOCUMENTS[0], "model": None})
    assert alone["scores"] == scorer.score(QUERY, DOCUMENTS[:1])


def test_token_ids_are_scored_as_they_are(shipped: PreTrainedModel, tokenizer: Any) -> None:
    plain = MultiItemScorer(shipped, tokenizer, labels=["no", "yes"], prefix_cache_bytes=0)
    app = create_app(plain)
    for first in (False, True):
        body = {"query": [5, 6, 7], "items": [[8, 9], []], "item_first": first}
        found = answered(app, "/v1/score", body)
        assert found["scores"] == plain.score([5, 6, 7], [[8, 9], []], item_first=first)
    assert found["model"] == Path(shipped.config.name_or_path).name


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize(
    ("a", "b"),
    [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")],
)
def test_pairs_are_scored_as_vllm_does(
    app: Any, scorer: MultiItemScorer, by_index: list[float], path: str, a: str, b: str
) -> None:
    one_to_all = answered(app, path, {a: QUERY, b: DOCUMENTS})
    assert one_to_all["data"] == [
        {"index": i, "object": "score", "score": score} for i, score in enumerate(by_index)
    ]
    assert (one_to_all["object"], one_to_all["model"]) == ("list", "tiny")
    queries = [QUERY, "math", QUERY]
    pairs = answered(app, path, {a: queries, b: DOCUMENTS[:3], "request_id": "mine"})
    expected = [scorer.rank(q, [d])[0]["score"] for q, d in zip(queries, DOCUMENTS, strict=False)]
    assert [one["score"] for one in pairs["data"]] == pytest.approx(expected, abs=1e-6)
    assert pairs["id"] == "mine"
    assert answered(app, path, {a: QUERY, b: "x"})["data"][0]["index"] == 0


def test_more_pairs_than_the_queue_holds_are_scored(
    shipped: PreTrainedModel, tokenizer: Any
) -> None:
    scorer = MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker")
    with scorer.start_batcher(max_requests=8):
        queries = [f"query {i}" for i in range(40)]
        found = answered(create_app(scorer), "/score", {"text_1": queries, "text_2": queries})
    expected = [scorer.rank(query, [query])[0]["score"] for query in queries]
    assert [one["score"] for one in found["data"]] == pytest.approx(expected, abs=1e-6)


def test_pairs_without_activation_are_log_odds(app: Any, raw_by_index: list[float]) -> None:
    body = {"text_1": [QUERY], "text_2": DOCUMENTS, "use_activation": False}
    found = answered(app, "/score", body)["data"]
    assert [one["score"] for one in found] == raw_by_index


def test_questions_are_answered_in_system_ones_shape(app: Any, scorer: MultiItemScorer) -> None:
    found = answered(app, "/v1/systemone", {"state": STATE, "questions": QUESTIONS, "user": 1})
    expected = scorer.decide(STATE, QUESTIONS).to_systemone()
    assert found["answers"] == expected["answers"]
    assert found["model"] == "tiny"
    assert found["usage"]["output_tokens"] == 0
    assert found["usage"]["computed_tokens"] > 0
    named = {"state": STATE, "questions": QUESTIONS, "model": "jev-latest"}
    assert answered(app, "/v1/systemone", named)["answers"] == expected["answers"]


@pytest.mark.parametrize(
    ("given", "state"),
    [
        (STATE, STATE),
        ([{"role": "user", "content": STATE}], STATE),
        ([{"role": "user", "content": [{"type": "input_text", "text": STATE}]}], STATE),
        (
            [{"role": "user", "content": [{"type": "input_json", "data": {"a": [1, None]}}]}],
            {"a": [1, None]},
        ),
        (
            [
                {"type": "message", "role": "developer", "content": "Be strict."},
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "x"},
                        {"type": "input_json", "data": 1},
                    ],
                },
                {"type": "function_call_output", "call_id": "c", "output": "7"},
            ],
            [
                {"role": "developer", "content": "Be strict."},
                {"role": "user", "content": ["x", 1]},
                {"type": "function_call_output", "call_id": "c", "output": "7"},
            ],
        ),
    ],
    ids=["text", "message", "part", "json", "several"],
)
def test_questions_are_answered_in_openais_shape(
    app: Any, scorer: MultiItemScorer, given: Any, state: Any
) -> None:
    body = {"model": "tiny", "input": given, "questions": DECISIONS, "prompt_cache_key": "k"}
    found = answered(app, "/v1/decisions", body)
    expected = scorer.decide(state, DECISIONS).to_decisions()
    assert found["answers"] == expected["answers"]
    assert [answer["name"] for answer in found["answers"]] == ["urgent", None, "mood"]
    assert found["usage"]["input_tokens"] == found["usage"]["total_tokens"]


def test_both_shapes_get_the_same_answer(app: Any) -> None:
    one = answered(app, "/v1/systemone", {"state": STATE, "questions": {"u": QUESTIONS["urgent"]}})
    other = answered(app, "/v1/decisions", {"input": STATE, "questions": DECISIONS[:1]})
    assert one["answers"]["u"]["noul"] == other["answers"][0]["probability"]


def test_models_are_listed_for_both_kinds_of_clients(scorer: MultiItemScorer) -> None:
    found = get(create_app({"a": scorer, "b/c": scorer}), "/v1/models").json()
    assert found["object"] == "list"
    assert [one["id"] for one in found["data"]] == ["a", "b/c"]
    assert all(one["object"] == "model" and one["created"] > 0 for one in found["data"])
    assert [one["name"] for one in found["models"]] == ["a", "b/c"]


def test_a_request_goes_to_the_model_that_it_names(
    scorer: MultiItemScorer, shipped: PreTrainedModel, tokenizer: Any
) -> None:
    options = {"prompt": "qwen3-reranker", "prefix_cache_bytes": 0}
    other = MultiItemScorer(shipped, tokenizer, **options, instruction="Find poems.")
    app = create_app({"first": scorer, "other": other})
    path = shipped.config.name_or_path
    for name, one in (("first", scorer), ("other", other), (None, scorer), (path, scorer)):
        body = {"query": QUERY, "documents": DOCUMENTS[:1], "model": name}
        found = answered(app, "/v2/rerank", body)
        assert found["results"][0]["relevance_score"] == one.rank(QUERY, DOCUMENTS[:1])[0]["score"]
        assert found["model"] == ("other" if name == "other" else "first")


@pytest.mark.parametrize(
    ("path", "body", "status", "shape"),
    [
        ("/v1/rerank", {"query": 1, "documents": ["a"]}, 422, {"id", "message", "detail"}),
        ("/rerank", {"query": 1, "texts": ["a"]}, 422, {"error", "error_type"}),
        ("/v1/score", {"query": 1, "items": ["a"]}, 400, {"object", "message", "type", "code"}),
        ("/score", {"text_1": 1, "text_2": ["a"]}, 400, {"error"}),
        ("/v1/systemone", {"state": 1, "questions": QUESTIONS}, 422, {"detail"}),
        ("/v1/decisions", {"input": 1, "questions": DECISIONS}, 400, {"error"}),
    ],
)
def test_errors_have_the_shape_that_clients_read(
    app: Any, path: str, body: Any, status: int, shape: set[str]
) -> None:
    response = post(app, path, body)
    assert response.status_code == status
    assert shape <= set(response.json())
    unknown = post(app, path, {**body, **{k: "a" for k in body if body[k] == 1}, "model": "x"})
    assert unknown.status_code == 404
    assert "'tiny'" in unknown.text
    assert shape <= set(unknown.json())


def test_every_example_of_the_documentation_can_be_sent(app: Any) -> None:
    schema = get(app, "/openapi.json").json()
    sent = 0
    for path, operations in schema["paths"].items():
        body = operations.get("post", {}).get("requestBody", {})
        for example in (
            body.get("content", {}).get("application/json", {}).get("examples", {}).values()
        ):
            answered(app, path, example["value"])
            sent += 1
        if "get" in operations:
            assert get(app, path).status_code in (200, 503)
    assert sent == 16
    names = set(schema["components"]["schemas"])
    told = json.dumps(schema).split("#/components/schemas/")[1:]
    assert {one.partition('"')[0] for one in told} <= names


def test_an_app_can_be_mounted_in_another(scorer: MultiItemScorer) -> None:
    outer = FastAPI()
    outer.mount("/scores", create_app(scorer, api_keys=["key"]))
    body = {"query": QUERY, "texts": DOCUMENTS}
    refused = post(outer, "/scores/rerank", body)
    assert (refused.status_code, "API key" in refused.json()["message"]) == (401, True)
    key = {"authorization": "Bearer key"}
    assert len(post(outer, "/scores/rerank", body, **key).json()) == len(DOCUMENTS)
    assert get(outer, "/scores/rerank", **key).json()["message"] == "Method Not Allowed"
    assert get(outer, "/scores/health").status_code == 200
    assert "http://test/scores/v1/score" in get(outer, "/scores/docs").text


def test_a_decision_app_decides_and_nothing_else(scorer: MultiItemScorer) -> None:
    app = decision_app(scorer)
    assert answered(app, "/v1/systemone", {"state": STATE, "questions": QUESTIONS})["answers"]
    assert answered(app, "/v1/decisions", {"input": STATE, "questions": DECISIONS})["answers"]
    assert get(app, "/v1/models").status_code == 200
    assert post(app, "/rerank", {"query": QUERY, "documents": DOCUMENTS}).status_code == 404
    assert get(app, "/").status_code == 404


def test_what_is_no_scorer_is_refused_before_it_serves(scorer: MultiItemScorer) -> None:
    with pytest.raises(InputTypeError, match="scorers=3 is a int"):
        create_app(3)  # type: ignore[arg-type]  # what is refused
    with pytest.raises(InputError, match=r"scorers=\{\} is empty"):
        create_app({})
    with pytest.raises(InputTypeError, match=r"scorers\['a'\] is a int"):
        create_app({"a": 3})  # type: ignore[dict-item]  # what is refused
    with pytest.raises(InputTypeError, match="api_keys is one string"):
        create_app(scorer, api_keys="key")
