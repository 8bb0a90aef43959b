"""Segment-masked paged attention: a shared prefix, many items, no mask."""

from packscore_kernels.segment_paged_attention.types import (
    PAD_SEGMENT,
    PREFIX_SEGMENT,
    Group,
    SegmentLayout,
)

__all__ = ["PAD_SEGMENT", "PREFIX_SEGMENT", "Group", "SegmentLayout"]
