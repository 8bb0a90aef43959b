"""Segment-masked paged attention: a shared prefix, many items, no mask.

Each name is imported when it is first used: the layout needs numpy alone, the op needs jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packscore_kernels.segment_paged_attention.api import (
        Implementation,
        segment_paged_attention,
    )
    from packscore_kernels.segment_paged_attention.kv_pages import (
        PageWrites,
        build_page_writes,
        write_kv_pages,
    )
    from packscore_kernels.segment_paged_attention.layout import (
        PAD_SEGMENT,
        PREFIX_SEGMENT,
        Group,
        SegmentLayout,
    )
    from packscore_kernels.segment_paged_attention.schedule import (
        build_schedule,
    )
    from packscore_kernels.segment_paged_attention.tuning import (
        resolve_block_sizes,
    )
    from packscore_kernels.segment_paged_attention.types import (
        BlockSizes,
        SegmentSchedule,
    )
    from packscore_kernels.segment_paged_attention.validation import (
        ArgumentError,
        LayoutError,
        UnsupportedError,
    )

_HOMES = {
    "api": (
        "Implementation",
        "segment_paged_attention",
    ),
    "kv_pages": (
        "PageWrites",
        "build_page_writes",
        "write_kv_pages",
    ),
    "layout": (
        "PAD_SEGMENT",
        "PREFIX_SEGMENT",
        "Group",
        "SegmentLayout",
    ),
    "schedule": ("build_schedule",),
    "tuning": ("resolve_block_sizes",),
    "types": (
        "BlockSizes",
        "SegmentSchedule",
    ),
    "validation": (
        "ArgumentError",
        "LayoutError",
        "UnsupportedError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PAD_SEGMENT",
    "PREFIX_SEGMENT",
    "ArgumentError",
    "BlockSizes",
    "Group",
    "Implementation",
    "LayoutError",
    "PageWrites",
    "SegmentLayout",
    "SegmentSchedule",
    "UnsupportedError",
    "build_page_writes",
    "build_schedule",
    "resolve_block_sizes",
    "segment_paged_attention",
    "write_kv_pages",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
