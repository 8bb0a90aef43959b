"""What an operator needs: keys, limits, readiness, counters, logs, and faults contained."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import PreTrainedModel
from typer.testing import CliRunner

from helpers import engine_of
from packscore import InputError, InputTypeError, MultiItemScorer, patch_model
from packscore.cli.app import app as cli
from packscore.serve import Limits, create_app
from packscore.serve import state as serve_state
from processes import run_fresh
from serve_helpers import DOCUMENTS, QUERY, STATE, get, post, within

NOUL = {"type": "noul", "instructions": "Is it urgent?"}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("/v2/rerank", {"query": QUERY, "documents": DOCUMENTS}),
    "tei": ("/rerank", {"query": QUERY, "texts": DOCUMENTS}),
    "sglang": ("/v1/score", {"query": QUERY, "items": DOCUMENTS}),
    "vllm": ("/score", {"text_1": QUERY, "text_2": DOCUMENTS}),
    "systemone": ("/v1/systemone", {"state": STATE, "questions": {"a": NOUL}}),
    "openai": (
        "/v1/decisions",
        {"input": STATE, "questions": [{"type": "predicate", "instructions": "It is urgent."}]},
    ),
}


def told(response: httpx.Response) -> str:
    """What an error says, wherever its family's clients look for it."""
    found = response.json()
    found = found.get("error", found)
    return str(found if isinstance(found, str) else found.get("message", found.get("detail")))


@pytest.fixture
def own(shipped: PreTrainedModel, tokenizer: Any) -> Iterator[MultiItemScorer]:
    """A scorer of the test's own."""
    scorer = MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker")
    yield scorer
    scorer.batcher.close(10)


