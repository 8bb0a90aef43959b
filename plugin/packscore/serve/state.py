"""What the requests of one app share: its models, limits, counters, and whether it is ready."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from packscore.calls import program_of
from packscore.scoring import MultiItemScorer
from packscore.serve.limits import Limits
from packscore.serve.metrics import Metrics
from packscore.serve.models import Models
from packscore.serve.refusals import RETRY, RefusedError

logger = logging.getLogger("packscore.serve")


class State:
    """Of one app.

    Args:
      models: by name.
      limits: of a request.
      keys: one of which a request has to carry; none: no key is asked for.
    """

    def __init__(self, models: Models, limits: Limits, keys: tuple[str, ...]) -> None:
        self.models = models
        self.limits = limits
        self.keys = keys
        self.metrics = Metrics(models)
        self.warm = False
        self.draining = False
        self.held_bytes = 0
        self._warming: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to warm up, unless it did; an app that is mounted in another's is not told."""
        if not self.warm and (self._warming is None or self._warming.done()):
            self._warming = asyncio.create_task(self._warm_up())

    async def _warm_up(self) -> None:
        for name, scorer in self.models.scorers.items():
            try:
                await asyncio.to_thread(warm_up, scorer)
            except Exception:  # requests will meet it, and say what it is
                logger.exception("model %s: warming up failed", name)
        self.warm = True

    def hold_bytes(self) -> Held:
        """Bytes of a body, counted while its request is answered."""
        return Held(self)

    def take(self, size: int) -> None:
        """Count bytes that are kept.

        Raises:
          RefusedError: there are too many already.
        """
        if self.held_bytes + size > self.limits.max_waiting_bytes:
            raise RefusedError("the bodies that wait fill the memory for them", 429, headers=RETRY)
        self.held_bytes += size

    def give_back(self, size: int) -> None:
        """The bytes are let go."""
        self.held_bytes -= size


@dataclass
class Held:
    """The bytes of one body."""

    state: State
    size: int = 0

    def take(self, size: int) -> None:
        """Keep more of them; raises as `State.take` does."""
        self.state.take(size)
        self.size += size

    def release(self) -> None:
        """Let all of them go."""
        self.state.give_back(self.size)


def warm_up(scorer: MultiItemScorer) -> None:
    """Compile a scorer's programs; in torch, score once, which makes its engine and its pages."""
    program = program_of(scorer.model)
    if program is not None:
        program.warmup(
            num_labels=len(scorer.label_token_ids or (0, 0)),
            prefix_cache_bytes=scorer.prefix_cache_bytes,
            mask_impl=scorer.mask_impl,
        )
    if scorer.label_token_ids is not None:
        scorer.score(*(("a", ["a"]) if scorer.tokenizer is not None else ([0], [[0]])))
