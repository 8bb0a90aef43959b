"""What is drawn: models, queries and items of many lengths, and which action comes next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from subjects import KINDS, Subject
from world import Ids

from helpers import random_ids

# tokens: the ends of pages and of buckets, and anything between
EDGES = (0, 1, 16, 63, 64, 65, 127, 128, 129, 200)
PREFIX_LENS = st.sampled_from((*EDGES, 255, 256, 257, 400, 600)) | st.integers(0, 600)
ITEM_LENS = st.integers(0, 40) | st.sampled_from(EDGES) | st.integers(0, 200)
# (trunk, tokens of it, tokens of its own): new, shared with an earlier one, or continued
PREFIXES = st.tuples(st.integers(0, 1), PREFIX_LENS, st.sampled_from((0, 0, 0, 5, 40)))
# groups of items: (tokens, how many, kind); a group that comes again is of equal items
GROUPS = st.tuples(ITEM_LENS, st.sampled_from((1, 1, 2, 5, 12, 30)), st.integers(0, 2))
ITEMS = st.lists(GROUPS, min_size=1, max_size=4)
# of programs: what fits into one bucket
SMALL_PREFIXES = st.tuples(st.integers(0, 1), st.integers(0, 70), st.sampled_from((0, 0, 5)))
SMALL_GROUPS = st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(0, 1))
SMALL_ITEMS = st.lists(SMALL_GROUPS, min_size=1, max_size=2)
SUBJECTS = st.builds(
    Subject,
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(("float32", "float32", "float64", "bfloat16")),
    num_kv_heads=st.sampled_from((1, 2, 4)),
    num_layers=st.integers(1, 3),
    tied=st.booleans(),
    is_wrapped=st.sampled_from((False, False, True)),
    has_small_cache=st.booleans(),
)
AUTOCAST = st.sampled_from((False, False, False, True))
MOSTLY = st.sampled_from((True, True, True, False))
FLOW = st.sampled_from((None, None, None, "packed", "chunked", "plain"))


def prefix_of(spec: tuple[int, int, int]) -> Ids:
    trunk, length, own = spec
    return [1 + t % 300 for t in (*random_ids(600, seed=trunk)[:length], *random_ids(own, seed=9))]


def items_of(groups: list[tuple[int, int, int]], prefix: Ids) -> list[Ids]:
    """At most 60 items; without a prefix each has a token."""
    found = [
        [1 + t % 300 for t in random_ids(max(length, int(not prefix)), seed=20 * kind + k % 12)]
        for length, count, kind in groups
        for k in range(count)
    ]
    return found[:60]


def has(attribute: str) -> Callable[[Any], bool]:
    return lambda machine: bool(getattr(machine, attribute, None))


# Methods of the machine that a step may be. One rule draws among all of them: with a rule for each,
# hypothesis leaves most of them out of an example, and few meet.
ACTIONS: list[str] = []


def action(weight: int = 1, **given: Any) -> Callable[[Any], Any]:
    """A method that a step may be, with what its arguments are drawn from."""

    def add(method: Any) -> Any:
        method.given, method.when = given, lambda _: True
        ACTIONS.extend(weight * [method.__name__])
        return method

    return add


def only_if(when: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """An action that is not always possible."""

    def add(method: Any) -> Any:
        method.when = when
        return method

    return add
