"""What a run of the machine has compared, and what was wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class WrongError(AssertionError):
    """A score is not the unpatched model's."""


class LostError(AssertionError):
    """A score did not come: an error that nothing explains, or too few rows."""


class HungError(BaseException):
    """A step took longer than any should."""


class BooksError(AssertionError):
    """A page is leased by nobody, or a program was compiled again."""


@dataclass
class Ledger:
    """Counts over all examples of a run."""

    examples: int = 0
    steps: int = 0
    # by (flow, engine, last change, dtype): scores compared
    compared: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    # by (call, engine)
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    # by what was expected to be refused, and was
    refused: Counter[str] = field(default_factory=Counter)
    # where the unpatched model itself fails
    undefined: Counter[str] = field(default_factory=Counter)
    prefix_lens: Counter[int] = field(default_factory=Counter)
    item_lens: Counter[int] = field(default_factory=Counter)
    item_counts: Counter[int] = field(default_factory=Counter)
    is_closed: bool = False  # while a failure shrinks

    def note(self, key: tuple[str, str, str, str], rows: Any) -> None:
        if not self.is_closed:
            self.compared[key] += int(np.size(rows))

    @property
    def scores(self) -> int:
        return self.compared.total()

    def quantiles(self) -> dict[str, list[int]]:
        """[p10, p50, p90, max] of prefix tokens, item tokens and items of a request."""
        given = {
            "prefix_tokens": self.prefix_lens,
            "item_tokens": self.item_lens,
            "items": self.item_counts,
        }
        found = {}
        for name, counts in given.items():
            values = np.sort(np.array(list(counts.elements()) or [0]))
            found[name] = [int(values[int(q * (len(values) - 1))]) for q in (0.1, 0.5, 0.9, 1)]
        return found

    def table(self) -> str:
        """Scores compared: a row for each change, a column for each engine, flow and dtype."""
        columns = sorted({(engine, flow, dtype) for flow, engine, _, dtype in self.compared})
        changes = sorted({change for _, _, change, _ in self.compared})
        head = [" | ".join(("change", *("/".join(column) for column in columns)))]
        rows = [
            " | ".join(
                (change, *(str(self.compared[f, e, change, d] or "") for e, f, d in columns))
            )
            for change in changes
        ]
        return "\n".join(head + rows)

    def as_json(self) -> dict[str, Any]:
        def flat(counts: Counter[Any]) -> dict[str, int]:
            return {
                " ".join(key) if isinstance(key, tuple) else str(key): n
                for key, n in sorted(counts.items())
            }

        return {
            "examples": self.examples,
            "steps": self.steps,
            "scores_compared": self.scores,
            "compared": flat(self.compared),
            "calls": flat(self.calls),
            "refused": flat(self.refused),
            "undefined": flat(self.undefined),
            "p10_p50_p90_max": self.quantiles(),
        }
