"""Segment-masked paged attention for JAX: numpy and jax only, usable without torch.

Each name is imported when it is first used: a layout needs numpy alone, the kernels need jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packscore_kernels.attention.api import Implementation as Implementation
    from packscore_kernels.attention.api import segment_paged_attention as segment_paged_attention
    from packscore_kernels.attention.layout import PAD_SEGMENT as PAD_SEGMENT
    from packscore_kernels.attention.layout import PREFIX_SEGMENT as PREFIX_SEGMENT
    from packscore_kernels.attention.layout import Group as Group
    from packscore_kernels.attention.layout import SegmentLayout as SegmentLayout
    from packscore_kernels.attention.schedule import build_schedule as build_schedule
    from packscore_kernels.attention.tuning import resolve_block_sizes as resolve_block_sizes
    from packscore_kernels.attention.types import BlockSizes as BlockSizes
    from packscore_kernels.attention.types import SegmentSchedule as SegmentSchedule
    from packscore_kernels.errors import ArgumentError as ArgumentError
    from packscore_kernels.errors import LayoutError as LayoutError
    from packscore_kernels.errors import UnsupportedError as UnsupportedError
    from packscore_kernels.layer.api import ProjectionImplementation as ProjectionImplementation
    from packscore_kernels.layer.api import can_gate as can_gate
    from packscore_kernels.layer.api import can_project as can_project
    from packscore_kernels.layer.api import gated_mlp as gated_mlp
    from packscore_kernels.layer.api import project_kv as project_kv
    from packscore_kernels.layer.api import project_out as project_out
    from packscore_kernels.layer.api import project_qkv as project_qkv
    from packscore_kernels.layer.tiles import LiveTokens as LiveTokens
    from packscore_kernels.page_writes import PageImplementation as PageImplementation
    from packscore_kernels.page_writes import PageWrites as PageWrites
    from packscore_kernels.page_writes import build_page_writes as build_page_writes
    from packscore_kernels.page_writes import write_kv_pages as write_kv_pages

# The public names and where they live; the block above repeats them for type checkers, and a test
# compares the two.
_HOMES = {
    "attention.api": ("Implementation", "segment_paged_attention"),
    "attention.layout": ("PAD_SEGMENT", "PREFIX_SEGMENT", "Group", "SegmentLayout"),
    "attention.schedule": ("build_schedule",),
    "attention.tuning": ("resolve_block_sizes",),
    "attention.types": ("BlockSizes", "SegmentSchedule"),
    "errors": ("ArgumentError", "LayoutError", "UnsupportedError"),
    "layer.api": (
        *("ProjectionImplementation", "can_gate", "can_project"),
        *("gated_mlp", "project_kv", "project_out", "project_qkv"),
    ),
    "layer.tiles": ("LiveTokens",),
    "page_writes": ("PageImplementation", "PageWrites", "build_page_writes", "write_kv_pages"),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
