"""A request that is ready to run, whatever is read of it: one at a time, many, or in a queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from packscore.core import ScoringCore
from packscore.encoded import EncodedRequest
from packscore.errors import ScoringError
from packscore.flows.reads import Read
from packscore.results import Flow

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """What runs, what is read of it, and what the caller gets of that.

    Args:
      request: encoded query and items.
      read: what the engine reads of them.
      finish: from `LabelLogits` or `HiddenRows` to the result; may raise what is wrong with it.
    """

    request: EncodedRequest
    read: Read
    finish: Callable[[Any], T]

    def run(self, core: ScoringCore, flow: Flow | None) -> T:
        """The result; raises the error that it met."""
        return self.finish(core.run_one(self.request, self.read, flow=flow))


def run_all(
    core: ScoringCore,
    prepared: Sequence[Prepared[T] | Exception],
    *,
    flow: Flow | None,
    progress: Callable[[int], object] = lambda _: None,
) -> list[T | Exception]:
    """The result of each, or the error that it met, or was.

    Args:
      core: of the scorer.
      prepared: requests, and errors in the place of those that could not be prepared.
      flow: of all.
      progress: called with the number of items that were scored since.
    """
    ready = [one for one in prepared if isinstance(one, Prepared)]
    requests, reads = [one.request for one in ready], [one.read for one in ready]
    ran = iter(core.run(requests, reads, flow=flow, progress=progress))
    results: list[T | Exception] = []
    for one in prepared:
        found = one if isinstance(one, Exception) else next(ran)
        if isinstance(one, Prepared) and not isinstance(found, Exception):
            try:
                found = one.finish(found)
            except Exception as error:  # whatever a head of the user's raises
                found = error
        results.append(found)
    return results


def check_failed(results: Sequence[Any], kept: str) -> None:
    """Refuse results that are errors, with the others in one error.

    Args:
      results: of many requests.
      kept: what the others are, for people.

    Raises:
      ScoringError: there are some.
    """
    failed = [(i, one) for i, one in enumerate(results) if isinstance(one, Exception)]
    if not failed:
        return
    first, cause = failed[0]
    raise ScoringError(
        f"{len(failed)} of {len(results)} requests failed, the first is requests[{first}] "
        f"({cause}); the {kept} of the others are in this error's .scores",
        [None if isinstance(one, Exception) else one for one in results],
    ) from cause
