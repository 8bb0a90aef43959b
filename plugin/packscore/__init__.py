"""Packed multi-item scoring for Hugging Face models: one query, many items, exact scores.

Importing this package loads nothing else: each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packscore.cross_encoder import CrossEncoder
    from packscore.errors import (
        InputError,
        InputTypeError,
        MaskTooLargeError,
        MissingPackageError,
        NotPatchedError,
        PackscoreError,
        ScoringError,
        StalePrefixError,
        UnexpectedCompileError,
        UnsupportedModelError,
    )
    from packscore.patching import is_patched, patch_model, patched, program_of, unpatch_model
    from packscore.pipeline import MultiItemScoringPipeline, register_pipelines
    from packscore.prompts import PROMPTS, PromptSpec
    from packscore.results import RankedDocument, ScoreResult, Usage
    from packscore.scoring import MultiItemScorer
    from packscore.shipped import shipped_model_path
    from packscore.verify import ParityReport, Tolerance, verify_parity

__version__ = "0.1.0"

_HOMES = {
    "packscore.cross_encoder": ("CrossEncoder",),
    "packscore.errors": (
        "InputError",
        "InputTypeError",
        "MaskTooLargeError",
        "MissingPackageError",
        "NotPatchedError",
        "PackscoreError",
        "ScoringError",
        "StalePrefixError",
        "UnexpectedCompileError",
        "UnsupportedModelError",
    ),
    "packscore.patching": ("is_patched", "patch_model", "patched", "program_of", "unpatch_model"),
    "packscore.pipeline": ("MultiItemScoringPipeline", "register_pipelines"),
    "packscore.prompts": ("PROMPTS", "PromptSpec"),
    "packscore.results": ("RankedDocument", "ScoreResult", "Usage"),
    "packscore.scoring": ("MultiItemScorer",),
    "packscore.shipped": ("shipped_model_path",),
    "packscore.verify": ("ParityReport", "Tolerance", "verify_parity"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "PROMPTS",
    "CrossEncoder",
    "InputError",
    "InputTypeError",
    "MaskTooLargeError",
    "MissingPackageError",
    "MultiItemScorer",
    "MultiItemScoringPipeline",
    "NotPatchedError",
    "PackscoreError",
    "ParityReport",
    "PromptSpec",
    "RankedDocument",
    "ScoreResult",
    "ScoringError",
    "StalePrefixError",
    "Tolerance",
    "UnexpectedCompileError",
    "UnsupportedModelError",
    "Usage",
    "is_patched",
    "patch_model",
    "patched",
    "program_of",
    "register_pipelines",
    "shipped_model_path",
    "unpatch_model",
    "verify_parity",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'packscore' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
