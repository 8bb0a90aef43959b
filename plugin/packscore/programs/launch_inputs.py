"""A request as the arrays that a compiled program takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from packscore.flows.page_pool import PAGE_SIZE, PrefixLease
from packscore.model.sizes import ModelSizes
from packscore.programs.sizes import MAX_GROUPS, NAMED_PAGES, DenseKey, ProgramKey
from packscore_kernels import (
    BlockSizes,
    PageWrites,
    SegmentLayout,
    SegmentSchedule,
    build_page_writes,
    build_schedule,
    resolve_block_sizes,
)
from packscore_kernels.hardware import cdiv


def block_sizes_for(
    sizes: ModelSizes, dtype: Any, key: ProgramKey, chip: str | None = None
) -> BlockSizes:
    """The attention's tiles in a program of a model."""
    blocks = resolve_block_sizes(
        num_q_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        dtype=dtype,
        num_tokens=key.num_tokens,
        page_size=PAGE_SIZE if key.num_pages else 0,
        chip=chip,
    )
    # of short tiles two at most: what attention computes of padding is keys of few rows
    return replace(blocks, block_q=min(blocks.block_q, 2 * key.tile)) if key.tile else blocks


class LaunchInputs(NamedTuple):
    """What a program takes beside weights and pages: numpy arrays, or what stands for them."""

    token_ids: Any  # i32[num_tokens]
    position_ids: Any  # i32[num_tokens], rotary positions
    schedule: SegmentSchedule  # who sees whom
    rows: Any  # i32[num_rows], indices into the packed tokens: what the head reads
    num_rows: Any  # i32[]: of which so many
    label_ids: Any  # i32[num_labels]
    over_vocabulary: Any  # i32[]: 1 where the vocabulary's log-sum-exp is wanted
    page_writes: PageWrites | None  # None in a program without pages

    @classmethod
    def of(
        cls,
        key: ProgramKey,
        block_sizes: BlockSizes,
        layout: SegmentLayout,
        token_ids: npt.NDArray[np.int64],  # [num_tokens], without padding
        label_ids: Sequence[int],
        *,
        rows: npt.NDArray[np.integer[Any]] | None = None,  # [num_rows]: None takes the scored ones
        leases: Sequence[PrefixLease | None] = (),
        over_vocabulary: bool = False,
    ) -> LaunchInputs:
        """A request padded to a program's sizes; `leases` say what its prefixes leave in pages."""
        padded = replace(layout, num_tokens=key.num_tokens)
        rows = layout.scored_rows if rows is None else rows
        schedule = build_schedule(
            padded,
            block_sizes=block_sizes,
            page_size=PAGE_SIZE if key.num_pages else 0,
            num_pages=key.num_pages,
            max_groups=MAX_GROUPS,
            max_pages=_page_room(key),
        )
        return cls(
            _padded(token_ids, key.num_tokens),
            padded.position_ids,
            schedule,
            _padded(rows, key.num_rows),
            np.array(len(rows), np.int32),
            _padded(label_ids, key.num_labels),
            np.array(over_vocabulary, np.int32),
            _page_writes(key, padded, leases) if key.num_pages else None,
        )


def _page_room(key: ProgramKey) -> int:
    """How many page numbers a program's inputs have room for."""
    if isinstance(key, DenseKey):
        return key.read_pages
    return max(key.num_pages, NAMED_PAGES) if key.num_pages else 0


def _padded(values: npt.NDArray[Any] | Sequence[int], size: int) -> npt.NDArray[np.int32]:
    found = np.zeros(size, np.int32)
    found[: len(values)] = values
    return found


def most_page_writes(num_tokens: int) -> int:
    """Pages that a launch of so many tokens can write: a group may begin and end inside one."""
    return cdiv(num_tokens, PAGE_SIZE) + MAX_GROUPS


def _page_writes(
    key: ProgramKey, layout: SegmentLayout, leases: Sequence[PrefixLease | None]
) -> PageWrites:
    """What a launch leaves in pages: the tokens that its leases miss."""
    missing = [lease if lease and not lease.is_whole else None for lease in leases]
    missing += [None] * (len(layout.groups) - len(missing))
    return build_page_writes(
        layout,
        [lease.pages if lease else np.zeros(0, np.int32) for lease in missing],
        page_size=PAGE_SIZE,
        num_pages=key.num_pages,
        max_writes=most_page_writes(key.num_tokens),
        copied_pages=[lease.copied_page if lease else None for lease in missing],
    )
