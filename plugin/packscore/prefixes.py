"""A query held on the device, and scores of items while they arrive."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast, overload

import numpy as np
import torch

from packscore.core import ScoringCore
from packscore.decisions.answers import Decision
from packscore.encoded import TokenIds
from packscore.errors import InputError, InputTypeError, StalePrefixError
from packscore.flows.page_pool import PrefixLease
from packscore.flows.runner import Runner
from packscore.inputs import Text, as_list, checked, short
from packscore.reading.decider import Decider, Questions
from packscore.reading.prepared import Prepared
from packscore.reading.readouts import Readout
from packscore.reading.scores import prepare_score
from packscore.reading.streams import prefix_tokens
from packscore.results import ScoreResult
from packscore.telling import counted, cut, telling
from packscore.text.labels import LabelIds

T = TypeVar("T")

logger = logging.getLogger("packscore")


@functools.cache  # once is enough
def _tell_that_nothing_is_kept() -> None:
    logger.warning(
        "a dense mask in torch keeps no pages: every score of a held query computes it anew"
    )


class Held:
    """Tokens whose keys and values stay on the device until `release`.

    Args:
      core: of the scorer.
      tokens: of a query with its prompt.

    Raises:
      InputError: they do not fit into `prefix_cache_bytes` beside what is held.
    """

    def __init__(self, core: ScoringCore, tokens: TokenIds) -> None:
        self._core, self.tokens, self._copies = core, tokens, core.copies
        self._lease = self._hold()

    @property
    def told(self) -> str:
        """Whether it is there, for people."""
        if self._lease is None:
            return "kept nowhere"
        if self._lease.is_released:
            return "released"
        return "stale" if self._lease.is_stale else "held"

    def _hold(self) -> PrefixLease | None:
        if not len(self.tokens):
            return None
        lease = Runner(self._copies).hold(self.tokens)
        if not self._copies.keeps_pages:
            _tell_that_nothing_is_kept()
        elif lease is None and self._copies.only_flow is None:
            pools = self._copies.pools
            free = max(((x.num_pages - x.num_pinned_pages) * x.page_size for x in pools), default=0)
            raise InputError(
                f"query has {len(self.tokens)} tokens with its prompt, and "
                f"prefix_cache_bytes={self._core.prefix_cache_bytes} has room for {free} that are "
                "not held; release other prefixes or pass a larger prefix_cache_bytes"
            )
        return lease

    def run(self, prepared: Prepared[T]) -> T:
        """The result of a request that begins with these tokens."""
        request, read = prepared.request, prepared.read
        # the encoder may cut query and items elsewhere for these items; then the pool finds what
        # is held by content
        same = np.array_equal(request.prefix, self.tokens)
        if not same:  # a run with the lease looks at the model itself
            self.check()
        lease = self._lease if same else None
        return prepared.finish(self._core.run_one(request, read, lease=lease))

    def check(self) -> None:
        """Refuse what is no longer there.

        Raises:
          StalePrefixError: it was released, or the model's weights changed since.
        """
        self.check_held()
        self._copies.refresh()
        self.check_held()

    def check_held(self) -> None:
        """The same by what was last seen of the model."""
        if self._core.copies is not self._copies:
            raise StalePrefixError(
                "the prefix was computed before the model was patched anew; open a new one with "
                "scorer.prefix(query)"
            )
        if self._lease is not None:
            self._lease.check()

    def release(self) -> None:
        """Let the pages go; they stay until their room is needed. Twice is once."""
        if self._lease is not None:
            self._lease.release()


class Prefix:
    """A query whose keys and values stay on the device until `release`; `scorer.prefix(query)`.

    Args:
      core: of the scorer.
      query: text or token ids, or JSON: a state for decisions alone.
      decider: what asks questions about it.

    Raises:
      InputError: it does not fit into `prefix_cache_bytes` beside what is held.
    """

    def __init__(self, core: ScoringCore, query: Any, decider: Callable[[], Decider]) -> None:
        self._core = core
        self._query = query
        self._decider = decider
        self._is_released = False
        self._state: Held | None = None
        self._held: Held | None = None
        core.check_ready()
        if _is_json(query):
            self._state = Held(core, decider().state(query))
        else:
            self._held = Held(core, prefix_tokens(core, query))

    @telling
    def __repr__(self) -> str:
        held = self._held or self._state
        assert held is not None
        return f"{cut(self._query)}, {counted(len(held.tokens), 'token')}, {held.told}"

    @overload
    def score(
        self,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        return_usage: Literal[False] = False,
    ) -> list[list[float]]: ...

    @overload
    def score(
        self,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        return_usage: Literal[True],
    ) -> ScoreResult[list[list[float]]]: ...

    @checked
    def score(
        self,
        items: Iterable[Text],
        *,
        labels: Sequence[str] | None = None,
        label_token_ids: LabelIds | None = None,
        item_labels: Sequence[Sequence[str]] | None = None,
        item_label_token_ids: Sequence[LabelIds] | None = None,
        apply_softmax: bool = False,
        readout: Readout | None = None,
        return_usage: bool = False,
    ) -> list[list[float]] | ScoreResult[list[list[float]]]:
        """`MultiItemScorer.score` for the query that is held.

        Raises:
          StalePrefixError: the query was released, or the model's weights changed since.
          InputError, InputTypeError: an argument cannot be scored.
          NonFiniteScoreError: as `MultiItemScorer.score` raises it.
        """
        self._core.check_ready()
        if self._held is None:
            raise InputTypeError(
                f"query={short(self._query)} is a state for decide, and score needs text or token "
                "ids; open another prefix for it"
            )
        self._held.check_held()
        prepared = prepare_score(
            self._core,
            self._query,
            as_list("items", items, may_be_empty=True),
            labels=labels,
            label_token_ids=label_token_ids,
            item_labels=item_labels,
            item_label_token_ids=item_label_token_ids,
            apply_softmax=apply_softmax,
            readout=readout,
            return_usage=return_usage,
        )
        return cast("list[list[float]]", self._held.run(prepared))

    @checked
    def decide(self, questions: Questions, *, permutations: int = 1) -> Decision:
        """`MultiItemScorer.decide` for the state that is held.

        A text is held as a query, in the scorer's prompt, and as a state from its first decision
        on; what holding computes is in no usage.

        Raises:
          StalePrefixError: it was released, or the model's weights changed since.
          InputError, InputTypeError: a question is malformed, or too long with the state.
          NonFiniteScoreError: as `MultiItemScorer.decide` raises it.
        """
        self._core.check_ready()
        decider = self._decider()
        tokens = self._state.tokens if self._state else decider.state(self._query)
        asked = decider.ask_about(tokens, questions, permutations)
        if self._state is None:
            if self._is_released:
                raise StalePrefixError("the prefix was released; open a new one")
            self.check()
            self._state = Held(self._core, tokens)
        self._state.check_held()
        return self._state.run(decider.prepared(asked))

    def check(self) -> None:
        """Refuse to score what is no longer there.

        Raises:
          StalePrefixError: the query was released, or the model's weights changed since.
        """
        for held in self._all:
            held.check()

    @property
    def _all(self) -> list[Held]:
        return [held for held in (self._held, self._state) if held is not None]

    def release(self) -> None:
        """Let the pages go; they stay until their room is needed. Twice is once."""
        self._is_released = True
        for held in self._all:
            held.release()

    def __enter__(self) -> Self:
        try:
            self.check()
        except BaseException:  # the block does not run, and so not its end
            self.release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _is_json(query: Any) -> bool:
    """Whether it is a state that is neither text nor token ids."""
    if isinstance(query, Mapping):
        return True
    is_list = isinstance(query, list | tuple)
    return is_list and not all(isinstance(x, int | np.integer | torch.Tensor) for x in query)
