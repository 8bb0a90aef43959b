"""What objects say of themselves: one short line, whatever state they are in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

LONGEST = 40


def telling(tell: Callable[[Any], str]) -> Callable[[Any], str]:
    """A `__repr__` that gives `Class(what tell says)` in one line, and never raises.

    Of an object that is not whole, such as one whose `__init__` failed, it gives the class alone.
    """

    @functools.wraps(tell)
    def representation(self: Any) -> str:
        try:
            told = " ".join(tell(self).split())
        except Exception:
            told = "not whole"
        return f"{type(self).__name__}({told})"

    return representation


def cut(value: object) -> str:
    """The repr of a short value; of a long text its beginning and length, of others their sizes."""
    if hasattr(value, "shape"):
        return f"{getattr(value, 'dtype', type(value).__name__)}{list(value.shape)}"
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]!r}... of {len(value):,} characters"
    if isinstance(value, list | tuple) and len(value) > 4:
        return f"{len(value):,} of {cut(value[0])}, ..."
    text = repr(value)
    return text if len(text) <= 2 * LONGEST else f"{text[: 2 * LONGEST]}..."


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 item`, `2 items`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
