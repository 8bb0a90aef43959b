"""From a request to its answer: read, parsed, told which clients' it is, answered, or refused."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from packscore.serve.bodies import offload, parse, read_body
from packscore.serve.call import Call
from packscore.serve.refusals import RefusedError, refusal_of
from packscore.serve.state import State
from packscore.serve.wire.kinds import Body, Family, Kind

T = TypeVar("T")

logger = logging.getLogger("packscore.serve")
# nobody reads it: the client is gone
GONE = 499
# bytes of a number in an answer
NUMBER = 20


@dataclass(frozen=True)
class Endpoint:
    """A path and what it takes; the first kind's family reads errors of bodies that are neither."""

    path: str
    kinds: tuple[Kind, ...]
    summary: str

    async def __call__(self, state: State, request: Request) -> Response:
        """The answer to a request, or an error in the shape of its family."""
        record = request.scope["packscore"]
        family = self.kinds[0].family
        held = state.hold_bytes()
        try:
            async with asyncio.timeout(state.limits.timeout_seconds):
                data = await read_body(
                    request.receive, request.headers, state.limits.max_body_bytes, held.take
                )
                raw = await offload(len(data), parse, data)
                family = self.family_of(raw)
                kind = self.kind_of(raw)
                body = await offload(len(data), _validated, kind, raw)
                name = state.models.find(body.model)
                call = Call(record.id, name, state.models.scorers[name], state.limits)
                record.call = call
                made = await _while_connected(request, kind.answer(call, body))
                answer = await offload(len(data) + NUMBER * call.numbers, _encoded, made)
        except ClientDisconnect:
            return Response(status_code=GONE)
        except TimeoutError:
            seconds = state.limits.timeout_seconds
            late = RefusedError(f"no answer within {seconds:g} seconds; send less", 504)
            return refused(family, late, record.id)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status in (424, 503):
                logger.warning("request %s: %s", record.id, type(error).__name__, exc_info=error)
            return refused(family, refusal, record.id)
        finally:
            held.release()
        headers = {"x-truncated-items": str(call.truncated)} if call.truncated else {}
        return Response(answer, headers=headers, media_type="application/json")

    def family_of(self, raw: Mapping[str, Any]) -> Family:
        """Whose errors to answer a body with."""
        return max(self.kinds, key=lambda kind: sum(name in raw for name in kind.needs)).family

    def kind_of(self, raw: Mapping[str, Any]) -> Kind:
        """Which of the kinds a body is, by the fields that it has.

        Raises:
          RefusedError: it is none, or several.
        """
        if len(self.kinds) == 1:
            return self.kinds[0]
        whole = [kind for kind in self.kinds if all(name in raw for name in kind.needs)]
        if len(whole) == 1:
            return whole[0]
        ways = [" and ".join(kind.needs) for kind in whole or self.kinds]
        if whole:
            own = set(whole[1].needs) - set(whole[0].needs)
            raise RefusedError(f"body has {', '.join(ways)}; send one of them", None, min(own))
        begun = max(self.kinds, key=lambda kind: sum(name in raw for name in kind.needs))
        missing = next(name for name in begun.needs if name not in raw)
        raise RefusedError(f"{missing} is missing; a body has {', or '.join(ways)}", None, missing)


def refused(family: Family, refusal: RefusedError, request_id: str) -> Response:
    """An error in a family's shape."""
    status = refusal.status or family.status
    body = json.dumps(family.error(refusal, status, request_id))
    return Response(body, status, dict(refusal.headers), "application/json")


def _validated(kind: Kind, raw: Mapping[str, Any]) -> Body:
    kind.check_served(raw)
    try:
        return kind.body.model_validate(raw)
    except ValidationError as error:
        told = [_told(one, raw) for one in error.errors(include_url=False, include_input=False)]
        # of the types that were tried, the one that came furthest is the one that was meant
        param, message = max(told, key=lambda one: len(one[0]))
        raise RefusedError(f"{param}: {message}", None, param) from None


def _told(error: ErrorDetails, raw: Any) -> tuple[str, str]:
    """(documents[3].text, what is wrong): where pydantic says, less the names of types it tried."""
    value, path, last = raw, "", len(error["loc"]) - 1
    for i, step in enumerate(error["loc"]):
        is_missing = error["type"] == "missing" and i == last
        if isinstance(step, int) and isinstance(value, list):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, Mapping) and (step in value or is_missing):
            path, value = f"{path}.{step}", value.get(str(step))
    return path.lstrip(".") or "body", error["msg"]


def _encoded(made: Callable[[], Any]) -> bytes:
    return json.dumps(made(), allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What a call gives, unless its client hangs up: then it is cancelled, and dropped if it waits.

    Raises:
      ClientDisconnect: it did.
    """

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answer = asyncio.create_task(work)
    gone = asyncio.create_task(leave())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)
