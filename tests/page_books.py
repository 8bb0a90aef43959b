"""The books of a page pool: what every page is there for."""

from __future__ import annotations

import numpy as np

from packscore.flows.page_pool import PagePool, PrefixLease


def check_books(pool: PagePool, leases: list[PrefixLease]) -> None:
    """Every page is free, in the tree, or with a lease; what a lease reads nobody else writes."""
    in_tree = []
    nodes = [pool._root]
    while nodes:
        node = nodes.pop()
        children = [child for same in node.children.values() for child in same]
        in_tree += [child.page for child in children]
        nodes += children
        # an ancestor is pinned wherever a node below it is
        assert node is pool._root or node.pins >= max((c.pins for c in children), default=0)
    assert len(in_tree) == len(set(in_tree))
    free = set(np.flatnonzero(pool._is_free).tolist())
    assert not set(in_tree) & free
    assert set(pool._unpinned) <= {n for n in pool._unpinned if n.pins == 0}
    held = {int(page) for lease in leases for page in lease.pages}
    # and until it is copied, the page that a prefix parts in, which may have lost its tree
    held |= {lease.copied_page for lease in leases if lease.copied_page is not None}
    assert not held & free
    assert set(in_tree) | free | held == set(range(pool.num_pages))
    own = [
        int(page)
        for lease in leases
        if not lease.is_whole
        for page in lease.pages[lease.cached_len // pool.page_size :]
    ]
    assert len(own) == len(set(own))
