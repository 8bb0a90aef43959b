"""The small Qwen3 reranker inside the package, for a first try and for tests without a network."""

from __future__ import annotations

from pathlib import Path


def shipped_model_path() -> Path:
    """Folder of the shipped reranker, for `from_pretrained`.

    A four-layer Qwen3 trained on the docstrings of Python's standard library with the prompt
    "qwen3-reranker" (`examples/train_reranker.py`); `Qwen/Qwen3-Reranker-0.6B` goes through the
    same code.
    """
    return Path(__file__).parent / "shipped_model"
