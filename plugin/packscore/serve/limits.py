"""What one request may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from packscore.errors import InputError, InputTypeError
from packscore.inputs import short


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask, and all together; what is over is refused by name.

    Args:
      max_body_bytes: of a body.
      max_items: items, documents, texts or pairs.
      max_scores: of an answer: items times labels.
      max_questions: about one state.
      timeout_seconds: from the first byte of a body to the answer.
      max_waiting_bytes: of the bodies of all requests that are read or answered now.

    Raises:
      InputError, InputTypeError: a limit is no number above 0.
    """

    max_body_bytes: int = 8 * 2**20
    max_items: int = 10_000
    max_scores: int = 1_000_000
    max_questions: int = 400
    timeout_seconds: float = 300.0
    max_waiting_bytes: int = 512 * 2**20

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = int | float if field.name == "timeout_seconds" else int
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise InputTypeError(f"{field.name}={short(value)} must be a number")
            if not value > 0:
                raise InputError(f"{field.name}={value} must be above 0")
