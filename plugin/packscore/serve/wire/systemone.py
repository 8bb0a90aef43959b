"""Decisions as clients of System One ask for them.

Source: the requests of typesafe-sdk and systemone-client, and SGLang's /v1/systemone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from packscore.serve.call import Call
from packscore.serve.refusals import RefusedError
from packscore.serve.wire.kinds import Body, Family, Kind

QUESTION = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"enum": ["noul", "choice", "score"]},
        "instructions": {"description": "what is asked: text or JSON"},
        "criteria": {
            "description": "noul: what counts as true and as false; choice: description or null "
            "by option; score: levels, lowest first"
        },
    },
    "additionalProperties": False,
}


class SystemOneBody(Body):
    """A state, and typed questions about it by id."""

    state: str | dict[str, Any] | list[Any]
    questions: Annotated[
        dict[str, Any],
        Field(min_length=1),
        WithJsonSchema({"type": "object", "minProperties": 1, "additionalProperties": QUESTION}),
    ]


def _error(refusal: RefusedError, status: int, request_id: str) -> dict[str, Any]:
    if status != FAMILY.status:
        return {"detail": refusal.message}
    return {"detail": [{"loc": refusal.loc, "msg": refusal.message, "type": "value_error"}]}


FAMILY = Family("System One", 422, _error)


async def _answer(call: Call, body: SystemOneBody) -> Callable[[], Any]:
    decision = await call.decide(body.state, body.questions)

    def answered() -> dict[str, Any]:
        found, used = decision.to_systemone(), call.usage()
        found["usage"] |= {name: used[name] for name in ("computed_tokens", "saved_tokens")}
        return found

    return answered


NO_PICTURES = "only text can be read; describe them in the state"
SYSTEM_ONE = Kind(
    name="System One",
    family=FAMILY,
    body=SystemOneBody,
    needs=("state",),
    answer=_answer,
    example={
        "state": "My card was charged twice for one order.",
        "questions": {
            "urgent": {"type": "noul", "instructions": "Is it urgent?"},
            "team": {
                "type": "choice",
                "instructions": "Which team should answer?",
                "criteria": {"billing": "payments and refunds", "technical": None},
            },
            "mood": {"type": "score", "criteria": ["angry", "neutral", "happy"]},
        },
    },
    unserved={name: (([], {}), NO_PICTURES) for name in ("assets", "images")},
)
