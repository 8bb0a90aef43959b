"""What those who wait get: results, and errors of their own."""

from __future__ import annotations

import copy
from typing import Any

from packscore.batcher.waiting import Call
from packscore.errors import BatcherClosedError, LaunchError, PackscoreError


def closed() -> BatcherClosedError:
    """Of a batcher that takes no more."""
    return BatcherClosedError(
        "the batcher is closed and takes no more requests; start another with "
        "scorer.start_batcher()"
    )


def fault_of(failure: BaseException) -> LaunchError:
    """The error of one request of a launch that failed."""
    error = LaunchError(
        f"the launch that this request was in failed ({type(failure).__name__}: {failure}); try it "
        "again, and look at the cause if it fails once more"
    )
    error.__cause__ = failure
    return error


def own(error: BaseException) -> Exception:
    """The error for one of many that it meets: each raises its own."""
    if isinstance(error, PackscoreError):
        return copy.copy(error).with_traceback(error.__traceback__)
    return fault_of(error)


def deliver(results: list[tuple[Call, Any]]) -> None:
    """In the event loop of those who wait."""
    for call, result in results:
        if call.future.done():  # cancelled meanwhile
            continue
        if not isinstance(result, BaseException):
            call.future.set_result(result)
            continue
        if not isinstance(result, Exception) or isinstance(result, StopIteration):
            result = RuntimeError(repr(result))  # what no future takes, or what ends its loop
        call.future.set_exception(result)
