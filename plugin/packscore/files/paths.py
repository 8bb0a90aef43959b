"""Fields by name or path: `query.text` is the field `text` of the object `query`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING: Final = _Missing()


def find(value: object, path: str) -> Any:
    """What stands at a path, or MISSING; through a list, a list of what each entry has there.

    A name with dots in it goes before a path.
    """
    if isinstance(value, list):
        found = [find(entry, path) for entry in value]
        return found if any(entry is not MISSING for entry in found) or not value else MISSING
    if not isinstance(value, dict):
        return MISSING
    if path in value:
        return value[path]
    for name, rest in _splits(path):
        if name in value and (below := find(value[name], rest)) is not MISSING:
            return below
    return MISSING


def holder(value: dict[str, Any], path: str) -> str:
    """The field of a record that a path goes through; the path must lead somewhere."""
    if path in value:
        return path
    return next(
        name
        for name, rest in _splits(path)
        if name in value and find(value[name], rest) is not MISSING
    )


def without(value: dict[str, Any], path: str) -> dict[str, Any]:
    """A record without what stands at a path; a list that it goes through is left out whole."""
    name = holder(value, path)
    left = {other: value[other] for other in value if other != name}
    if name == path or not isinstance(value[name], dict):
        return left
    inside = without(value[name], path[len(name) + 1 :])
    return {other: inside if other == name else value[other] for other in value} if inside else left


def prefixes(path: str) -> list[str]:
    """Names of fields that a path may go through."""
    return [path, *(name for name, _ in _splits(path))]


def _splits(path: str) -> Iterator[tuple[str, str]]:
    at = path.find(".")
    while at >= 0:
        yield path[:at], path[at + 1 :]
        at = path.find(".", at + 1)
