"""The exceptions of packscore: every one names the argument, its value and what to do."""

from __future__ import annotations

from typing import Any


class PackscoreError(Exception):
    """Base of all errors raised by packscore."""


class InputError(PackscoreError, ValueError):
    """An argument has a value that cannot be scored."""


class InputTypeError(PackscoreError, TypeError):
    """An argument is of a type that cannot be scored."""


class UnsupportedModelError(PackscoreError, ValueError):
    """The model, its configuration or its head cannot be scored exactly."""


class NotPatchedError(PackscoreError, RuntimeError):
    """The model must be patched first."""


class MaskTooLargeError(PackscoreError, MemoryError):
    """A dense mask would not fit into the memory that is free."""


class UnexpectedCompileError(PackscoreError, RuntimeError):
    """A request would compile a program, and `strict` forbids it."""


class MissingPackageError(PackscoreError, ImportError):
    """An optional package is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs more packages; pip install 'packscore[{extra}]'")


class StalePrefixError(PackscoreError, RuntimeError):
    """A prefix was released, or the model's weights changed since it was computed."""


class ScoringError(PackscoreError, RuntimeError):
    """A forward failed; `scores` keeps what was computed before and after it.

    `scores` is what would have been returned: one score per pair and NaN where none could be
    computed, or one entry per request and None there. The failure itself is the exception's
    `__cause__`.
    """

    def __init__(self, message: str, scores: Any) -> None:
        super().__init__(message)
        self.scores = scores