@pytest.fixture
def held(own: MultiItemScorer, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Its launches wait for this."""
    go, engine = threading.Event(), engine_of(own)
    launch = engine.launch

    def wait(*args: Any, **options: Any) -> Any:
        assert go.wait(20)
        return launch(*args, **options)

    monkeypatch.setattr(engine, "launch", wait)
    yield go
    go.set()


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("name", BODIES)
def test_a_key_is_asked_for(scorer: MultiItemScorer, name: str) -> None:
    app, (path, body) = create_app(scorer, api_keys=["käy", "other"]), BODIES[name]
    for headers in (
        {},
        {"authorization": "Bearer kay"},
        {"authorization": "käy"},
        {"x-api-key": ""},
    ):
        encoded = {key: value.encode() for key, value in headers.items()}
        response = within(app, lambda client, h=encoded: client.post(path, json=body, headers=h))
        assert response.status_code == 401
        assert "API key" in told(response)
        assert response.headers["www-authenticate"] == "Bearer"
    for headers in ({"authorization": "bearer käy"}, {"x-api-key": "other"}):
        encoded = {key: value.encode() for key, value in headers.items()}
        response = within(app, lambda client, h=encoded: client.post(path, json=body, headers=h))
        assert response.status_code == 200


def test_what_needs_no_key(scorer: MultiItemScorer) -> None:
    app = create_app(scorer, api_keys=["key"])
    for path in ("/health", "/ready", "/openapi.json", "/docs"):
        assert get(app, path).status_code in (200, 503)
    for path in ("/v1/models", "/metrics", "/nowhere"):
        assert get(app, path).status_code == 401
    assert get(app, "/metrics", authorization="Bearer key").status_code == 200


def test_pages_elsewhere_may_ask_only_where_they_are_named(scorer: MultiItemScorer) -> None:
    ask = {"origin": "https://a.example", "access-control-request-method": "POST"}
    allowed = "access-control-allow-origin"

    def preflight(app: Any) -> httpx.Response:
        return within(app, lambda client: client.options("/v1/rerank", headers=ask))

    assert allowed not in preflight(create_app(scorer)).headers
    named = create_app(scorer, cors_origins=["https://a.example"], api_keys=["key"])
    assert preflight(named).headers[allowed] == "https://a.example"
    assert allowed not in preflight(create_app(scorer, cors_origins=["https://b.example"])).headers


def test_a_request_keeps_its_id(app: Any) -> None:
    for name in ("x-request-id", "x-typesafe-request-id"):
        response = post(app, *BODIES["cohere"], **{name: "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        assert response.headers["x-typesafe-request-id"] == "mine-1"
        assert response.json()["id"] == "mine-1"
    for bad in ("a b", "x" * 200):
        found = post(app, *BODIES["cohere"], **{"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", found)


def test_other_methods_and_paths_are_told_in_json(app: Any) -> None:
    response = get(app, "/rerank")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert told(response) == "Method Not Allowed"
    assert told(get(app, "/nowhere")) == "Not Found"


def test_lines_of_the_log_say_what_was_done_and_no_text(
    app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="packscore.serve"):
        for path, body in BODIES.values():
            post(app, path, body)
            post(app, path, {**body, "model": "secret name"})
        get(app, "/health")
    lines = [json.loads(record.message) for record in caplog.records]
    assert [line["endpoint"] for line in lines[::2]] == [path for path, _ in BODIES.values()]
    assert {line["status"] for line in lines[::2]} == {200}
    assert {line["status"] for line in lines[1::2]} == {404}
    assert all(line["id"] and line["ms"] > 0 for line in lines)
    assert [line["items"] for line in lines[::2]] == [5, 5, 5, 5, 1, 1]
    assert all(
        line["tokens"] + line["saved"] > 0 and line["model"] == "tiny" for line in lines[::2]
    )
    for text in (QUERY, DOCUMENTS[0], STATE, "secret", "urgent"):
        assert text not in caplog.text


def test_counters_add_up(own: MultiItemScorer) -> None:
    app = create_app({"a": own})
    for path, body in BODIES.values():
        post(app, path, body)
    post(app, "/rerank", b"{")
    get(app, "/nowhere")
    found: dict[str, list[Any]] = {}
    for family in text_string_to_metric_families(get(app, "/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    (launches,), (ran,) = found["packscore_launches_total"], found["packscore_queue_ran_total"]
    assert launches.labels == {"model": "a"}
    assert 0 < launches.value <= ran.value == len(BODIES)
    assert found["packscore_requests_per_launch"][0].value == ran.value / launches.value
    assert found["packscore_tokens_computed_total"][0].value > 0
    assert found["packscore_tokens_saved_total"][0].value > 0
    assert found["packscore_prefix_hits_total"][0].value >= 3  # one query, and one state
    assert found["packscore_queue_requests"][0].value == 0
    stages = {sample.labels["stage"] for sample in found["packscore_stage_seconds_total"]}
    assert stages == {"waiting", "encoding", "running", "finishing"}
    requests = {
        (sample.labels["endpoint"], sample.labels["status"]): sample.value
        for sample in found["packscore_requests_total"]
    }
    assert requests["/rerank", "200"] == requests["/rerank", "400"] == 1
    assert requests["other", "404"] == 1
    assert found["packscore_items_total"][0].value == sum(len(DOCUMENTS) for _ in range(4)) + 2


def test_it_is_ready_once_it_is_warm(own: MultiItemScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(serve_state, "warm_up", lambda _: go.wait(10))
    app = create_app(own)

    async def call(client: httpx.AsyncClient) -> list[int]:
        before = (await client.get("/ready")).status_code
        alive = (await client.get("/health")).status_code
        go.set()
        await until(lambda: app.state.packscore.warm)
        return [before, alive, (await client.get("/ready")).status_code]

    assert within(app, call) == [503, 200, 200]


def test_programs_are_compiled_as_the_scorer_will_run_them(
    own: MultiItemScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    class Program:
        def warmup(self, **options: Any) -> None:
            asked.append(options)

    monkeypatch.setattr(serve_state, "program_of", lambda _: Program())
    serve_state.warm_up(own)
    assert asked == [
        {"num_labels": 2, "prefix_cache_bytes": own.prefix_cache_bytes, "mask_impl": "segment"}
    ]


def test_a_server_that_stops_says_so(own: MultiItemScorer) -> None:
    app = create_app(own)
    app.state.packscore.draining = True
    for path, body in BODIES.values():
        response = post(app, path, body)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
        assert response.headers["connection"] == "close"
        assert "stopping" in told(response)
    assert get(app, "/ready").status_code == 503
    assert get(app, "/health").status_code == get(app, "/metrics").status_code == 200


@pytest.mark.parametrize("name", BODIES)
def test_a_launch_that_fails_fails_its_requests_alone(
    own: MultiItemScorer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    app, (path, body), engine = create_app(own), BODIES[name], engine_of(own)
    with monkeypatch.context() as patch:

        def fail(*args: Any, **options: Any) -> Any:
            raise RuntimeError("the device is on fire")

        patch.setattr(engine, "launch", fail)
        response = post(app, path, body)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert "failed" in told(response)
    assert "fire" not in response.text  # its insides are for the log
    assert post(app, path, body).status_code == 200


def test_a_full_queue_says_when_to_come_again(own: MultiItemScorer, held: threading.Event) -> None:
    batcher = own.start_batcher(max_requests=2)
    app = create_app(own)

    async def call(client: httpx.AsyncClient) -> list[httpx.Response]:
        first = asyncio.create_task(client.post(BODIES["cohere"][0], json=BODIES["cohere"][1]))
        await until(lambda: batcher.stats.accepted == 1 and batcher.stats.queued_requests == 0)
        waiting = [
            asyncio.create_task(client.post(path, json=body)) for path, body in BODIES.values()
        ]
        await until(lambda: batcher.stats.rejected == len(BODIES) - 2)
        held.set()
        return [await task for task in (first, *waiting)]

    responses = within(app, call)
    refused = [one for one in responses if one.status_code == 429]
    assert len(refused) == len(BODIES) - 2
    assert all(int(one.headers["retry-after"]) >= 1 and "full" in told(one) for one in refused)
    assert [one.status_code for one in responses].count(200) == 3


def test_a_request_that_takes_too_long_is_given_up(
    own: MultiItemScorer, held: threading.Event
) -> None:
    app = create_app(own, limits=Limits(timeout_seconds=0.1))
    app.state.packscore.warm = True  # warming up would wait as well
    for path, body in BODIES.values():
        response = post(app, path, body)
        assert response.status_code == 504
        assert "0.1 seconds" in told(response)
    assert own.batcher.stats.cancelled == len(BODIES)


@pytest.mark.parametrize("name", BODIES)
def test_a_client_that_hangs_up_costs_nothing_further(
    own: MultiItemScorer, held: threading.Event, name: str
) -> None:
    """The first runs; of the second, whose client is gone while it waits, nothing does."""
    app, (path, body), batcher = create_app(own), BODIES[name], own.batcher
    data, sent = json.dumps(body).encode(), []

    async def hang_up() -> None:
        messages = iter([{"type": "http.request", "body": data, "more_body": False}])
        leave = asyncio.Event()

        async def receive() -> dict[str, Any]:
            for message in messages:
                return message
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "root_path": ""}
        task = asyncio.create_task(app(scope, receive, send))
        await until(lambda: batcher.stats.queued_requests == 1)
        leave.set()
        await task

    async def call(client: httpx.AsyncClient) -> httpx.Response:
        first = asyncio.create_task(client.post(path, json=body))
        await until(lambda: batcher.stats.accepted == 1 and batcher.stats.queued_requests == 0)
        await hang_up()
        held.set()
        return await first

    assert within(app, call).status_code == 200
    stats = batcher.stats
    assert (stats.cancelled, stats.dropped, stats.ran, stats.queued_requests) == (1, 1, 1, 0)
    assert sent[0]["status"] == 499


def test_scores_that_are_no_numbers_are_an_error_in_every_shape(
    fresh: PreTrainedModel, tokenizer: Any
) -> None:
    for choice in ("raise", "report"):
        scorer = MultiItemScorer(
            patch_model(fresh), tokenizer, prompt="qwen3-reranker", on_non_finite=choice
        )
        app = create_app(scorer)
        with torch.no_grad():
            fresh.model.norm.weight.fill_(float("nan"))
        for path, body in BODIES.values():
            response = post(app, path, body)
            assert response.status_code == 424, (choice, path)
            assert "not finite" in told(response)


def test_a_request_of_too_many_tokens_is_refused(own: MultiItemScorer) -> None:
    own.start_batcher(max_request_tokens=300)
    app = create_app(own)
    path, body = BODIES["cohere"]
    assert post(app, path, body).status_code == 200
    response = post(app, path, {**body, "documents": ["word " * 300]})
    assert response.status_code == 413
    assert "over the 300" in told(response)


def test_a_text_that_may_not_be_cut_is_refused_where_it_would_be(
    shipped: PreTrainedModel, tokenizer: Any
) -> None:
    scorer = MultiItemScorer(shipped, tokenizer, prompt="qwen3-reranker", max_tokens=100)
    app = create_app(scorer)
    body = {"query": QUERY, "texts": ["short", "long " * 200]}
    response = post(app, "/rerank", {**body, "truncate": False})
    assert response.status_code == 413
    assert "texts[1]" in told(response)
    cut = post(app, "/rerank", {**body, "truncate": True})
    assert (cut.status_code, cut.headers["x-truncated-items"]) == (200, "1")


def test_many_bodies_at_once_are_bounded_together(
    own: MultiItemScorer, held: threading.Event
) -> None:
    app = create_app(own, limits=Limits(max_waiting_bytes=1000))
    path, body = BODIES["cohere"]
    large = {**body, "query": "a" * 600}

    async def call(client: httpx.AsyncClient) -> list[int]:
        first = asyncio.create_task(client.post(path, json=large))
        await until(lambda: app.state.packscore.held_bytes > 600)
        second = await client.post(path, json=large)
        held.set()
        return [(await first).status_code, second.status_code]

    assert within(app, call) == [200, 429]
    assert app.state.packscore.held_bytes == 0


def test_limits_are_numbers_above_zero() -> None:
    with pytest.raises(InputError, match="max_items=0 must be above 0"):
        Limits(max_items=0)
    with pytest.raises(InputTypeError, match="max_body_bytes='1M' must be a number"):
        Limits(max_body_bytes="1M")  # type: ignore[arg-type]  # what is refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["-m", "/nowhere"], "/nowhere"),
        (["-m", "a=/nowhere", "-m", "a=/elsewhere"], "a is there twice"),
        (["-m", "a=/nowhere", "--adapter", "/adapter"], "NAME=FOLDER"),
        (["-m", "a=/nowhere", "--adapter", "a=/adapter"], "name of a --model"),
        (["-m", "a=/nowhere", "--api-key", " "], "--api-key is empty"),
        (["-m", "a=/nowhere", "--host", "192.0.2.1"], "--host=192.0.2.1"),
        (["-m", "a=/nowhere", "--dtype", "int8"], "--dtype='int8'"),
    ],
)
def test_what_cannot_be_served_ends_with_2_and_one_line(options: list[str], named: str) -> None:
    done = CliRunner().invoke(cli, ["serve", "--port", "0", "--device", "cpu", *options])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert named in done.stderr


def test_its_options_are_in_the_environment() -> None:
    environment = {
        "PACKSCORE_SERVE_MODEL": "a=/nowhere b=/elsewhere",
        "PACKSCORE_SERVE_PORT": "0",
        "PACKSCORE_SERVE_DEVICE": "cpu",
        "PACKSCORE_API_KEY": "k",
    }
    done = CliRunner().invoke(cli, ["serve"], env=environment)
    assert done.exit_code == 2
    assert "/nowhere cannot be loaded" in done.stderr


def test_without_its_packages_it_says_what_to_install() -> None:
    run_fresh(
        """
        import sys
        sys.modules["fastapi"] = None
        from typer.testing import CliRunner
        from packscore import MissingPackageError
        from packscore.cli.app import app
        try:
            import packscore.serve
        except MissingPackageError as error:
            assert "pip install" in str(error) and "[serve]" in str(error), error
        else:
            raise AssertionError
        done = CliRunner().invoke(app, ["serve", "-m", "a=/nowhere", "--port", "0"])
        assert done.exit_code == 2, done
        assert done.stderr.count("\\n") == 1 and "pip install" in done.stderr, done.stderr
        """
    )
