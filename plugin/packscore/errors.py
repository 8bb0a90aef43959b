"""The exceptions of packscore: every one names the argument, its value and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from packscore.installed import install_command

# Places that an error names; it keeps all of them.
NAMED_INDICES = 5


class PackscoreError(Exception):
    """Base of all errors raised by packscore."""


class InputError(PackscoreError, ValueError):
    """An argument has a value that cannot be scored."""


class InputTypeError(PackscoreError, TypeError):
    """An argument is of a type that cannot be scored."""


class UnsupportedModelError(PackscoreError, ValueError):
    """The model, its configuration or its head cannot be scored exactly."""


class LoadError(PackscoreError, OSError):
    """A checkpoint cannot be read, lacks weights, or has no tokenizer; `reason` says what it is."""

    def __init__(self, name_or_path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"name_or_path={os.fspath(name_or_path)!r} cannot be loaded: {reason}")
        self.reason = reason
        self._named = os.fspath(name_or_path), reason

    def __reduce__(self) -> Any:
        return type(self), self._named


class NotPatchedError(PackscoreError, RuntimeError):
    """The model must be patched first."""


class MaskTooLargeError(PackscoreError, MemoryError):
    """A dense mask would not fit into the memory that is free."""


class OutOfMemoryError(PackscoreError, MemoryError):
    """The device's memory does not suffice for the smallest launch; the cause names the bytes."""


class UnexpectedCompileError(PackscoreError, RuntimeError):
    """A request would compile a program, and `strict` forbids it."""


class MissingPackageError(PackscoreError, ImportError):
    """An optional package is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs more packages; {install_command(extra)}")
        self._named = feature, extra

    def __reduce__(self) -> Any:
        return type(self), self._named


class UnsupportedVersionError(PackscoreError, ImportError):
    """An installed package has not what packscore reads of it, or cannot be imported here.

    `package` is the package, and `missing` the name that it has not; None where it was no name.
    """

    def __init__(self, message: str, package: str, missing: str | None = None) -> None:
        super().__init__(message)
        self.package, self.missing = package, missing

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.package, self.missing)


class StalePrefixError(PackscoreError, RuntimeError):
    """A prefix was released, or the model's weights changed since it was computed."""


class QueueFullError(PackscoreError, RuntimeError):
    """Too many requests wait, or too many tokens; `retry_after` is when to try again, in seconds.

    By then half of what waits should have run, at the speed of what ran so far.
    """

    def __init__(self, requests: int, tokens: int, retry_after: float) -> None:
        super().__init__(
            f"{requests:,} requests with {tokens:,} tokens wait, and the queue is full; try again "
            f"in {retry_after:.1f} s, or start it with other limits: "
            "scorer.start_batcher(max_requests=..., max_tokens=...)"
        )
        self.retry_after = retry_after
        self._named = requests, tokens, retry_after

    def __reduce__(self) -> Any:
        return type(self), self._named


class RequestTooLargeError(InputError):
    """A request has more tokens than one request may have."""


class BatcherClosedError(PackscoreError, RuntimeError):
    """The batcher was closed, and takes no more requests."""


class LaunchError(PackscoreError, RuntimeError):
    """The launch that a request was in failed; the failure itself is the `__cause__`.

    The request may be tried again: others, in other launches, were not touched.
    """


class ScoringError(PackscoreError, RuntimeError):
    """A forward failed; `scores` keeps what was computed before and after it.

    `scores` is what would have been returned: one score per pair and NaN where none could be
    computed, or one entry per request and None there. The failure itself is the exception's
    `__cause__`.
    """

    def __init__(self, message: str, scores: Any) -> None:
        super().__init__(message)
        self.scores = scores

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.scores)


class NonFiniteScoreError(ScoringError):
    """A label's logit, or what normalises it, is NaN or infinite; `scores` keeps all others.

    `indices` says where: of items, documents or pairs, or (request, item) for many requests.
    `scores` is what `on_non_finite="report"` would have returned: NaN there. A ranking holds the
    other documents alone, and a stream's are the scores that it had not yet yielded.
    """

    def __init__(self, message: str, scores: Any, indices: Sequence[Any]) -> None:
        super().__init__(message, scores)
        self.indices = tuple(indices)

    @classmethod
    def at(
        cls, indices: Sequence[Any], scores: Any, name: Callable[[Any], str]
    ) -> NonFiniteScoreError:
        """The error of scores that are not finite at `indices`, by their names."""
        names = ", ".join(name(i) for i in indices[:NAMED_INDICES])
        more = ", ..." if len(indices) > NAMED_INDICES else ""
        return cls(
            f"{len(indices)} scores are not finite, for the model's logits are NaN or infinite at "
            f"{names}{more}; the others are in this error's .scores; look for an overflow "
            "(float16?) or weights that are not finite, or pass on_non_finite='report'",
            scores,
            indices,
        )

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.scores, self.indices)
