"""Typed questions about a state: how they become token ids, and numbers become answers."""
