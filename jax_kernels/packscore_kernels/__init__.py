"""Segment-masked paged attention for JAX: numpy and jax only, usable without torch."""

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
    "resolve_block_sizes",
    "segment_paged_attention",
    "write_kv_pages",
]
