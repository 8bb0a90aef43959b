"""Requests cut over copies that have nothing to do, and what their parts gave put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from packscore.encoded import EncodedRequest
from packscore.flows.copies import Copies, cached_len
from packscore.flows.engine import Engine, RowValues
from packscore.flows.jobs import RequestValues
from packscore.flows.packing import first_equal
from packscore.flows.planner import Planner, Workload
from packscore.results import Usage, merge_usages

Items = npt.NDArray[np.int64]

# A cut pays where it takes at most this share of the time: it computes a prefix once on each copy,
# and they might have had other work.
WORTH_IT = 0.8


@dataclass(frozen=True)
class Cuts:
    """Requests as a run takes them.

    Args:
      requests: whole, or the parts of those that are cut, in their order.
      homes: the copy of each part, by its number.
      whole: what was given.
      parts: of each request given the items of its parts; none where it runs whole.
    """

    requests: Sequence[EncodedRequest]
    homes: dict[int, Engine] = field(default_factory=dict)
    whole: Sequence[EncodedRequest] = ()
    parts: Sequence[Sequence[Items]] = ()

    @classmethod
    def of(
        cls, copies: Copies, planner: Planner, requests: Sequence[EncodedRequest], *, is_free: bool
    ) -> Cuts:
        """Cut what is predicted to be done sooner so; nothing where copies are busy, or one alone.

        Args:
          copies: what computes launches.
          planner: with their costs and limits.
          requests: of one run.
          is_free: whether nobody names a flow, or holds the prefix on one of them.
        """
        if copies.is_alone or not is_free:
            return cls(requests)
        idle = [engine for engine, ms in copies.loads().items() if not ms]
        most = len(idle) // max(len(requests), 1)
        if most < 2:
            return cls(requests)
        found: list[EncodedRequest] = []
        homes: dict[int, Engine] = {}
        parts: list[list[Items]] = []
        for request in requests:
            near = sorted(idle, key=lambda engine: -cached_len(engine, request.prefix))[:most]
            parts.append(_parts(planner, request, near))
            for engine, items in zip(near, parts[-1], strict=False):
                homes[len(found)] = engine
                found.append(request.part(items.tolist()))
                idle.remove(engine)
            if not parts[-1]:
                found.append(request)
        return cls(found, homes, requests, parts)

    def joined(self, found: Sequence[RequestValues | Exception]) -> list[RequestValues | Exception]:
        """What each of the requests given gave; the first error of its parts, where one has it."""
        if not self.homes:
            return [*found]
        rest = iter(found)
        results: list[RequestValues | Exception] = []
        for request, parts in zip(self.whole, self.parts, strict=True):
            own = [next(rest) for _ in parts] or [next(rest)]
            failed = [one for one in own if isinstance(one, Exception)]
            whole = [one for one in own if isinstance(one, RequestValues)]
            if failed or not parts:
                results.append(own[0] if not parts else failed[0])
            else:
                results.append(_joined(request, parts, whole))
        return results


def _parts(planner: Planner, request: EncodedRequest, engines: Sequence[Engine]) -> list[Items]:
    """The items of each part, of about as many tokens; none where it does not pay.

    Args:
      planner: with the engines' costs and limits.
      request: of items of which equal ones stay together.
      engines: one for each part, in their order.
    """
    same_as = first_equal(request.items, request.rows)
    distinct = np.unique(same_as)
    lens = np.array([len(request.items[i]) for i in distinct], np.int64)
    distinct, lens = distinct[by_length := np.argsort(lens, kind="stable")], lens[by_length]

    def cut(count: int) -> list[Items]:
        """Which of the distinct items are in each part."""
        ends = np.cumsum(lens + 1)
        part = (ends - lens - 1) * count // ends[-1]
        return [own for i in range(count) if len(own := np.flatnonzero(part == i))]

    def cost_ms(count: int) -> float:
        """Of the part that lacks most of the prefix, and so is done last."""
        engine, own = engines[count - 1], max(cut(count), key=lambda own: int(lens[own].sum()))
        pool, size = engine.pool, len(request.prefix)
        is_kept = pool is not None and size > 0 and pool.has_room(request.prefix)
        cached = cached_len(engine, request.prefix) if is_kept else 0
        return planner.choose(Workload(size, cached, lens[own], is_kept)).cost_ms

    counts = [len(engines)]
    while counts[-1] > 2:
        counts.append(counts[-1] // 2)
    costs = {count: cost_ms(count) for count in counts if count <= len(distinct)}
    if not costs or min(costs.values()) > WORTH_IT * cost_ms(1):
        return []
    chosen = [distinct[own] for own in cut(min(costs, key=costs.__getitem__))]
    return [np.flatnonzero(np.isin(same_as, own)) for own in chosen]


def _joined(
    request: EncodedRequest, parts: Sequence[Items], found: Sequence[RequestValues]
) -> RequestValues:
    """The rows of all parts, in the order of the request's items."""
    order = np.concatenate(parts)
    counts = np.ones(len(order), np.int64)
    if request.rows is not None:
        counts = np.array([len(request.rows[i]) for i in order.tolist()], np.int64)
    begins = np.cumsum(counts) - counts
    back = np.argsort(order, kind="stable")
    rows = np.concatenate([np.arange(begins[i], begins[i] + counts[i]) for i in back])
    values = RowValues.joined([one.values for one in found]).at(rows)
    return RequestValues(values, usage_of(request, parts, [one.usage for one in found]))


def usage_of(request: EncodedRequest, parts: Sequence[Items], usages: Sequence[Usage]) -> Usage:
    """What all parts took; prefix tokens that were in pages count once, as if none ran between."""
    merged = merge_usages(usages, [part.tolist() for part in parts])
    is_read = merged.cached_tokens > 0
    missing = len(request.prefix) - merged.computed_prefix_tokens
    first = usages[0].flow
    flow = merged.flow if first in ("extend", "plain") else "chunked"
    return replace(merged, cached_tokens=max(missing, 0) if is_read else 0, flow=flow)
