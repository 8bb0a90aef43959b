"""The ways to compute a request: what runs, how items are kept apart, in which flow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from packscore.results import Flow, MaskChoice
from packscore.scoring import MultiItemScorer
from packscore.selftest.subjects import Ids

Scores = list[list[float]]
Call = Callable[[MultiItemScorer, Ids, list[Ids]], Scores]

LABEL_IDS = [3, 7]
MASKS: tuple[MaskChoice, ...] = ("dense", "segment")
PACKED, EXTEND = "packed", "prefill + extend"
UNSEEN = 2**31  # the seed of a request that no timed run has


@dataclass(frozen=True)
class Way:
    """One scorer.

    Args:
      runs: "torch" or "programs".
      mask: how it keeps items apart.
      scorer: of token ids.
    """

    runs: str
    mask: MaskChoice
    scorer: MultiItemScorer


def _by_name(flow: Flow) -> Call:
    return lambda scorer, query, items: scorer.score(query, items, apply_softmax=True, flow=flow)


def _extend(scorer: MultiItemScorer, query: Ids, items: list[Ids]) -> Scores:
    with scorer.prefix(query) as held:
        return held.score(items, apply_softmax=True)


# By the names that tables have for them.
FLOWS: dict[str, Call] = {
    PACKED: _by_name("packed"),
    EXTEND: _extend,
    "chunked": _by_name("chunked"),
    "plain": _by_name("plain"),
}
