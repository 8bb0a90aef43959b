"""Scores as SGLang's clients ask for them.

Source: sgl-project/sglang, python/sglang/srt/entrypoints/openai/protocol.py (ScoringRequest).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from packscore.serve.call import Call
from packscore.serve.refusals import RefusedError
from packscore.serve.wire.kinds import Body, Family, Kind, error_type

Ids = list[int]


class ScoringBody(Body):
    """Items to score; without `label_token_ids` the labels are the server's."""

    query: str | Ids
    items: (
        Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)] | str
    )
    label_token_ids: Annotated[Ids, Field(min_length=1)] | None = None
    apply_softmax: bool = False
    item_first: bool = False


def _error(refusal: RefusedError, status: int, request_id: str) -> dict[str, Any]:
    return {
        "object": "error",
        "message": refusal.message,
        "type": error_type(status),
        "param": refusal.param,
        "code": status,
    }


FAMILY = Family("SGLang", 400, _error)


async def _answer(call: Call, body: ScoringBody) -> Callable[[], Any]:
    scores = await call.score(
        body.query,
        [body.items] if isinstance(body.items, str) else body.items,
        body.label_token_ids,
        apply_softmax=body.apply_softmax,
        item_first=body.item_first,
    )
    return lambda: {
        "scores": scores,
        "model": call.model,
        "usage": call.usage(),
        "object": "scoring",
    }


SCORING = Kind(
    name="SGLang",
    family=FAMILY,
    body=ScoringBody,
    needs=("query", "items"),
    answer=_answer,
    example={
        "query": "parse a json string",
        "items": ["Deserialize a str to a Python object.", "Return the cosine of x."],
        "apply_softmax": True,
    },
    unserved={
        "query_embed_overrides": ((), "embeddings cannot be replaced; send texts"),
        "item_embed_overrides": ((), "embeddings cannot be replaced; send texts"),
        "embed_override_token_id": ((), "embeddings cannot be replaced; send texts"),
    },
)
