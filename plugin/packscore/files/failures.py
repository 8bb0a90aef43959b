"""Why reading or writing files stops."""

from __future__ import annotations


class UsageError(Exception):
    """An option or a file does not fit; nothing was run and nothing was written."""


class RunError(Exception):
    """The run stopped; what it wrote so far stays."""
