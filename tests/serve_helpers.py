"""Requests to an app in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

QUERY = "parse a json string"
DOCUMENTS = [
    "Deserialize a str to a Python object.",
    "Return the cosine of x.",
    "",
    "Käse 🐼 ΐ",
    "Deserialize a str to a Python object.",
]
STATE = "My card was charged twice for one order."


def within(app: Any, call: Callable[[httpx.AsyncClient], Awaitable[T]], **headers: str) -> T:
    """What a function of a client of the app gives, in an event loop of its own."""

    async def run() -> T:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers=headers, timeout=60
        ) as client:
            return await call(client)

    return asyncio.run(run())


def post(app: Any, path: str, body: Any, **headers: str) -> httpx.Response:
    """The answer to a body: an object, or bytes as they are."""
    if isinstance(body, bytes):
        headers = {"content-type": "application/json"} | headers
        return within(app, lambda client: client.post(path, content=body, headers=headers))
    return within(app, lambda client: client.post(path, json=body, headers=headers))


def get(app: Any, path: str, **headers: str) -> httpx.Response:
    """The answer to a path."""
    return within(app, lambda client: client.get(path, headers=headers))
