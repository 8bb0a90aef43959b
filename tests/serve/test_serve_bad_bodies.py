"""Bodies that cannot be answered: 4xx that names the field, and the server goes on."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from packscore import MultiItemScorer
from packscore.serve import Limits, create_app
from packscore.serve.bodies import zstd
from serve_helpers import DOCUMENTS, QUERY, STATE, post, within

NOUL = {"type": "noul", "instructions": "Is it urgent?"}
PREDICATE = {"type": "predicate", "instructions": "It is urgent."}
CHOICES = [{"value": "a"}, {"value": "b"}]


def rerank(**fields: Any) -> dict[str, Any]:
    return {"query": QUERY, "documents": DOCUMENTS, **fields}


def texts(**fields: Any) -> dict[str, Any]:
    return {"query": QUERY, "texts": DOCUMENTS, **fields}


def items(**fields: Any) -> dict[str, Any]:
    return {"query": QUERY, "items": DOCUMENTS, **fields}


def pairs(**fields: Any) -> dict[str, Any]:
    return {"text_1": QUERY, "text_2": DOCUMENTS, **fields}


def asked(*questions: Any, state: Any = STATE, **fields: Any) -> dict[str, Any]:
    named = {f"q{i}": question for i, question in enumerate(questions)}
    return {"state": state, "questions": named, **fields}


def decided(*questions: Any, about: Any = STATE, **fields: Any) -> dict[str, Any]:
    return {"input": about, "questions": list(questions), **fields}


def message(*content: Any) -> list[Any]:
    return [{"role": "user", "content": list(content)}]


# path, body, what the error names
BAD: dict[str, tuple[str, Any, str]] = {
    # no JSON, or none that is an object
    "nothing": ("/rerank", b"", "body"),
    "an open brace": ("/rerank", b"{", "body"),
    "half a string": ("/v1/score", b'{"query": "a', "body"),
    "a comma too many": ("/v1/rerank", b'{"query": "a", "documents": ["b"],}', "body"),
    "two objects": ("/v1/rerank", b'{"query": "a"} {}', "body"),
    "single quotes": ("/score", b"{'text_1': 'a'}", "body"),
    "no text": ("/v1/systemone", b'\xff\xfe{"state": "a"}', "body"),
    "latin-1": ("/v1/systemone", '{"state": "é"}'.encode("latin-1"), "body"),
    "utf-16": ("/v1/decisions", '{"input": "a"}'.encode("utf-16"), "body"),
    "a list": ("/rerank", [], "body"),
    "a number": ("/v1/score", 7, "body"),
    "null": ("/v1/decisions", None, "body"),
    "a string": ("/v1/systemone", "state", "body"),
    # what JSON cannot say
    "NaN": ("/v1/rerank", b'{"query": "a", "documents": ["b"], "top_n": NaN}', "top_n"),
    "an infinity": ("/v1/systemone", b'{"state": {"a": [1, -Infinity]}}', "state.a[1]"),
    "a huge float": ("/v1/systemone", b'{"state": [1e999], "questions": {"a": %b}}', "state"),
    "a huge int": ("/v1/rerank", b'{"query": "a", "top_n": 1%b}' % (b"0" * 6000), "body"),
    "half a pair": ("/rerank", b'{"query": "\\ud83d", "texts": ["a"]}', "query"),
    "half a pair in a list": (
        "/v1/score",
        b'{"query": "a", "items": ["a", "\\udc3c"]}',
        "items[1]",
    ),
    "half a pair in a key": ("/v1/systemone", b'{"state": {"\\ud83d": 1}}', "state.?"),
    "deep lists": ("/v1/systemone", b'{"state": ' + b"[" * 100_000, "state"),
    "deep objects": ("/v1/decisions", b'{"input": ' + b'{"a":' * 100_000, "input"),
    "closed deep lists": (
        "/rerank",
        b'{"query": "a", "documents": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "documents",
    ),
    "deep for a state": (
        "/v1/systemone",
        asked(NOUL, state=json.loads("[" * 90 + "]" * 90)),
        "state",
    ),
    # fields that are missing, or of another type
    "no documents": ("/rerank", {"query": QUERY}, "documents"),
    "no query": ("/rerank", {"texts": DOCUMENTS}, "query"),
    "neither": ("/v1/score", {"model": "tiny"}, "query"),
    "one of a pair": ("/score", {"text_1": QUERY}, "text_2"),
    "no state": ("/v1/systemone", {"questions": {"a": NOUL}}, "state"),
    "no questions": ("/v1/systemone", {"state": STATE}, "questions"),
    "no input": ("/v1/decisions", {"questions": [PREDICATE]}, "input"),
    "query is a number": ("/v1/rerank", rerank(query=7), "query"),
    "query is null": ("/rerank", texts(query=None), "query"),
    "documents is text": ("/v1/rerank", rerank(documents="a"), "documents"),
    "documents is an object": ("/v2/rerank", rerank(documents={"0": "a"}), "documents"),
    "a document is null": ("/v2/rerank", rerank(documents=["a", None]), "documents[1]"),
    "a document has no text": ("/rerank", rerank(documents=[{"txt": "a"}]), "documents[0].text"),
    "its text is a list": ("/rerank", rerank(documents=["", {"text": []}]), "documents[1].text"),
    "a text is a bool": ("/rerank", texts(texts=["a", True]), "texts[1]"),
    "an item is a float": ("/v1/score", items(items=[0.5]), "items[0]"),
    "items of both kinds": ("/v1/score", items(items=["a", [1]]), "items[1]"),
    "a text of a pair is an object": ("/score", pairs(text_2=[{"content": []}]), "text_2[0]"),
    "the model is a number": ("/v1/rerank", rerank(model=1), "model"),
    "a flag is text": ("/v1/score", items(apply_softmax="yes"), "apply_softmax"),
    "a flag is a number": ("/rerank", texts(raw_scores=1), "raw_scores"),
    "labels are text": ("/v1/score", items(label_token_ids=["yes"]), "label_token_ids[0]"),
    "labels are bools": ("/v1/score", items(label_token_ids=[True]), "label_token_ids[0]"),
    "state is a number": ("/v1/systemone", asked(NOUL, state=1), "state"),
    "state is null": ("/v1/systemone", asked(NOUL, state=None), "state"),
    "questions is a list": ("/v1/systemone", asked() | {"questions": [NOUL]}, "questions"),
    "a question is text": ("/v1/systemone", asked("urgent?"), "questions"),
    "questions is an object": ("/v1/decisions", decided() | {"questions": {}}, "questions"),
    # values that are out of range
    "no documents in it": ("/v1/rerank", rerank(documents=[]), "documents"),
    "no texts in it": ("/rerank", texts(texts=[]), "texts"),
    "no items in it": ("/v1/score", items(items=[]), "items"),
    "no pairs in it": ("/score", pairs(text_2=[]), "text_2"),
    "no labels in it": ("/v1/score", items(label_token_ids=[]), "label_token_ids"),
    "top_n below zero": ("/v1/rerank", rerank(top_n=-1), "top_n"),
    "top_n of zero": ("/v2/rerank", rerank(top_n=0), "top_n"),
    "top_n is a float": ("/v2/rerank", rerank(top_n=1.5), "top_n"),
    "a label below zero": ("/v1/score", items(label_token_ids=[-1]), "label_token_ids"),
    "a label that is none": ("/v1/score", items(label_token_ids=[10**12]), "label_token_ids"),
    "a label beyond all ints": ("/v1/score", items(label_token_ids=[10**400]), "label_token_ids"),
    "sides of two lengths": ("/score", pairs(text_1=["a", "b"]), "text_1"),
    "ids for a prompt": ("/v1/score", {"query": [1], "items": [[2]]}, "query"),
    "no questions in it": ("/v1/systemone", asked(), "questions"),
    "no decisions in it": ("/v1/decisions", decided(), "questions"),
    "a query over the budget": ("/v1/rerank", rerank(query="word " * 50_000), "query"),
    "too many items": ("/v1/score", items(items=["a"] * 101), "items"),
    "too many pairs": ("/score", pairs(text_2=["a"] * 101), "text_2"),
    "too many questions": ("/v1/systemone", asked(*[NOUL] * 11), "questions"),
    "too many bytes": ("/v1/rerank", rerank(query="a" * 2**20), "body"),
    # both kinds at once
    "documents and texts": ("/rerank", rerank(texts=DOCUMENTS), "texts"),
    "items and pairs": ("/v1/score", items() | pairs(), "text_1"),
    "two kinds of pairs": ("/score", pairs(data_1="a", data_2="b"), "data_1"),
    # what is asked for and not done
    "a picture as document": ("/v1/rerank", rerank(documents=[{"image": "a"}]), "documents[0]"),
    "pictures of a state": ("/v1/systemone", asked(NOUL, images=["a"]), "images"),
    "a picture in the input": (
        "/v1/decisions",
        decided(PREDICATE, about=message({"type": "input_image", "image_url": "a"})),
        "input[0].content[0]",
    ),
    "a box": ("/v1/systemone", asked({"type": "box", "instructions": "a"}), "questions"),
    "cut documents": ("/v2/rerank", rerank(max_tokens_per_doc=5), "max_tokens_per_doc"),
    "ranked fields": ("/v1/rerank", rerank(rank_fields=["title"]), "rank_fields"),
    "cut from the left": ("/rerank", texts(truncation_direction="left"), "truncation_direction"),
    "an instruction": ("/v1/rerank", rerank(instruction="find poems"), "instruction"),
    "a salt": ("/score", pairs(cache_salt="a"), "cache_salt"),
    "cut prompts": ("/score", pairs(truncate_prompt_tokens=9), "truncate_prompt_tokens"),
    # questions and messages that are malformed
    "an unknown type": ("/v1/systemone", asked({"type": "guess"}), "type"),
    "an unknown criterion": (
        "/v1/systemone",
        asked(NOUL | {"criteria": {"yes": "a"}}),
        "criteria",
    ),
    "a choice of nothing": ("/v1/systemone", asked({"type": "choice", "criteria": {}}), "criteria"),
    "a type of the other shape": ("/v1/decisions", decided(NOUL), "questions[0].type"),
    "no instructions": ("/v1/decisions", decided({"type": "predicate"}), "instructions"),
    "a name twice": (
        "/v1/decisions",
        decided(PREDICATE | {"name": "a"}, PREDICATE | {"name": "a"}),
        "questions[1].name",
    ),
    "a choice that is a number": (
        "/v1/decisions",
        decided({"type": "choice", "instructions": "a", "choices": [*CHOICES, {"value": 1}]}),
        "choices[2].value",
    ),
    "no messages": ("/v1/decisions", decided(PREDICATE, about=[]), "input"),
    "a message is text": ("/v1/decisions", decided(PREDICATE, about=["a"]), "input[0]"),
    "nobody's message": (
        "/v1/decisions",
        decided(PREDICATE, about=[{"role": "nobody", "content": "a"}]),
        "input[0].role",
    ),
    "a message of nothing": (
        "/v1/decisions",
        decided(PREDICATE, about=[{"role": "user", "content": []}]),
        "input[0].content",
    ),
    "a part without its text": (
        "/v1/decisions",
        decided(PREDICATE, about=message({"type": "input_text"})),
        "input[0].content[0]",
    ),
}
TOO_LARGE = {"too many items", "too many pairs", "too many questions", "too many bytes"}


@pytest.fixture(scope="module")
def strict(scorer: MultiItemScorer) -> Any:
    return create_app(
        {"tiny": scorer},
        limits=Limits(max_items=100, max_questions=10, max_body_bytes=2**20),
    )


def told(response: httpx.Response) -> str:
    """What an error says to people, whatever its shape."""
    found = response.json()
    found = found.get("error", found)
    found = found if isinstance(found, str) else found.get("message", found.get("detail"))
    return str(found[0]["msg"] if isinstance(found, list) else found)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_body_is_refused_by_the_name_of_its_field(strict: Any, name: str) -> None:
    path, body, field = BAD[name]
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = post(strict, path, data.replace(b"%b", json.dumps(NOUL).encode()))
    assert response.status_code in ((413,) if name in TOO_LARGE else (400, 422)), response.text
    assert field in told(response)
    assert len(response.content) < 2000  # it does not send the body back


def greedy_frame() -> bytes:
    """What asks for 128 MiB before its first byte comes out."""
    made = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    return made.compress(b" " * 2**20, mode=made.FLUSH_BLOCK) + made.flush()


@pytest.mark.parametrize(
    ("headers", "data", "status", "named"),
    [
        ({"content-encoding": "gzip"}, gzip.compress(b" " * 10**8), 415, "content-encoding"),
        ({"content-encoding": "deflate"}, b"x", 415, "content-encoding"),
        ({"content-encoding": "zstd"}, zstd.compress(b" " * 10**8), 413, "body"),
        ({"content-encoding": "zstd"}, zstd.compress(b" " * 10**5)[:-9], 400, "body"),
        ({"content-encoding": "zstd"}, zstd.compress(b"{}") * 2, 400, "body"),
        ({"content-encoding": "zstd"}, b"{}", 400, "body"),
        ({"content-encoding": "zstd"}, greedy_frame(), 400, "too much memory"),
        ({"content-encoding": "br, gzip"}, b"x", 415, "content-encoding"),
        ({"content-type": "text/plain"}, b"{}", 415, "content-type"),
        ({"content-type": "multipart/form-data; boundary=a"}, b"{}", 415, "content-type"),
        ({"content-length": str(10**8)}, b"{}", 413, "body"),
        ({"content-length": "9" * 400}, b"{}", 413, "body"),
    ],
    ids=[
        *(
            "bomb",
            "deflate",
            "zstd bomb",
            "half zstd",
            "zstd twice",
            "no zstd",
            "zstd wants",
            "two",
        ),
        *("text", "form", "told", "told absurdly"),
    ],
)
def test_headers_that_promise_something_else_are_refused(
    strict: Any, headers: dict[str, str], data: bytes, status: int, named: str
) -> None:
    response = post(strict, "/rerank", data, **headers)
    assert response.status_code == status, response.text
    assert named in told(response)


def test_a_body_may_be_compressed_by_zstd(strict: Any) -> None:
    path, body = "/v1/systemone", asked(NOUL, state="again " * 2000)
    data = zstd.compress(json.dumps(body).encode())
    found = post(strict, path, data, **{"content-encoding": "zstd"})
    assert found.json()["answers"] == post(strict, path, body).json()["answers"]


def test_a_body_longer_than_it_says_is_read_no_further_than_the_limit(strict: Any) -> None:
    """100 MB in pieces, with no length or a short one: none of it is kept."""
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b" " * 10**6

    async def call(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(
            "/v1/rerank", content=pieces(), headers={"content-type": "application/json"}
        )

    response = within(strict, call)
    assert response.status_code == 413
    assert "body" in response.text
    assert sent == 100  # its client could send all of it, and so comes to read the answer
    assert strict.state.packscore.held_bytes == 0


def test_a_body_that_is_too_long_in_one_piece_is_refused_at_once(strict: Any) -> None:
    """Nothing of it is left to read, and nobody waits for more."""

    async def piece() -> AsyncIterator[bytes]:
        yield b" " * 2**21

    async def call(client: httpx.AsyncClient) -> httpx.Response:
        headers = {"content-type": "application/json"}
        async with asyncio.timeout(10):
            return await client.post("/v1/rerank", content=piece(), headers=headers)

    assert within(strict, call).status_code == 413


def test_the_server_goes_on(strict: Any, scorer: MultiItemScorer) -> None:
    for name in ("deep objects", "a label that is none", "too many bytes", "documents and texts"):
        path, body, _ = BAD[name]
        post(strict, path, body)
    response = post(strict, "/v2/rerank", rerank())
    assert [one["index"] for one in response.json()["results"]] == [
        one["corpus_id"] for one in scorer.rank(QUERY, DOCUMENTS)
    ]
