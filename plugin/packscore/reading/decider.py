"""One state, many typed questions: questions to items with labels of their own, and back."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from packscore.core import ScoringCore
from packscore.decisions.answers import Answer, Decision, Rotation, answer_of
from packscore.decisions.prompt import DecisionPrompt, RenderedQuestion
from packscore.decisions.questions import Question
from packscore.decisions.reading import read_decisions, read_questions
from packscore.encoded import EncodedRequest, TokenIds
from packscore.errors import (
    InputError,
    InputTypeError,
    NonFiniteScoreError,
    UnsupportedModelError,
)
from packscore.flows.reads import LabelLogits, LabelRead
from packscore.inputs import as_list, short
from packscore.model.label_head import LabelHead
from packscore.reading.prepared import Prepared, check_failed, run_all
from packscore.results import Flow
from packscore.text.labels import Labels

# By id, as Noul, Choice and Score or as dicts in the names of System One; or a list in OpenAI's.
Questions = Mapping[str, Any] | Sequence[Mapping[str, Any]]

# A label's logit and the vocabulary's largest are sums of the same products in another order.
SAME_LOGIT = 1e-4


@dataclass(frozen=True)
class Asked:
    """Questions about one state, ready to run: an item for each order of each one's options."""

    questions: dict[str | int, Question]
    items: dict[str | int, list[RenderedQuestion]]
    request: EncodedRequest
    read: LabelRead


