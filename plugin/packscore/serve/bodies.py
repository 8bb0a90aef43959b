"""Bodies of requests: read up to a limit, parsed as strict JSON, and their faults named."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from packscore.serve.refusals import RefusedError, too_large

# what typesafe-sdk compresses with
if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

T = TypeVar("T")
# what takes longer than a few milliseconds is done beside the event loop
SMALL_BYTES = 64 * 2**10
# the parser's own; below it a state may be nested as deep as `decide` takes
MAX_DEPTH = 200
# of a body that is refused: a client that is cut off while it sends reads no answer
DISCARDED_BYTES, DISCARD_SECONDS = 256 * 2**20, 30.0
# of the memory that zstd may take beside what it makes, 8 MiB, as much as its usual levels ask for
WINDOW_LOG = 23
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+"(\s*:)?|[\[\]{}]', re.DOTALL)


async def offload(size: int, call: Callable[..., T], *args: Any) -> T:
    """Call a function, in a thread where what it works on is large."""
    return call(*args) if size < SMALL_BYTES else await asyncio.to_thread(call, *args)


async def read_body(
    receive: Receive, headers: Headers, most: int, take: Callable[[int], None]
) -> bytes:
    """The bytes of a body.

    Args:
      receive: of a request of which nothing was read.
      headers: of it.
      most: bytes to keep; what a header says they are is not believed.
      take: called with the size of each piece before it is kept, and may refuse it.

    Raises:
      RefusedError: it is compressed by other means than zstd, not JSON by its type, or too large.
      ClientDisconnect: its client is gone.
    """
    pieces: list[bytes] = []
    size, more = 0, True
    try:
        encoding = _encoding_of(headers, most)
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if size > most:
                raise too_large("body", size, most, "bytes")
            take(len(piece))
            pieces.append(piece)
    except RefusedError:
        if more:
            await discard(receive, headers)
        raise
    data = b"".join(pieces)
    if encoding != "zstd":
        return data
    whole = await asyncio.to_thread(_decompressed, data, most)
    take(len(whole))
    return whole


def _encoding_of(headers: Headers, most: int) -> str:
    """How a body is compressed: "zstd", or not at all; raises what its headers are refused for."""
    encoding = headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity", "zstd"):
        raise RefusedError(
            f"content-encoding: {encoding[:40]} is not taken; send the body as it is, or zstd",
            415,
            "content-encoding",
        )
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        raise RefusedError(
            f"content-type: {kind[:40]} is not taken; send application/json", 415, "content-type"
        )
    told = headers.get("content-length", "")
    if told.isascii() and told.isdigit() and (len(told) > 15 or int(told) > most):
        raise too_large("body", int(told[:15]), most, "bytes")
    return encoding


async def discard(receive: Receive, headers: Headers) -> None:
    """Read what is left of a body and keep nothing, so that its client comes to read the answer."""
    if headers.get("expect", "").lower() == "100-continue":
        return  # it waits to be asked
    left, more = DISCARDED_BYTES, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while more and left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                more = message.get("more_body", False)


def _decompressed(data: bytes, most: int) -> bytes:
    """What was compressed, of which no more is made than may be kept."""
    # a frame may ask for a window of 2 GB before its first byte comes out
    reader = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})
    try:
        whole = reader.decompress(data, max_length=most + 1)
    except zstd.ZstdError as error:
        raise RefusedError(f"body is not what zstd makes: {error}", 400, "body") from None
    if len(whole) > most:
        raise too_large("body", len(whole), most, "bytes")
    if not reader.eof or reader.unused_data:
        raise RefusedError("body is not one whole frame of zstd", 400, "body")
    return whole


def parse(data: bytes) -> dict[str, Any]:
    """A body as a JSON object.

    Raises:
      RefusedError: it is none, or holds NaN, an infinity or half of a surrogate pair.
    """
    try:
        found = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise _told(data, str(error)) from None
    if not isinstance(found, dict):
        raise RefusedError(
            f"body is a JSON {type(found).__name__}; it must be an object", None, "body"
        )
    return found


def _told(data: bytes, reason: str) -> RefusedError:
    """Which field is at fault, found a second time and slowly."""
    deep = _deep_field(data)
    if deep is not None:
        return RefusedError(f"{deep} is nested more than {MAX_DEPTH} deep", 400, deep)
    try:
        field, what = _odd(json.loads(data), "")
    except (ValueError, RecursionError):  # of ValueError also UnicodeDecodeError
        field, what = "body", ""
    if what:
        return RefusedError(f"{field} holds {what}, which JSON cannot say", 400, field)
    return RefusedError(f"body is not JSON: {reason}", 400, "body")


def _deep_field(data: bytes) -> str | None:
    """The field of the body that is nested deeper than the parser goes."""
    depth, name = 0, "body"
    for token in TOKEN.finditer(data):
        mark = token.group()
        if mark in (b"[", b"{"):
            depth += 1
        elif mark in (b"]", b"}"):
            depth -= 1
        elif depth == 1 and token.group(1) is not None:
            name = mark.partition(b'"')[2].rpartition(b'"')[0].decode("utf-8", "replace")[:60]
        if depth > MAX_DEPTH:
            return name
    return None


def _odd(value: Any, where: str) -> tuple[str, str]:
    """(its path, what it is) of the first value that JSON cannot say; ("", "") of none."""
    if isinstance(value, float) and not math.isfinite(value):
        return where or "body", "NaN or an infinity"
    if isinstance(value, str):
        is_half = any("\ud800" <= letter <= "\udfff" for letter in value)
        return (where or "body", "half of a surrogate pair") if is_half else ("", "")
    entries: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        for key, entry in value.items():
            shown = key.encode("utf-8", "replace").decode()[:60]
            if _odd(key, "")[1]:
                return f"{where}.{shown}".lstrip("."), "half of a surrogate pair"
            entries.append((f"{where}.{shown}".lstrip("."), entry))
    elif isinstance(value, list):
        entries = [(f"{where}[{i}]", entry) for i, entry in enumerate(value)]
    return next((odd for name, entry in entries if (odd := _odd(entry, name))[1]), ("", ""))
