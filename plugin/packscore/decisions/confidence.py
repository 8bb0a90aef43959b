"""How sure an answer is, from 0 to 1, by TypeSafe's formulas."""

from __future__ import annotations

from collections.abc import Sequence


def mode(probabilities: Sequence[float]) -> int:
    """The most probable option; the first of several."""
    return max(range(len(probabilities)), key=lambda i: probabilities[i])


def choice_confidence(probabilities: Sequence[float]) -> float:
    """(n * max p - 1) / (n - 1): 0 where all n options are alike, 1 where one has it all."""
    n = len(probabilities)
    return 1.0 if n == 1 else max(0.0, (n * max(probabilities) - 1) / (n - 1))


def score_confidence(probabilities: Sequence[float]) -> float:
    """1 - E|i - mode| / mean_i|i - (n - 1) / 2|, at least 0: how near the levels lie to the mode.

    The denominator is how far n equal levels lie from their middle.
    """
    n = len(probabilities)
    if n == 1:
        return 1.0
    top = mode(probabilities)
    distance = sum(p * abs(i - top) for i, p in enumerate(probabilities))
    spread = sum(abs(i - (n - 1) / 2) for i in range(n)) / n
    return max(0.0, 1 - distance / spread)