class Decider:
    """What asks one scorer's model.

    Args:
      core: of the scorer.
      tokenizer: as it was given.

    Raises:
      InputError, UnsupportedModelError: no answer can be read behind this model's prompt.
    """

    def __init__(self, core: ScoringCore, tokenizer: Any) -> None:
        if tokenizer is None:
            raise InputError("decide needs a tokenizer; pass MultiItemScorer(model, tokenizer)")
        if not isinstance(core.head, LabelHead):
            raise UnsupportedModelError(
                f"decide: {type(core.base).__name__} scores classes, and answers are read from a "
                "language model's head; load the causal model, or call score"
            )
        self._core = core
        self._head = core.head
        self.prompt = DecisionPrompt.of(tokenizer)
        self._labels: dict[tuple[tuple[int, ...], ...], Labels] = {}

    @property
    def model_name(self) -> str:
        """The last part of the name or path that the model was loaded by; else its class."""
        name = str(getattr(self._core.base.config, "name_or_path", "") or "").rstrip("/\\")
        return os.path.basename(name) or type(self._core.base).__name__

    def state(self, state: Any) -> TokenIds:
        """i64[prefix_len]: the tokens of a state, the same whatever is asked about it."""
        return self.prompt.prefix(state)

    def ask(self, state: Any, questions: Any, permutations: int) -> Asked:
        """Questions about a state as one request.

        Raises:
          InputError, InputTypeError: they are malformed, or too long with their state.
        """
        return self.ask_about(self.state(state), questions, permutations)

    def ask_about(self, prefix: TokenIds, questions: Any, permutations: int) -> Asked:
        """The same, of a state's tokens."""
        is_list = isinstance(questions, list | tuple)
        found: dict[Any, Question] = (read_decisions if is_list else read_questions)(questions)
        return self.asked(prefix, found, permutations)

    def asked(self, prefix: TokenIds, questions: dict[Any, Question], permutations: int) -> Asked:
        """The same, of questions that were read."""
        items = {
            name: self.prompt.render(name, question, permutations)
            for name, question in questions.items()
        }
        sets: list[Labels] = []
        for name, orders in items.items():
            for one in orders:
                labels = self._known(one)
                sets.append(labels)
                needed = len(prefix) + len(one.item) + labels.num_extra_tokens
                if needed > self._core.max_tokens:
                    raise InputError(
                        f"questions[{name!r}] has {needed:,} tokens with its state, "
                        f"{needed - self._core.max_tokens:,} over "
                        f"max_tokens={self._core.max_tokens:,}; shorten the state or the question"
                    )
        request = EncodedRequest(prefix, [one.item for orders in items.values() for one in orders])
        return Asked(questions, items, request, LabelRead(tuple(sets), over_vocabulary=True))

    def _known(self, question: RenderedQuestion) -> Labels:
        """Labels that the head was looked at for, which it is once."""
        key = tuple(question.labels)
        if key not in self._labels:
            found = self._head.resolve(None, [list(ids) for ids in key])
            self._labels[key] = cast(Labels, found)
        return self._labels[key]

    def answers(self, asked: Asked, found: LabelLogits) -> dict[str | int, Answer]:
        """The answers, in the order of the questions.

        Raises:
          NonFiniteScoreError: logits are NaN or infinite; its `scores` has the other answers.
        """
        rotations = _rotations(asked, found)
        gaps = set(found.usage.non_finite_items)
        answers: dict[str | int, Answer] = {}
        failed: list[Any] = []
        first = 0
        for name, orders in asked.items.items():
            own = range(first, first + len(orders))
            first = own.stop
            if gaps.isdisjoint(own):
                each = [rotations[i] for i in own]
                answers[name] = answer_of(asked.questions[name], each)
            else:
                failed.append(name)
        if failed:  # there is no answer that says so
            raise NonFiniteScoreError.at(failed, answers, "questions[{!r}]".format)
        return answers

    def decision(self, asked: Asked, found: LabelLogits) -> Decision:
        """The answers with what they took; raises as `answers` does."""
        return Decision(self.answers(asked, found), found.usage, self.model_name)

    def prepare(self, state: Any, questions: Any, permutations: int) -> Prepared[Decision]:
        """A decision, ready to run; raises as `ask` does."""
        return self.prepared(self.ask(state, questions, permutations))

    def prepared(self, asked: Asked) -> Prepared[Decision]:
        """The decision of what was asked."""
        return Prepared(asked.request, asked.read, functools.partial(self.decision, asked))

    def decide_many(
        self,
        requests: Iterable[Any],
        *,
        permutations: int,
        flow: Flow | None,
        return_exceptions: bool,
    ) -> list[Any]:
        """`MultiItemScorer.decide_many`; see there."""
        prepared: list[Prepared[Decision] | Exception] = []
        for i, one in enumerate(as_list("requests", requests, may_be_empty=True)):
            try:
                if not isinstance(one, tuple | list) or len(one) != 2:
                    raise InputTypeError(f"{short(one)} must be (state, questions)")
                state, questions = one
                prepared.append(self.prepare(state, questions, permutations))
            except (InputError, InputTypeError) as error:
                told = type(error)(f"requests[{i}]: {error}")
                if not return_exceptions:
                    raise told from None
                prepared.append(told)
        results = run_all(self._core, prepared, flow=flow)
        if not return_exceptions:
            check_failed(results, "decisions")
        return results

    def read_pairs(self, pairs: Iterator[Any]) -> Iterator[tuple[str, Question]]:
        """(id, question) as they arrive, each checked when it does."""
        seen: set[str] = set()
        for i, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise InputTypeError(f"questions[{i}]={short(pair)} must be (id, question)")
            name, question = pair
            ((name, found),) = read_questions({name: question}).items()
            if name in seen:
                raise InputError(f"questions[{i}] has the id {name!r} of another; name it else")
            seen.add(name)
            yield name, found


def _rotations(asked: Asked, found: LabelLogits) -> list[Rotation]:
    """What every item gave."""
    # their differences are kept: in float32 a rare label's would be rounded
    log_probs = (found.logits.double() - found.normalizer.double()[:, None]).tolist()
    logits = found.logits.tolist()
    largest: Sequence[float] = [] if found.largest is None else found.largest.tolist()
    rotations = []
    orders = [one for each in asked.items.values() for one in each]
    for i, one in enumerate(orders):
        n = len(one.labels)
        own = log_probs[i][:n]
        mass = math.fsum(math.exp(x) for x in own) if all(map(math.isfinite, own)) else None
        leads = None
        if one.readout == "label" and largest:
            leads = max(logits[i][:n]) >= largest[i] - SAME_LOGIT * max(1.0, abs(largest[i]))
        rotations.append(Rotation(own, mass, leads))
    return rotations
