"""Engines that compute nothing: they note what they are given, and are done when a test says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from packscore import EncodedRequest
from packscore.flows.costs import CostModel
from packscore.flows.engine import Limits, Readout, RowValues
from packscore.flows.packing import PackedBatch
from packscore.flows.page_pool import PagePool, common_len

READOUT = Readout((0, 1))


def value_of(prefix: Any, item: Any, row: int) -> float:
    """What a stand-in reads at a token of an item, -1 its prefix's last: exact in float32."""
    ids = np.concatenate([prefix, item])[: len(prefix) + row + 1]
    return float((ids * (1 + np.arange(len(ids)) % 7)).sum() % 65_521)


def values_of(request: EncodedRequest) -> torch.Tensor:
    """float32[num_rows, 2]: what every item of a request gives, wherever it runs."""
    rows = request.rows or [np.array([len(item) - 1]) for item in request.items]
    found = [
        value_of(request.prefix, item, int(row))
        for item, own in zip(request.items, rows, strict=True)
        for row in own
    ]
    return torch.tensor(found)[:, None] * torch.tensor([1.0, 2.0])


class StandIn:
    """The contract of an engine, with pages that remember what was written."""

    mask_impl: Any = "segment"
    keeps_pages = True
    whole_last: str | None = None
    only_flow: Any = None

    def __init__(self, num_pages: int = 512, most: int = 2**14, target: int = 512) -> None:
        self.pool: PagePool | None = PagePool(num_pages) if num_pages else None
        self.limits = Limits(most, target, 64)
        self.costs = CostModel("told", 1.0, (1, 1000), (0.01, 10.0), 0.0)
        self.launched: list[PackedBatch] = []
        self.is_finishing = False  # launches are done at once
        self.asked = 0  # how often somebody asked whether they are
        self.refreshed = 0
        self.failing: dict[int, Exception] = {}  # launches, by their number from 1 on
        self.unread: dict[int, Exception] = {}  # the same of reading them
        self.room = 2**20  # tokens of a launch beyond which memory is short
        self._written: list[Any] = []

    def refresh(self, *, force: bool = False) -> None:
        self.refreshed += 1

    def is_out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    def reads_rows(self, batch: PackedBatch) -> bool:
        return True

    def launch(self, batch: PackedBatch, readout: Readout) -> int:
        self.launched.append(batch)
        number = len(self.launched)
        if number in self.failing:
            raise self.failing[number]
        if len(batch.token_ids) > self.room:
            raise MemoryError("no room")
        for share in batch.shares:
            cached = share.cached_len
            if cached:  # only what this engine itself has computed may be read
                assert share.lease is not None
                assert share.lease.pool is self.pool
                assert any(common_len(one, share.prefix) >= cached for one in self._written)
            if share.lease is not None:
                self._written.append(share.prefix)
        return number

    def is_done(self, launched: int) -> bool:
        self.asked += 1
        return self.is_finishing

    def read(self, launched: Sequence[int]) -> RowValues:
        rows: list[torch.Tensor] = []
        for number in launched:
            if number in self.unread:
                raise self.unread[number]
            for share in self.launched[number - 1].shares:
                own = None if share.rows is None else list(share.rows)
                rows.append(values_of(EncodedRequest(share.prefix, list(share.items), rows=own)))
        return RowValues(torch.cat(rows) if rows else torch.zeros(0, 2))

    @property
    def requests(self) -> set[int]:
        """Which of a run it was given."""
        return {share.request for batch in self.launched for share in batch.shares}

    def computed(self) -> Counter[bytes]:
        """Tokens that it computed of each prefix."""
        found: Counter[bytes] = Counter()
        for batch in self.launched:
            for share, group in zip(batch.shares, batch.layout.groups, strict=True):
                found[share.prefix.tobytes()] += group.prefix_len
        return found
