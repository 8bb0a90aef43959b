"""One request while it is answered: its model and limits, and the scorer's calls in its words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from packscore.decisions.answers import Decision
from packscore.errors import InputError, InputTypeError, NonFiniteScoreError
from packscore.inputs import Text
from packscore.results import RankedDocument, ScoreResult, Usage
from packscore.scoring import MultiItemScorer
from packscore.serve.limits import Limits
from packscore.serve.refusals import RefusedError, too_large

DOCUMENT = re.compile(r"documents\[(\d+)\]")
AS_IT_IS = torch.nn.Identity()


@dataclass
class Call:
    """What the wire formats ask of the server.

    Args:
      id: of the request.
      model: the name its model is served by.
      scorer: of that model.
      limits: of the server.
      items: how many there were.
      numbers: how many its answer holds.
      usages: of what was scored for it.
    """

    id: str
    model: str
    scorer: MultiItemScorer
    limits: Limits
    items: int = 0
    numbers: int = 0
    usages: list[Usage] = field(default_factory=list)

    async def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        raw: bool = False,
        query_name: str = "query",
        name: Callable[[int], str] = "documents[{}]".format,
    ) -> list[RankedDocument]:
        """All documents by their score, best first.

        Args:
          query: as the body has it.
          documents: as the body has them.
          raw: log-odds instead of the prompt's own scale.
          query_name: what the body calls the query.
          name: what it calls a document.

        Raises:
          RefusedError: scores are not finite.
          Exception: as the scorer raises it, in the body's words.
        """
        self._count(documents, name(0).partition("[")[0], "entries")
        try:
            result: ScoreResult[list[RankedDocument]] = await self.scorer.async_rank(
                query, documents, activation_fn=AS_IT_IS if raw else None, return_usage=True
            )
        except (InputError, InputTypeError) as error:
            told = DOCUMENT.sub(lambda found: name(int(found[1])), str(error))
            raise type(error)(re.sub(r"^query\b", query_name, told)) from error
        self.numbers += len(documents)
        self._used(result.usage, name)
        return result.scores

    async def score(
        self, query: Text, items: Sequence[Text], label_token_ids: list[int] | None, **options: Any
    ) -> list[list[float]]:
        """Probabilities of labels, as `MultiItemScorer.score` gives them."""
        self._count(items, "items", "entries")
        numbers = len(items) * len(label_token_ids or ())
        if numbers > self.limits.max_scores:
            raise too_large("label_token_ids", numbers, self.limits.max_scores, "scores to give")
        result: ScoreResult[list[list[float]]] = await self.scorer.async_score(
            query, items, label_token_ids=label_token_ids, return_usage=True, **options
        )
        self.numbers += sum(map(len, result.scores))
        self._used(result.usage, "items[{}]".format)
        return result.scores

    async def decide(self, state: Any, questions: Any) -> Decision:
        """Answers to questions about a state, under the name that the model is served by."""
        if isinstance(questions, Mapping | list):
            self._count(questions, "questions", "questions", self.limits.max_questions)
        decision: Decision = await self.scorer.async_decide(state, questions)
        self.numbers += 256 * len(questions)
        self._used(decision.usage, "questions[{}]".format)
        return replace(decision, model=self.model)

    def _count(
        self, items: Sequence[Any] | Mapping[str, Any], name: str, what: str, most: int = 0
    ) -> None:
        most = most or self.limits.max_items
        self.items += len(items)
        if self.items > most:
            raise too_large(name, self.items, most, what)

    def _used(self, usage: Usage, name: Callable[[int], str]) -> None:
        self.usages.append(usage)
        if usage.non_finite_items:  # a scorer that reports them: JSON has no NaN
            raise NonFiniteScoreError.at(usage.non_finite_items, None, name)

    def check_whole(self, name: str) -> None:
        """Refuse an answer for which a text lost its end, where a client said that none may.

        Raises:
          RefusedError: one did.
        """
        for usage in self.usages:
            for i in usage.truncated_items:
                raise RefusedError(
                    f"{name}[{i}] is longer than the model takes, and truncate is false",
                    413,
                    f"{name}[{i}]",
                )

    @property
    def truncated(self) -> int:
        """Items that lost their end."""
        return sum(len(usage.truncated_items) for usage in self.usages)

    def usage(self) -> dict[str, Any]:
        """What it took, in the names of OpenAI, vLLM and SGLang, and what was saved.

        `prompt_tokens` counts the query once for every item, as servers do that compute it so.
        """
        tokens = sum(usage.prompt_tokens for usage in self.usages)
        return {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in self.usages)},
            "computed_tokens": sum(usage.computed_tokens for usage in self.usages),
            "saved_tokens": sum(usage.prefix_tokens_saved for usage in self.usages),
        }
