"""Packed multi-item scoring for Hugging Face models: one query, many items, exact scores.

Importing this package loads nothing else: each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packscore.errors import (
        InputError,
        InputTypeError,
        MaskTooLargeError,
        NotPatchedError,
        PackscoreError,
        ScoringError,
        StalePrefixError,
        UnexpectedCompileError,
        UnsupportedModelError,
    )
    from packscore.patching import is_patched, patch_model, patched, program_of, unpatch_model
    from packscore.prompts import PROMPTS, PromptSpec
    from packscore.results import RankedDocument, ScoreResult, Usage
    from packscore.scoring import MultiItemScorer
    from packscore.shipped import shipped_model_path

__version__ = "0.1.0"

_HOMES = {
    "packscore.errors": (
        "InputError",
        "InputTypeError",
        "MaskTooLargeError",
        "NotPatchedError",
        "PackscoreError",
        "ScoringError",
        "StalePrefixError",
        "UnexpectedCompileError",
        "UnsupportedModelError",
    ),
    "packscore.patching": ("is_patched", "patch_model", "patched", "program_of", "unpatch_model"),
    "packscore.prompts": ("PROMPTS", "PromptSpec"),
    "packscore.results": ("RankedDocument", "ScoreResult", "Usage"),
    "packscore.scoring": ("MultiItemScorer",),
    "packscore.shipped": ("shipped_model_path",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PROMPTS",
    "InputError",
    "InputTypeError",
    "MaskTooLargeError",
    "MultiItemScorer",
    "NotPatchedError",
    "PackscoreError",
    "PromptSpec",
    "RankedDocument",
    "ScoreResult",
    "ScoringError",
    "StalePrefixError",
    "UnexpectedCompileError",
    "UnsupportedModelError",
    "Usage",
    "is_patched",
    "patch_model",
    "patched",
    "program_of",
    "shipped_model_path",
    "unpatch_model",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'packscore' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
