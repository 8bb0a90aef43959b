"""Which pages hold whose prefix: allocate, share, pin, evict. Integers only, no arrays of keys.

Prefixes form a tree of pages, found by the tokens in them. A prefix that continues another one
shares its full pages; the page where they part is copied once, up to the token where they part.
Pages that nobody pins stay until their room is needed, and the least recently used go first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import finalize

import numpy as np
import numpy.typing as npt

from packscore.encoded import TokenIds
from packscore.errors import StalePrefixError
from packscore_kernels.hardware import cdiv

Pages = npt.NDArray[np.int32]

PAGE_SIZE = 128
# What prefixes may take on a device by default: 9 000 tokens of a Qwen3-0.6B in bfloat16.
PREFIX_CACHE_BYTES = 2**30
# A shorter common start is cheaper to compute again than to copy and to attend to on its own.
MIN_SHARED_TOKENS = 16


@dataclass(eq=False)
class _Node:
    """One page of prefix tokens; the root has none."""

    page: int
    tokens: TokenIds  # i64[at most page_size]
    parent: _Node | None
    children: dict[int, _Siblings] = field(default_factory=dict)  # by their first token
    pins: int = 0
    is_orphan: bool = False  # its tree was dropped while it was pinned


class _Siblings:
    """Pages that follow one page and begin with one token: many queries' with one frame."""

    def __init__(self) -> None:
        self._nodes: list[_Node] = []
        self._rows = np.zeros((1, 0), np.int64)  # [capacity, page_size], -1 behind a page's tokens

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[_Node]:
        return iter(self._nodes)

    def append(self, node: _Node, page_size: int) -> None:
        """Add a page."""
        count = len(self._nodes)
        if count == len(self._rows) or not self._rows.size:
            grown = np.full((2 * max(count, 1), page_size), -1, np.int64)
            grown[:count] = self._rows[:count] if count else -1
            self._rows = grown
        self._nodes.append(node)
        self._rows[count] = -1
        self._rows[count, : len(node.tokens)] = node.tokens

    def remove(self, node: _Node) -> None:
        """Take a page out; the last takes its place."""
        at = self._nodes.index(node)
        last = self._nodes.pop()
        if last is not node:
            self._nodes[at] = last
            self._rows[at] = self._rows[len(self._nodes)]

    def best(self, tokens: TokenIds) -> tuple[_Node, int]:
        """The page that shares most tokens from the start, and how many; the oldest of several."""
        differs = self._rows[: len(self._nodes), : len(tokens)] != tokens
        shared = np.where(differs.any(1), differs.argmax(1), len(tokens))
        at = int(shared.argmax())
        return self._nodes[at], int(shared[at])


def common_len(a: TokenIds, b: TokenIds) -> int:
    """How many tokens two sequences share at their start."""
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size


@dataclass(eq=False)
class _Hold:
    """What a lease has of the pool, which the pool remembers should the lease be forgotten."""

    pages: Pages
    path: list[_Node]  # pinned, from the root's child on
    source: _Node | None  # of the copied page, pinned until the commit
    generation: int


@dataclass(eq=False)
class PrefixLease:
    """The pages of one prefix, pinned until `release`, or until nobody has the lease any more.

    The first `cached_len` tokens are in them already; whoever holds the lease computes the rest,
    writes it and calls `commit`, so that others find it.
    """

    pool: PagePool
    tokens: TokenIds  # i64[prefix_len]
    pages: Pages  # i32[cdiv(prefix_len, page_size)]
    cached_len: int
    copied_page: int | None  # page to copy into pages[cached_len // page_size] before writing
    _hold: _Hold
    is_released: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the prefix needs computing."""
        return self.cached_len == len(self.tokens)

    @property
    def is_stale(self) -> bool:
        """Whether its pages may hold another prefix, another model's, or nothing."""
        return self.is_released or self._hold.generation != self.pool.generation

    def check(self) -> None:
        """Refuse a lease whose pages cannot be trusted.

        Raises:
          StalePrefixError: it was released, or the pool was cleared since.
        """
        if self.is_stale:
            cleared = "was computed with other weights, or its pages were cleared"
            why = "was released" if self.is_released else cleared
            raise StalePrefixError(f"the prefix {why}; open a new one with scorer.prefix(query)")

    def commit(self, end: int | None = None) -> None:
        """Let others find what was written; does nothing where nothing was missing.

        Args:
          end: how many tokens are written, a multiple of the page size; None is all.
        """
        self.pool._commit(self, len(self.tokens) if end is None else end)

    def release(self) -> None:
        """Unpin the pages; those never committed are free again. Twice is once."""
        self.pool._release(self)


