"""Segment-masked paged attention for JAX: numpy and jax only, usable without torch."""
