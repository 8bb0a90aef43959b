"""Rerank as clients of Text Embeddings Inference send it.

Source: huggingface/text-embeddings-inference, docs/openapi.json.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from packscore.results import RankedDocument
from packscore.serve.call import Call
from packscore.serve.refusals import RefusedError
from packscore.serve.wire.kinds import Body, Family, Kind


class RanksBody(Body):
    """Texts to put in order."""

    query: str
    texts: Annotated[list[str], Field(min_length=1)]
    raw_scores: bool | None = None
    return_text: bool | None = None
    truncate: bool | None = None


TYPES = {429: "Overloaded", 424: "Backend", 503: "Unhealthy", 504: "Backend"}


def _error(refusal: RefusedError, status: int, request_id: str) -> dict[str, Any]:
    return {"error": refusal.message, "error_type": TYPES.get(status, "Validation")}


FAMILY = Family("Text Embeddings Inference", 422, _error)


async def _answer(call: Call, body: RanksBody) -> Callable[[], Any]:
    ranked = await call.rank(
        body.query, body.texts, raw=bool(body.raw_scores), name="texts[{}]".format
    )
    if body.truncate is False:
        call.check_whole("texts")

    def result(one: RankedDocument) -> dict[str, Any]:
        found = {"index": one["corpus_id"], "score": one["score"]}
        return found | ({"text": body.texts[one["corpus_id"]]} if body.return_text else {})

    return lambda: [result(one) for one in ranked]


RANKS = Kind(
    name="Text Embeddings Inference",
    family=FAMILY,
    body=RanksBody,
    needs=("texts",),
    answer=_answer,
    example={
        "query": "parse a json string",
        "texts": ["Deserialize a str to a Python object.", "Return the cosine of x."],
        "raw_scores": False,
    },
    unserved={
        "truncation_direction": (
            ("right", "Right"),
            "a text that is too long loses its end; leave it out",
        ),
    },
)
