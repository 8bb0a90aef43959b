"""What real clients sent, asked of the app in this process; tests/clients/run.py recorded it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from clients import wire
from clients.calls import KEY, MODEL
from clients.decision_calls import CALLS
from packscore import MultiItemScorer, shipped_model_path
from packscore.serve import create_app
from tolerances import PROBABILITY_REORDERED

RECORDED = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parents[1] / "clients/recorded").glob("*.json"))
}


@pytest.fixture(scope="module")
def scorer() -> MultiItemScorer:
    return MultiItemScorer.from_pretrained(
        shipped_model_path(), device="cpu", dtype="float32", prompt="qwen3-reranker"
    )


@pytest.fixture(scope="module")
def app(scorer: MultiItemScorer) -> Iterator[TestClient]:
    with TestClient(create_app({MODEL: scorer}, api_keys=[KEY])) as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        yield client


def sent(app: TestClient, recorded: dict[str, Any], body: Any) -> Any:
    """The response to a recorded request, with this body."""
    headers = recorded["headers"]
    return app.request(
        recorded["method"],
        recorded["path"],
        headers=headers,
        content=wire.packed(headers, body),
    )


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_request_gets_the_scores_of_the_scorer(
    app: TestClient, scorer: MultiItemScorer, name: str
) -> None:
    recorded = RECORDED[name]
    path, body = recorded["path"], recorded["body"]
    answer = sent(app, recorded, body)
    assert answer.status_code == 200, answer.text
    state = recorded.get("state", body.get("state", body.get("input")))
    expected = wire.in_process(scorer, path, body, state)
    assert wire.furthest(wire.read(path, answer.json()), expected) <= PROBABILITY_REORDERED


def test_another_request_gets_other_scores(app: TestClient, scorer: MultiItemScorer) -> None:
    recorded = RECORDED["cohere_v2"]
    other = recorded["body"] | {"query": "the size of a file"}
    answer = sent(app, recorded, other).json()
    expected = wire.in_process(scorer, recorded["path"], recorded["body"], None)
    assert wire.furthest(wire.read(recorded["path"], answer), expected) > PROBABILITY_REORDERED


def test_every_call_of_a_client_is_recorded() -> None:
    assert RECORDED.keys() == CALLS.keys()


def test_the_page_says_which_versions_were_asked() -> None:
    page = (Path(__file__).parents[2] / "docs/serve.md").read_text(encoding="utf-8")
    assert [one["client"] for one in RECORDED.values() if one["client"] not in page] == []


def test_clients_of_both_kinds_read_the_list_of_models(app: TestClient) -> None:
    told = app.get("/v1/models").json()
    assert [model["id"] for model in told["data"]] == [MODEL]  # openai
    assert [model["name"] for model in told["models"]] == [MODEL]  # typesafe-sdk
    assert all(isinstance(model["release_date"], str) for model in told["models"])
