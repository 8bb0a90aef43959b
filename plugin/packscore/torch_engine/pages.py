"""Keys and values of prefixes in pages, on the device that the model runs on, in torch."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from packscore.flows.page_pool import Pages, PrefixLease

KeysValues = tuple[torch.Tensor, torch.Tensor]
# Slots that follow each other: (first slot of the pool, number of slots).
Run = tuple[int, int]


def slot_runs(pages: Pages, start: int, end: int, page_size: int) -> tuple[Run, ...]:
    """Where tokens `start` to `end` of a prefix lie, as few runs of neighbouring slots as can be.

    Args:
      pages: i32[num_pages], the prefix's page table.
      start: first token.
      end: token behind the last one.
      page_size: tokens a page.
    """
    runs: list[Run] = []
    while start < end:
        within = start % page_size
        slot = int(pages[start // page_size]) * page_size + within
        length = min(page_size - within, end - start)
        if runs and sum(runs[-1]) == slot:
            slot, length_before = runs.pop()
            runs.append((slot, length_before + length))
        else:
            runs.append((slot, length))
        start += length
    return tuple(runs)


@dataclass(frozen=True)
class PageWrite:
    """The packed tokens of one prefix that go into its pages."""

    first_row: int  # storage index of the first token written
    runs: tuple[Run, ...]
    copied: tuple[int, int, int] | None  # (from slot, to slot, how many), copied before they are

    @classmethod
    def of(cls, lease: PrefixLease, end: int, first_row: int) -> PageWrite:
        """What a lease still misses of its first `end` tokens; they start at a storage index."""
        size, cached = lease.pool.page_size, lease.cached_len
        copied = None
        if lease.copied_page is not None:
            start = cached - cached % size
            copied = (
                lease.copied_page * size,
                int(lease.pages[start // size]) * size,
                cached - start,
            )
        runs = slot_runs(lease.pages, cached, end, size)
        return cls(first_row, runs, copied)


class LaunchPages:
    """The pages as one launch meets them, a layer after the other.

    A layer's pages are those of its turn, not of the number it bears: a layer that stands in two
    places, or was put in another's, bears one that is not its own.
    """

    def __init__(self, pages: KvPages) -> None:
        self.pages = pages
        self._turns = itertools.count()

    def next_layer(self) -> int:
        """The index of the layer whose attention runs now."""
        return next(self._turns)


class KvPages:
    """Pages of all layers, allocated when a layer first writes to them.

    Args:
      num_pages: how many pages a layer has.
      page_size: tokens a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        # by layer: [2 (k, v), num_kv_heads, num_pages * page_size, head_dim]
        self._layers: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def write(
        self,
        layer_idx: int,
        k: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
        v: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
        writes: Sequence[PageWrite],
    ) -> None:
        """Put packed keys and values into their slots."""
        if not writes:
            return
        slots = self._slots(layer_idx, k)
        for write in writes:
            if write.copied is not None:
                source, target, length = write.copied
                slots[:, :, target : target + length] = slots[:, :, source : source + length]
            row = write.first_row
            for slot, length in write.runs:
                slots[0, :, slot : slot + length] = k[0, :, row : row + length]
                slots[1, :, slot : slot + length] = v[0, :, row : row + length]
                row += length

    def read(self, layer_idx: int, runs: Sequence[Run]) -> KeysValues:
        """Keys and values of a prefix: a view where its slots are neighbours, else a copy.

        Returns:
          ([1, num_kv_heads, prefix_len, head_dim], the same).
        """
        slots = self._layers[layer_idx]
        parts = [slots[:, :, slot : slot + length] for slot, length in runs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return whole[:1], whole[1:]

    def _slots(self, layer_idx: int, k: torch.Tensor) -> torch.Tensor:
        with self._lock:
            if layer_idx not in self._layers:
                shape = (2, k.shape[1], self.num_pages * self.page_size, k.shape[3])
                # pages nobody has written are not read; a CPU gives them memory when they are
                self._layers[layer_idx] = k.new_empty(shape)
            return self._layers[layer_idx]
