"""Segment-masked paged attention for JAX: numpy and jax only, usable without torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packscore_kernels.projections import (
        can_gate,
        can_project,
        gated_mlp,
        project_out,
        project_qkv,
    )
    from packscore_kernels.segment_paged_attention import (
        PAD_SEGMENT,
        PREFIX_SEGMENT,
        ArgumentError,
        BlockSizes,
        Group,
        LayoutError,
        PageWrites,
        SegmentLayout,
        SegmentSchedule,
        UnsupportedError,
        build_page_writes,
        build_schedule,
        resolve_block_sizes,
        segment_paged_attention,
        write_kv_pages,
    )

__all__ = [
    "PAD_SEGMENT",
    "PREFIX_SEGMENT",
    "ArgumentError",
    "BlockSizes",
    "Group",
    "LayoutError",
    "PageWrites",
    "SegmentLayout",
    "SegmentSchedule",
    "UnsupportedError",
    "build_page_writes",
    "build_schedule",
    "can_gate",
    "can_project",
    "gated_mlp",
    "project_out",
    "project_qkv",
    "resolve_block_sizes",
    "segment_paged_attention",
    "write_kv_pages",
]

_PROJECTIONS = ("can_gate", "can_project", "gated_mlp", "project_out", "project_qkv")

# The op has the name of the folder it lives in: loaded first and taken out again, the folder
# leaves that name to the function.
_home = importlib.import_module("packscore_kernels.segment_paged_attention")
del globals()["segment_paged_attention"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _home
    if name in _PROJECTIONS:
        home = importlib.import_module("packscore_kernels.projections")
    value = getattr(home, name)
    globals()[name] = value
    return value
