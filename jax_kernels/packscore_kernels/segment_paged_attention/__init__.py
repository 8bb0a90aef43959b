"""Segment-masked paged attention: a shared prefix, many items, no mask."""

from packscore_kernels.segment_paged_attention.api import Implementation, segment_paged_attention
from packscore_kernels.segment_paged_attention.kv_pages import (
    PageWrites,
    build_page_writes,
    write_kv_pages,
)
from packscore_kernels.segment_paged_attention.schedule import build_schedule
from packscore_kernels.segment_paged_attention.tuning import resolve_block_sizes
from packscore_kernels.segment_paged_attention.types import (
    PAD_SEGMENT,
    PREFIX_SEGMENT,
    BlockSizes,
    Group,
    SegmentLayout,
    SegmentSchedule,
)
from packscore_kernels.segment_paged_attention.validation import (
    ArgumentError,
    LayoutError,
    UnsupportedError,
)

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
