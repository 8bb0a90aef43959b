"""Which flow a request takes and how its items are divided into launches: by predicted cost.

All flows give the same scores. *packed*: prefix and items in one launch. *extend*: the prefix is
in pages, items only. *chunked*: the first launch leaves the prefix in pages, the others extend it.
*plain*: each item in a launch of its own, with the whole prefix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from packscore.errors import InputError
from packscore.flows.costs import CostModel
from packscore.flows.engine import Limits
from packscore.flows.page_pool import PAGE_SIZE
from packscore.results import FLOWS, Flow
from packscore.telling import counted, telling
from packscore_kernels.hardware import cdiv

Lens = npt.NDArray[np.int64]
# (first, end) of a launch's items, in packing order.
Bounds = tuple[int, int]
# Candidates for the number of launches: every one up to here, then in steps of an eighth.
EVERY_COUNT = 16
# Candidates without a gain after which none is expected.
PATIENCE = 6
# Costs within so much are the same: every launch takes the host's work too, which is not in them.
SAME_COST = 1.02


@dataclass(frozen=True)
class Workload:
    """The sizes of one request, items in the order they are packed in.

    Args:
      prefix_len: tokens of the prefix.
      cached_len: how many of them are in pages.
      item_lens: i64[num_items], ascending.
      is_kept: whether the prefix has pages, so that later launches need not compute it.
    """

    prefix_len: int
    cached_len: int
    item_lens: Lens
    is_kept: bool


@dataclass(frozen=True)
class Plan:
    """One way to compute a request.

    Args:
      flow: its name.
      bounds: (first, end) of each launch's items, in packing order.
      cost_ms: predicted.
      computed_tokens: tokens that run through the model.
      prefix_ends: before those, launches that put the prefix into pages up to here.
    """

    flow: Flow
    bounds: tuple[Bounds, ...]
    cost_ms: float = 0.0
    computed_tokens: int = 0
    prefix_ends: tuple[int, ...] = ()

    @telling
    def __repr__(self) -> str:
        launches = counted(self.num_launches, "launch", "launches")
        tokens = counted(self.computed_tokens, "token")
        return f"{self.flow!r}, {launches}, {tokens}, {self.cost_ms:,.2f} ms predicted"

    @property
    def num_launches(self) -> int:
        """How many there are."""
        return len(self.prefix_ends) + len(self.bounds)


@dataclass(frozen=True)
class Explanation:
    """What the planner chose for a request and what it left.

    Args:
      workload: the sizes.
      plans: the best of every flow, the chosen one first, the others cheapest first.
      source: where the costs come from.
      refused: flows that this request cannot take, and why.
      known_error: how far such costs were off where others measured; empty where nobody did.
      whole_last: why the last layer runs for all tokens; None: for the rows that are read.
      num_copies: copies of the model that its items are cut over now; the plans are those of one.
    """

    workload: Workload
    plans: tuple[Plan, ...]
    source: str
    refused: dict[Flow, str] = field(default_factory=dict)
    known_error: str = ""
    whole_last: str | None = None
    num_copies: int = 1

    @property
    def chosen(self) -> Plan:
        """The plan that runs: the cheapest, or one of fewer launches that costs hardly more."""
        return self.plans[0]

    @telling
    def __repr__(self) -> str:
        work, others = self.workload, ", ".join(plan.flow for plan in self.plans[1:])
        sizes = f"prefix {work.prefix_len:,} ({work.cached_len:,} in pages)"
        items = counted(len(work.item_lens), "item")
        return f"{self.chosen!r} before {others or 'none'}; {sizes}, {items}"

    def __str__(self) -> str:
        work, lens = self.workload, self.workload.item_lens
        lines = [
            f"prefix {work.prefix_len:,} tokens, {work.cached_len:,} of them in pages; "
            f"{len(lens):,} items, {int(lens.sum()):,} tokens; costs {self.source}",
            f"{'':2}{'flow':8} {'launches':>8} {'computed tokens':>16} {'predicted ms':>13}",
        ]
        for plan in self.plans:
            mark = "> " if plan is self.chosen else "  "
            lines.append(
                f"{mark}{plan.flow:8} {plan.num_launches:8,} {plan.computed_tokens:16,} "
                f"{plan.cost_ms:13,.2f}"
            )
        lines += [f"  {flow:8} {why}" for flow, why in self.refused.items()]
        last = "where it is read; keys and values alone of the other tokens"
        if self.whole_last:
            last = f"of all tokens, because of {self.whole_last}"
        lines.append(f"  last layer: {last}")
        if self.num_copies > 1:
            lines.append(f"  cut over {self.num_copies} copies: the prefix on each, items on one")
        lines += [self.known_error] * bool(self.known_error)
        return "\n".join(lines)


class Planner:
    """Chooses by cost among all flows that a request can take."""

    def __init__(self, costs: CostModel, limits: Limits) -> None:
        self.costs = costs
        self.limits = limits

    def choose(self, work: Workload, flow: Flow | None = None) -> Plan:
        """The cheapest plan, of one flow alone where it is named.

        Raises:
          InputError: the request cannot take the flow.
        """
        explanation = self.explain(work)
        if flow is None:
            return explanation.chosen
        for plan in explanation.plans:
            if plan.flow == flow:
                return plan
        raise InputError(f"{flow=}: {explanation.refused[flow]}; pass another flow or None")

    def explain(self, work: Workload) -> Explanation:
        """The best plan of every flow that the request can take, the chosen one first."""
        plans, refused = [], {}
        for flow in FLOWS:
            why = self._refusal(flow, work)
            if why:
                refused[flow] = why
                continue
            plans.append(self._best(flow, work))
        chosen = _cheapest(plans)
        plans.sort(key=lambda plan: (plan is not chosen, plan.cost_ms))
        costs = self.costs
        return Explanation(work, tuple(plans), costs.source, refused, costs.known_error)

    def prefix_ends(self, work: Workload) -> tuple[int, ...]:
        """Where to cut a prefix that does not fit into one launch beside the shortest item."""
        most, at = self.limits.max_tokens, work.cached_len
        room = max(most - int(work.item_lens.min(initial=most)), 0)
        ends: list[int] = []
        while work.is_kept and most >= PAGE_SIZE and work.prefix_len - at > room:
            at = min((at + most) // PAGE_SIZE * PAGE_SIZE, work.prefix_len)
            ends.append(at)
        return tuple(ends)

    def _refusal(self, flow: Flow, work: Workload) -> str | None:
        missing = work.prefix_len - work.cached_len
        is_whole = work.is_kept and not missing and work.prefix_len > 0
        if flow == "packed" and is_whole:
            return "the prefix is in pages already, which is extend"
        size, most = self._size(work), self.limits.max_tokens
        is_many = len(work.item_lens) > 1 or bool(self.prefix_ends(work))
        if flow == "packed" and work.is_kept and size > most and is_many:
            return f"{size:,} tokens are more than the {most:,} of one launch"
        longest = work.prefix_len + int(work.item_lens.max(initial=0))
        if flow == "plain" and work.is_kept and longest > most:
            return f"{longest:,} tokens are more than the {most:,} of one launch"
        if flow == "extend" and not work.prefix_len:
            return "there is no prefix"
        if flow == "extend" and not is_whole:
            return f"{missing:,} prefix tokens are not in pages"
        if flow == "chunked" and (not work.is_kept or not missing):
            return "no prefix tokens to put into pages, or no pages for them"
        if flow == "chunked" and not is_many:
            return "one item cannot be divided"
        return None

    @staticmethod
    def _size(work: Workload) -> int:
        return work.prefix_len - work.cached_len + int(work.item_lens.sum())

    def _best(self, flow: Flow, work: Workload) -> Plan:
        """The cheapest division into launches, or one of fewer that costs hardly more."""
        if flow == "plain":
            return self._one_by_one(work)
        ends = self.prefix_ends(work)
        if ends:
            cost, computed = self._prefix_cost(work.cached_len, ends)
            rest = self._best(flow, replace(work, cached_len=ends[-1]))
            return replace(
                rest,
                cost_ms=rest.cost_ms + cost,
                computed_tokens=rest.computed_tokens + computed,
                prefix_ends=ends,
            )
        if len(work.item_lens) == 1:
            return self._priced(flow, work, [(0, 1)])
        shares = (self._equal_shares(work, count) for count in self._counts(flow, work))
        filled = (self._filled(work, room) for room in self._rooms(flow, work))
        plans = [*self._improving(flow, work, shares), *self._improving(flow, work, filled)]
        if flow == "chunked" and work.cached_len < work.prefix_len:
            # all items in one launch would be packed
            most = len(work.item_lens)
            divided = [plan for plan in plans if len(plan.bounds) > 1]
            plans = divided or [self._priced(flow, work, [(0, 1), (1, most)][:most])]
        return _cheapest(plans)

    def _prefix_cost(self, cached: int, ends: Sequence[int]) -> tuple[float, int]:
        """Milliseconds and tokens of launches that compute nothing but a prefix."""
        starts = [cached, *ends[:-1]]
        sizes = [end - start for start, end in zip(starts, ends, strict=True)]
        cost = sum(
            self.costs.launch(size, size * start, size**2 / 2)
            for start, size in zip(starts, sizes, strict=True)
        )
        return cost, sum(sizes)

    def _improving(
        self, flow: Flow, work: Workload, divisions: Iterable[list[Bounds]]
    ) -> Iterator[Plan]:
        """Priced divisions, of ever more launches, until they only get dearer."""
        costs: list[float] = []
        for bounds in divisions:
            yield (plan := self._priced(flow, work, bounds))
            costs.append(plan.cost_ms)
            if len(costs) > PATIENCE and min(costs[-PATIENCE:]) > min(costs):
                return

    def _one_by_one(self, work: Workload) -> Plan:
        lens, counts = np.unique(work.item_lens, return_counts=True)
        cost = 0.0
        for length, count in zip(lens.tolist(), counts.tolist(), strict=True):
            size = work.prefix_len + length
            cost += count * self.costs.launch(size, 0.0, size**2 / 2)
        bounds = tuple((i, i + 1) for i in range(len(work.item_lens)))
        computed = work.prefix_len * len(work.item_lens) + int(work.item_lens.sum())
        return Plan("plain", bounds, cost, computed)

    def _counts(self, flow: Flow, work: Workload) -> list[int]:
        """Numbers of launches to try: at least as many as the tokens need."""
        most = len(work.item_lens)
        if flow == "packed" and work.is_kept:
            return [1]
        total = int(work.item_lens.sum())
        own = work.prefix_len if not work.is_kept else 0
        least = cdiv(total, max(self.limits.max_tokens - own, 1)) if total else 1
        whole = work.cached_len == work.prefix_len
        found, count = [], min(max(least, 2 if flow == "chunked" and not whole else 1), most)
        while count <= most:
            found.append(count)
            count = count + 1 if count < EVERY_COUNT else cdiv(count * 9, 8)
        return [*found, most] if found[-1] != most else found

    def _rooms(self, flow: Flow, work: Workload) -> Iterator[int]:
        """Launch sizes that waste no padding, from the largest down."""
        if flow == "packed" and work.is_kept:
            return
        padded = self.costs.padded
        room, smaller = 0, min(self.limits.max_tokens, padded(max(self._size(work), 1)))
        while smaller != room:
            room = smaller
            yield room
            # a ninth less, or half where that is padded to as much
            steps = [padded(max(size, 1)) for size in (room * 8 // 9, room // 2)]
            smaller = next((size for size in steps if size < room), room)

    def _equal_shares(self, work: Workload, launches: int) -> list[Bounds]:
        """Items in launches of about equal size, each with one item or within the limit."""
        starts = np.cumsum(work.item_lens) - work.item_lens
        total = int(work.item_lens.sum())
        # the first launch has the prefix as well, and so fewer items
        first = work.prefix_len - work.cached_len if work.is_kept else 0
        share = (starts + first) * launches // max(total + first, 1)
        ends = [*(np.flatnonzero(np.diff(share)) + 1).tolist(), len(work.item_lens)]
        bounds: list[Bounds] = []
        for end in ends:
            bounds += self._filled(
                work, self.limits.max_tokens, bounds[-1][1] if bounds else 0, end
            )
        return bounds

    def _filled(
        self, work: Workload, room: int, start: int = 0, end: int | None = None
    ) -> list[Bounds]:
        """Items `start` to `end` in launches that are full, or hold one item."""
        bounds: list[Bounds] = []
        ends = np.cumsum(work.item_lens[:end])
        while start < len(ends):
            own = work.prefix_len - (work.cached_len if not start else work.prefix_len)
            if not work.is_kept:
                own = work.prefix_len
            before = int(ends[start - 1]) if start else 0
            last = int(np.searchsorted(ends, before + room - own, side="right"))
            bounds.append((start, max(last, start + 1)))
            start = bounds[-1][1]
        return bounds

    def _priced(self, flow: Flow, work: Workload, bounds: Sequence[Bounds]) -> Plan:
        cost, computed = 0.0, 0
        cached = work.cached_len
        for start, end in bounds:
            lens = work.item_lens[start:end]
            own, items = work.prefix_len - cached, int(lens.sum())
            # an empty item is scored at the prefix's last token, which then is computed again
            own += int(not own and work.prefix_len > 0 and bool((lens == 0).any()))
            pairs = own * cached + items * work.prefix_len + float((lens**2).sum()) / 2
            cost += self.costs.launch(own + items, pairs, own**2 / 2)
            computed += own + items
            cached = work.prefix_len if work.is_kept else cached
        return Plan(flow, tuple(bounds), cost, computed)


def flow_taken(flow: Flow, *, num_launches: int, was_whole: bool, is_shared: bool) -> Flow:
    """What a plan's flow is called once it ran, in `Usage`.

    Args:
      flow: the plan's.
      num_launches: how many there were.
      was_whole: the whole prefix was in pages before.
      is_shared: something is computed once for several items or contexts.
    """
    if was_whole and flow != "plain":
        return "extend"
    if not is_shared:
        return "plain"
    return "chunked" if flow == "packed" and num_launches > 1 else flow


def _cheapest(plans: Sequence[Plan]) -> Plan:
    """The plan of the fewest launches among those whose costs the model cannot tell apart."""
    most_ms = SAME_COST * min(plan.cost_ms for plan in plans)
    near = (plan for plan in plans if plan.cost_ms <= most_ms)
    return min(near, key=lambda plan: (len(plan.bounds), plan.cost_ms))
