"""Segment-masked paged attention for JAX: numpy and jax only, usable without torch."""

from packscore_kernels.segment_paged_attention import (
    PAD_SEGMENT,
    PREFIX_SEGMENT,
    ArgumentError,
    BlockSizes,
    Group,
    LayoutError,
    SegmentLayout,
    SegmentSchedule,
    UnsupportedError,
    build_schedule,
    resolve_block_sizes,
    segment_paged_attention,
)

__all__ = [
    "PAD_SEGMENT",
    "PREFIX_SEGMENT",
    "ArgumentError",
    "BlockSizes",
    "Group",
    "LayoutError",
    "SegmentLayout",
    "SegmentSchedule",
    "UnsupportedError",
    "build_schedule",
    "resolve_block_sizes",
    "segment_paged_attention",
]
