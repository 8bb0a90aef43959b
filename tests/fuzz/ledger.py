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

    def tables(self) -> str:
        """Scores compared by change and by flow, a column for each engine and dtype; Markdown."""
        return f"{self._table('change', 2)}\n\n{self._table('flow', 0)}"

    def _table(self, name: str, at: int) -> str:
        cells: Counter[tuple[str, str]] = Counter()
        for key, count in self.compared.items():
            cells[key[at], f"{key[1]} {key[3]}"] += count
        rows = sorted({row for row, _ in cells})
        columns = sorted({column for _, column in cells})
        lines = [f"| {name} | {' | '.join(columns)} |", "|---" + "|---:" * len(columns) + "|"]
        for row in rows:
            counts = [f"{cells[row, column]:,}" if cells[row, column] else "" for column in columns]
            lines.append(f"| {row} | {' | '.join(counts)} |")
        return "\n".join(lines)

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
