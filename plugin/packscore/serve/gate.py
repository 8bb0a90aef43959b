"""Around every request: an id, a key, a line in the log, and no new ones while the server stops."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from packscore.serve.bodies import discard
from packscore.serve.call import Call
from packscore.serve.refusals import RefusedError
from packscore.serve.state import State

access = logging.getLogger("packscore.serve.access")

ID = re.compile(r"[\x21-\x7e]{1,128}")
# what says only that the server is there, and whether it is ready
ALIVE = ("/health", "/ready")
# what holds nothing of anybody's
OPEN = (*ALIVE, "/", "/docs", "/openapi.json")


@dataclass
class Record:
    """What the log says of a request; no text of it.

    Args:
      id: the client's own, or a new one.
      call: what was asked of a model, once that is known.
    """

    id: str
    call: Call | None = None
    started: float = field(default_factory=time.perf_counter)

    def line(self, endpoint: str, status: int) -> str:
        """One line of JSON."""
        found: dict[str, object] = {
            "id": self.id,
            "endpoint": endpoint,
            "status": status,
            "ms": round((time.perf_counter() - self.started) * 1e3, 1),
        }
        if self.call is not None:
            used = self.call.usages
            found |= {
                "model": self.call.model,
                "items": self.call.items,
                "tokens": sum(usage.computed_tokens for usage in used),
                "saved": sum(usage.prefix_tokens_saved for usage in used),
            }
        return json.dumps(found)


class Gate:
    """ASGI around an app.

    Args:
      app: what answers.
      state: of the app.
      paths: what it serves, for the log and the counters.
      refuse: (path, refusal, id of the request) to the answer, in the shape its clients read.
    """

    def __init__(
        self,
        app: ASGIApp,
        state: State,
        paths: frozenset[str],
        refuse: Callable[[str, RefusedError, str], Response],
    ) -> None:
        self._app, self._state, self._paths, self._refuse = app, state, paths, refuse
        # digests, all of one length, so that a comparison says nothing of it
        self._keys = [hashlib.sha256(key.encode()).digest() for key in state.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        path = path_of(scope)
        record = scope["packscore"] = Record(_id_of(headers))
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(scope=message)
                added["x-request-id"] = added["x-typesafe-request-id"] = record.id
                if self._state.draining:
                    added["connection"] = "close"
            await send(message)

        refusal = self._refusal(path, headers)
        app = self._app
        try:
            if refusal is not None:
                await discard(receive, headers)
                app = self._refuse(path, refusal, record.id)
            await app(scope, receive, answer)
        finally:
            self._note(path if path in self._paths else "other", status, record)

    def _refusal(self, path: str, headers: Headers) -> RefusedError | None:
        if self._state.draining and path not in (*ALIVE, "/metrics"):
            return RefusedError("the server is stopping", 503, headers={"retry-after": "5"})
        if self._keys and path not in OPEN and not self._has_key(headers):
            return RefusedError(
                "the API key is missing or wrong; send it as authorization: Bearer KEY, or as "
                "x-api-key: KEY",
                401,
                "authorization",
                {"www-authenticate": "Bearer"},
            )
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        # as bytes, which is what headers are
        digest = hashlib.sha256(given.encode("latin-1")).digest()
        return sum(hmac.compare_digest(digest, key) for key in self._keys) > 0

    def _note(self, endpoint: str, status: int, record: Record) -> None:
        seconds = time.perf_counter() - record.started
        self._state.metrics.requests.labels(endpoint, str(status)).inc()
        self._state.metrics.seconds.labels(endpoint).observe(seconds)
        if record.call is not None:
            self._state.metrics.items.labels(record.call.model).inc(record.call.items)
        if endpoint not in ALIVE:
            access.info(record.line(endpoint, status))


def path_of(scope: Scope) -> str:
    """The path within the app, wherever that is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def _id_of(headers: Headers) -> str:
    given = headers.get("x-request-id") or headers.get("x-typesafe-request-id") or ""
    return given if ID.fullmatch(given) else uuid.uuid4().hex