class PagePool:
    """A fixed number of pages and the tree of prefixes in them; safe to share between threads.

    Args:
      num_pages: how many there are.
      page_size: tokens a page.
    """

    def __init__(self, num_pages: int, page_size: int = PAGE_SIZE) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.generation = 0
        self._is_free = np.ones(num_pages, bool)
        self._root = self._new_root()
        # pages in the tree that nobody pins, the next to evict first: a node goes in after all
        # nodes below it, so what comes first is a leaf
        self._unpinned: OrderedDict[_Node, None] = OrderedDict()
        self._lock = threading.RLock()
        self._holds: set[_Hold] = set()
        self._forgotten: deque[_Hold] = deque()  # of leases that went without a release
        self._is_changing = False

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A change of the pool: whole, or where it is interrupted, mended before the next one."""
        with self._lock:
            if self._is_changing:
                self._start_anew()
            self._is_changing = True
            while self._forgotten:
                self._let_go(self._forgotten[0])
                self._forgotten.popleft()
            yield
            self._is_changing = False

    def _start_anew(self) -> None:
        """Behind a change that an interrupt has cut off: what leases hold is theirs, no more."""
        self.generation += 1
        self._root = self._new_root()
        self._unpinned.clear()
        for hold in self._holds:
            hold.path, hold.source = [], None
        held = {int(page) for hold in self._holds for page in hold.pages}
        self._is_free[:] = True
        self._is_free[[*held]] = False

    @staticmethod
    def _new_root() -> _Node:
        return _Node(-1, np.zeros(0, np.int64), None)

    @property
    def num_free_pages(self) -> int:
        """Pages that hold nothing."""
        with self._changing():
            return self._num_free

    @property
    def num_pinned_pages(self) -> int:
        """Pages that a lease holds, so that they cannot be evicted."""
        with self._changing():
            return self.num_pages - self._num_free - len(self._unpinned)

    def cached_len(self, tokens: TokenIds) -> int:
        """How many tokens of a prefix `acquire` would find; pins nothing."""
        with self._changing():
            _, _, shared = self._found(tokens)
            return shared

    def has_room(self, tokens: TokenIds) -> bool:
        """Whether `acquire` would give a lease now; evicts nothing."""
        with self._changing():
            return self._have_room(tokens, *self._found(tokens))

    def acquire(self, tokens: TokenIds) -> PrefixLease | None:
        """Pin what the tree holds of a prefix, and pages for the rest of it.

        Args:
          tokens: i64[prefix_len] with at least one token.

        Returns:
          The lease, or None where the pages that are not pinned do not suffice.
        """
        with self._changing():
            path, partial, cached = self._found(tokens)
            is_whole = cached == len(tokens)
            pinned = [*path, partial] if partial else path
            for node in pinned:
                self._pin(node)
            new = self._allocate(self._missing(tokens, path, partial, cached))
            if new is None:
                self._unpin(pinned)
                return None
            known = [node.page for node in (pinned if is_whole else path)]
            pages = np.array(known + new, np.int32)
            source = None if is_whole else partial
            hold = _Hold(pages, pinned if is_whole else path, source, self.generation)
            copied_page = None if source is None else source.page
            lease = PrefixLease(self, tokens, pages, cached, copied_page, hold)
            # it may be collected while the pool is in the middle of something: only noted there
            finalize(lease, self._forgotten.append, hold).atexit = False
            self._holds.add(hold)
            return lease

    def clear(self) -> None:
        """Forget every prefix; pages that leases hold are free when they are released."""
        with self._changing():
            self.generation += 1
            nodes = [self._root]
            while nodes:
                node = nodes.pop()
                nodes += [child for same in node.children.values() for child in same]
                node.is_orphan = True
            self._is_free[[node.page for node in self._unpinned]] = True
            self._unpinned.clear()
            self._root = self._new_root()

    def _found(self, tokens: TokenIds) -> tuple[list[_Node], _Node | None, int]:
        """What `_find` gives; without the page in common up to a token if only that leaves room.

        It stays where it is while it is copied, and so takes a page more.
        """
        path, partial, cached = self._find(tokens)
        is_copied = partial is not None and cached < len(tokens)
        if is_copied and not self._have_room(tokens, path, partial, cached):
            return path, None, len(path) * self.page_size
        return path, partial, cached

    def _have_room(
        self, tokens: TokenIds, path: list[_Node], partial: _Node | None, cached: int
    ) -> bool:
        """Whether pages that nobody pins suffice for a prefix beside what was found of it."""
        found = [*path, partial] if partial else path
        evictable = len(self._unpinned) - sum(node in self._unpinned for node in found)
        return self._missing(tokens, path, partial, cached) <= self._num_free + evictable

    def _find(self, tokens: TokenIds) -> tuple[list[_Node], _Node | None, int]:
        """Full pages in common, a page in common up to some token, and how many tokens that is."""
        path: list[_Node] = []
        node, at = self._root, 0
        while at < len(tokens):
            rest = tokens[at : at + self.page_size]
            siblings = node.children.get(int(rest[0]))
            if siblings is None:
                break
            best, shared = siblings.best(rest)
            if shared < self.page_size:
                ends_here = at + shared == len(tokens)
                if ends_here or shared >= MIN_SHARED_TOKENS:
                    return path, best, at + shared
                break
            path.append(best)
            node, at = best, at + shared
        return path, None, at

    def _missing(
        self, tokens: TokenIds, path: list[_Node], partial: _Node | None, cached: int
    ) -> int:
        """Pages that a prefix needs beside those found; one in common up to a token is copied."""
        is_read = partial is not None and cached == len(tokens)
        return cdiv(len(tokens), self.page_size) - len(path) - int(is_read)

    def _allocate(self, count: int) -> list[int] | None:
        """Free pages, evicted where there are too few; neighbours where there are some."""
        if count > self._num_free + len(self._unpinned):
            return None
        for _ in range(count - self._num_free):
            self._evict()
        pages = _neighbours(np.flatnonzero(self._is_free), count)
        self._is_free[pages] = False
        return pages

    @property
    def _num_free(self) -> int:
        return int(np.count_nonzero(self._is_free))

    def _evict(self) -> None:
        node, _ = self._unpinned.popitem(last=False)
        self._unlink(node)
        self._is_free[node.page] = True

    @staticmethod
    def _unlink(node: _Node) -> None:
        assert node.parent is not None  # the root is never unpinned
        siblings = node.parent.children[int(node.tokens[0])]
        siblings.remove(node)
        if not siblings:
            del node.parent.children[int(node.tokens[0])]

    def _pin(self, node: _Node) -> None:
        node.pins += 1
        self._unpinned.pop(node, None)

    def _unpin(self, path: list[_Node]) -> None:
        for node in reversed(path):
            node.pins -= 1
            if not node.pins and node.is_orphan:
                self._is_free[node.page] = True
            elif not node.pins:
                self._unpinned[node] = None

    def _commit(self, lease: PrefixLease, end: int) -> None:
        with self._changing():
            if lease.is_released or end <= lease.cached_len:
                return
            hold = lease._hold
            stale = hold.generation != self.generation
            parent = hold.path[-1] if hold.path else self._root
            for i in range(len(hold.path), cdiv(end, self.page_size)):
                tokens = lease.tokens[i * self.page_size : (i + 1) * self.page_size]
                node = _Node(int(lease.pages[i]), tokens, parent, pins=1, is_orphan=stale)
                if not stale:
                    siblings = parent.children.setdefault(int(tokens[0]), _Siblings())
                    siblings.append(node, self.page_size)
                hold.path.append(node)
                parent = node
            lease.cached_len = end
            lease.copied_page = None
            self._drop_source(hold)

    def _release(self, lease: PrefixLease) -> None:
        with self._changing():
            lease.is_released = True
            lease.copied_page = None
            self._let_go(lease._hold)

    def _let_go(self, hold: _Hold) -> None:
        """Twice is once."""
        if hold not in self._holds:
            return
        self._holds.remove(hold)
        others: set[int] = set()
        if hold.generation != self.generation:  # behind an interrupt two may have the same
            others = {int(page) for other in self._holds for page in other.pages}
        self._is_free[[int(x) for x in hold.pages[len(hold.path) :] if int(x) not in others]] = True
        self._drop_source(hold)
        self._unpin(hold.path)

    def _drop_source(self, hold: _Hold) -> None:
        if hold.source is not None:
            self._unpin([hold.source])
            hold.source = None


def _neighbours(free: npt.NDArray[np.int64], count: int) -> list[int]:
    """`count` pages of ascending ones: the first neighbours that are enough, else the lowest."""
    if not count:
        return []
    is_run = free[count - 1 :] - free[: len(free) - count + 1] == count - 1
    return [int(page) for page in free[is_run.argmax() :][:count]]  # where none is, from 0
