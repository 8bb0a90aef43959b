"""Decisions in OpenAI's shape.

Source: the types of openai's `decisions.create`, and vLLM's /v1/decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema

from packscore.inputs import short
from packscore.serve.call import Call
from packscore.serve.refusals import RefusedError
from packscore.serve.wire.kinds import Body, Family, Kind

ROLES = ("user", "assistant", "system", "developer")
# what stands between messages, and is JSON to the model
TOOLS = ("function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output")
OPTION = {"type": "object", "properties": {"description": {"type": ["string", "null"]}}}
QUESTION = {
    "type": "object",
    "required": ["type", "instructions"],
    "properties": {
        "type": {"enum": ["predicate", "choice", "score"]},
        "name": {"type": ["string", "null"]},
        "instructions": {"description": "text, or a list of input_text and input_json parts"},
        "choices": {"type": "array", "items": OPTION | {"required": ["value"]}},
        "levels": {"type": "array", "items": OPTION | {"required": ["label"]}},
    },
}


class DecisionsBody(Body):
    """An input, and a list of questions about it."""

    input: str | list[Any]
    questions: Annotated[
        list[Any],
        Field(min_length=1),
        WithJsonSchema({"type": "array", "minItems": 1, "items": QUESTION}),
    ]


def _error(refusal: RefusedError, status: int, request_id: str) -> dict[str, Any]:
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    found = {"message": refusal.message, "type": kind, "param": refusal.param, "code": None}
    return {"error": found}


FAMILY = Family("OpenAI", 400, _error)


def state_of(value: str | list[Any]) -> Any:
    """An input as the state that questions are asked about.

    One message of one part is what the part says, so that text and JSON are the same state as in
    System One's shape; several are a list of {"role", "content"}.

    Raises:
      RefusedError: something in it is neither text nor JSON.
    """
    if isinstance(value, str):
        return value
    if not value:
        raise RefusedError(
            "input is empty; it must be text, or at least one message", None, "input"
        )
    found = [_entry(f"input[{i}]", entry) for i, entry in enumerate(value)]
    only = found[0]
    return only["content"] if len(found) == 1 and set(only) == {"role", "content"} else found


def _entry(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise RefusedError(
            f"{where}={short(entry)} must be a message: role and content", None, where
        )
    kind = entry.get("type", "message")
    if kind in TOOLS:
        return dict(entry)
    if kind != "message":
        raise RefusedError(
            f"{where}.type={short(kind)} is not read; send messages of text or JSON, or tool calls",
            None,
            f"{where}.type",
        )
    if entry.get("role") not in ROLES:
        raise RefusedError(
            f"{where}.role={short(entry.get('role'))} must be one of {', '.join(ROLES)}",
            None,
            f"{where}.role",
        )
    content = entry.get("content")
    if isinstance(content, list) and content:
        parts = [_part(f"{where}.content[{i}]", part) for i, part in enumerate(content)]
        content = parts[0] if len(parts) == 1 else parts
    elif not isinstance(content, str):
        raise RefusedError(
            f"{where}.content={short(content)} must be text, or a list of parts",
            None,
            f"{where}.content",
        )
    return {"role": entry["role"], "content": content}


def _part(where: str, part: Any) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    key = {"input_json": "data", "input_text": "text", "output_text": "text"}.get(str(kind))
    if key is None or key not in part or (key == "text" and not isinstance(part[key], str)):
        raise RefusedError(
            f"{where}.type={short(kind)} is not read; send input_text with its text, or input_json "
            "with its data: only text and JSON can be read",
            None,
            where,
        )
    return part[key]


async def _answer(call: Call, body: DecisionsBody) -> Callable[[], Any]:
    decision = await call.decide(state_of(body.input), body.questions)
    return decision.to_decisions


DECISIONS = Kind(
    name="OpenAI",
    family=FAMILY,
    body=DecisionsBody,
    needs=("input",),
    answer=_answer,
    example={
        "input": "My card was charged twice for one order.",
        "questions": [
            {"type": "predicate", "name": "urgent", "instructions": "It is urgent."},
            {
                "type": "choice",
                "name": "team",
                "instructions": "Which team should answer?",
                "choices": [{"value": "billing"}, {"value": "technical"}],
            },
        ],
    },
    unserved={name: (([], {}), "only text can be read; describe them") for name in ("images",)},
)
