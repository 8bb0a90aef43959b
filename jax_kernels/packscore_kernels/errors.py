"""What callers of the kernels can do wrong, as exceptions."""

from __future__ import annotations


class LayoutError(ValueError):
    """The layout contradicts itself, its bucket or its pages."""


class ArgumentError(ValueError):
    """The op's arguments do not fit each other."""


class UnsupportedError(NotImplementedError):
    """An option that the op knows by name and does not have."""
