"""What adapters score with: a scorer that is there, one of a model's name, one kept since."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

from packscore.errors import InputTypeError
from packscore.scoring import MultiItemScorer
from packscore.text.prompts import PromptSpec

# Scorers of different prompts kept at a time: each may hold keys and values of its queries.
KEPT_SCORERS = 2


def load_scorer(
    model_name_or_path: str | os.PathLike[str],
    *,
    prompt: str | PromptSpec = "qwen3-reranker",
    **options: Any,
) -> MultiItemScorer:
    """A scorer from a name or a folder, as an adapter takes it.

    Args:
      model_name_or_path: as in `MultiItemScorer.from_pretrained`.
      prompt: as there.
      **options: of it; what it does not know goes to the model's `from_pretrained`.
    """
    known = inspect.signature(MultiItemScorer.from_pretrained).parameters
    own = {name: value for name, value in options.items() if name in known}
    more = {name: value for name, value in options.items() if name not in known}
    own["model_kwargs"] = {**(own.get("model_kwargs") or {}), **more}
    return MultiItemScorer.from_pretrained(model_name_or_path, prompt=prompt, **own)


def kept_scorer(
    scorers: dict[str, MultiItemScorer], key: str, make: Callable[[], MultiItemScorer]
) -> MultiItemScorer:
    """The scorer of a key; a new one takes the place of the oldest."""
    if key not in scorers:
        while len(scorers) >= KEPT_SCORERS:
            del scorers[next(iter(scorers))]
        scorers[key] = make()
    return scorers[key]


class Ranking:
    """What a framework's reranker does with a query and its documents, also from threads."""

    def __init__(self, scorer: Any) -> None:
        if not callable(getattr(scorer, "rank", None)):
            raise InputTypeError(
                f"scorer is a {type(scorer).__name__}; it must be a packscore.MultiItemScorer or "
                "a packscore.CrossEncoder"
            )
        self.scorer = scorer

    def __call__(
        self, query: str, documents: Sequence[str], top_n: int | None
    ) -> list[tuple[int, float]]:
        """(index, score) of the best `top_n` documents, best first; none for no documents."""
        if not documents:
            return []
        ranked = self.scorer.rank(query, list(documents), top_k=top_n)
        return [(entry["corpus_id"], float(entry["score"])) for entry in ranked]
