"""Segment-masked paged attention: a shared prefix, many items, no mask."""
