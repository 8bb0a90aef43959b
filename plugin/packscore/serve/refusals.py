"""Why a request gets no answer: a status and a message, from whatever was raised."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from packscore.errors import (
    BatcherClosedError,
    InputError,
    InputTypeError,
    LaunchError,
    NonFiniteScoreError,
    NotPatchedError,
    QueueFullError,
    RequestTooLargeError,
    UnsupportedModelError,
)

# what a message of packscore begins with: texts[3], questions['a b'].criteria
PATH = re.compile(r"[A-Za-z_]\w*(?:\[(?:\d+|'[^']*'|\"[^\"]*\")\]|\.[A-Za-z_]\w*)*")
PARTS = re.compile(r"\[(\d+)\]|\['([^']*)'\]|\[\"([^\"]*)\"\]|\.?([A-Za-z_]\w*)")
RETRY = {"retry-after": "1"}


@dataclass
class RefusedError(Exception):
    """A request that gets an error instead of an answer.

    Args:
      message: for people; it names the field, its value where it is short, and the remedy.
      status: of HTTP; None: what the client's family takes for a body that cannot be answered.
      param: the field, such as "documents[3]"; None where it is no field's fault.
      headers: to answer with.
    """

    message: str
    status: int | None = None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def loc(self) -> list[str | int]:
        """The field as FastAPI names it: "body", and each step down."""
        steps = PARTS.findall(self.param or "")
        return ["body", *(int(n) if n else a or b or name for n, a, b, name in steps)]


def too_large(param: str, count: int, most: int, what: str) -> RefusedError:
    """A field that holds more than the server takes in one request."""
    return RefusedError(
        f"{param} has {count:,} {what}, over the {most:,} that this server takes in one request; "
        "send several requests",
        413,
        param,
    )


def refusal_of(error: Exception) -> RefusedError:
    """What an error of a scorer is to a client: its own fault, a full queue, a failed launch."""
    if isinstance(error, RefusedError):
        return error
    message = str(error)
    if isinstance(error, RequestTooLargeError):
        return RefusedError(message, 413)
    if isinstance(error, InputError | InputTypeError):
        found = PATH.match(message)
        return RefusedError(message, None, found.group() if found else None)
    if isinstance(error, NonFiniteScoreError):
        return RefusedError(message, 424)
    if isinstance(error, UnsupportedModelError):
        return RefusedError(message, 501)
    if isinstance(error, QueueFullError):
        wait = str(max(1, math.ceil(error.retry_after)))
        told = f"the queue is full; try again in {wait} s"
        return RefusedError(told, 429, headers={"retry-after": wait})
    if isinstance(error, NotPatchedError | BatcherClosedError):
        return RefusedError(message, 503, headers=RETRY)
    # of the launch, whose request was not at fault; its insides are for the log
    cause = error.__cause__ if isinstance(error, LaunchError) and error.__cause__ else error
    return RefusedError(
        f"the launch of this request failed ({type(cause).__name__}); try again",
        503,
        headers=RETRY,
    )
