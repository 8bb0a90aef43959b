"""Scores of pairs as vLLM's clients ask for them.

Source: vllm-project/vllm, vllm/entrypoints/pooling/scoring/protocol.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import Field

from packscore.serve.call import Call
from packscore.serve.refusals import RefusedError
from packscore.serve.wire.kinds import NOT_SERVED, Body, Family, Kind, error_type
from packscore.text.encoding import group_by_query

# queries of one body that wait at a time
GROUPS = 64
Texts = Annotated[list[str], Field(min_length=1)] | str


class PairsBody(Body):
    """One text against one or several, or pairs."""

    names: ClassVar[tuple[str, str]]

    use_activation: bool | None = None
    request_id: str | None = None

    def sides(self) -> tuple[list[str], list[str]]:
        """The two lists of texts, as many of the one as of the other, or one of the first.

        Raises:
          RefusedError: they do not fit.
        """
        first, second = (getattr(self, name) for name in self.names)
        first = [first] if isinstance(first, str) else first
        second = [second] if isinstance(second, str) else second
        if len(first) not in (1, len(second)):
            a, b = self.names
            raise RefusedError(
                f"{a} has {len(first)} texts and {b} {len(second)}; {a} must have one, or as many",
                None,
                a,
            )
        return first, second


class Text1Text2(PairsBody):
    """The pair as `text_1` and `text_2`."""

    names = ("text_1", "text_2")
    text_1: Texts
    text_2: Texts


class QueriesDocuments(PairsBody):
    """The pair as `queries` and `documents`."""

    names = ("queries", "documents")
    queries: Texts
    documents: Texts


class QueriesItems(PairsBody):
    """The pair as `queries` and `items`."""

    names = ("queries", "items")
    queries: Texts
    items: Texts


class Data1Data2(PairsBody):
    """The pair as `data_1` and `data_2`."""

    names = ("data_1", "data_2")
    data_1: Texts
    data_2: Texts


def _error(refusal: RefusedError, status: int, request_id: str) -> dict[str, Any]:
    found = {
        "message": refusal.message,
        "type": error_type(status),
        "param": refusal.param,
        "code": status,
    }
    return {"error": found}


FAMILY = Family("vLLM", 400, _error)


async def _answer(call: Call, body: PairsBody) -> Callable[[], Any]:
    first, second = body.sides()
    queries = first * len(second) if len(first) == 1 else first
    a, b = body.names
    scores = [0.0] * len(second)

    # one body leaves room in the queue for others
    turn = asyncio.Semaphore(max(1, min(GROUPS, call.scorer.batcher.max_requests // 8)))

    async def group(index: list[int]) -> None:
        async with turn:
            ranked = await call.rank(
                queries[index[0]],
                [second[i] for i in index],
                raw=body.use_activation is False,
                query_name=a if len(first) == 1 else f"{a}[{index[0]}]",
                name=lambda k: f"{b}[{index[k]}]",
            )
        for one in ranked:
            scores[index[one["corpus_id"]]] = one["score"]

    groups = group_by_query(list(zip(queries, second, strict=True)))
    try:
        async with asyncio.TaskGroup() as tasks:
            for index in groups:
                tasks.create_task(group(index))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return lambda: {
        "id": body.request_id or call.id,
        "object": "list",
        "created": int(time.time()),
        "model": call.model,
        "data": [{"index": i, "object": "score", "score": x} for i, x in enumerate(scores)],
        "usage": call.usage(),
    }


def _kind(body: type[PairsBody]) -> Kind:
    a, b = body.names
    return Kind(
        name=f"vLLM, {a} and {b}",
        family=FAMILY,
        body=body,
        needs=body.names,
        answer=_answer,
        example={
            a: "parse a json string",
            b: ["Deserialize a str to a Python object.", "Return the cosine of x."],
        },
        unserved=NOT_SERVED | {"label_token_ids": ((), "send query and items for labels")},
    )


BODIES: tuple[type[PairsBody], ...] = (Text1Text2, QueriesDocuments, QueriesItems, Data1Data2)
PAIRS = tuple(map(_kind, BODIES))
