"""Packed multi-item scoring for Hugging Face models: one query, many items, exact scores.

Importing this package loads nothing else: each public name is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packscore.batcher.batcher import Batcher as Batcher
    from packscore.batcher.stats import BatcherStats as BatcherStats
    from packscore.calls import program_of as program_of
    from packscore.decisions.answers import Answer as Answer
    from packscore.decisions.answers import ChoiceAnswer as ChoiceAnswer
    from packscore.decisions.answers import Decision as Decision
    from packscore.decisions.answers import NoulAnswer as NoulAnswer
    from packscore.decisions.answers import ScoreAnswer as ScoreAnswer
    from packscore.decisions.prompt import DecisionPrompt as DecisionPrompt
    from packscore.decisions.questions import Choice as Choice
    from packscore.decisions.questions import Noul as Noul
    from packscore.decisions.questions import Score as Score
    from packscore.encoded import EncodedRequest as EncodedRequest
    from packscore.errors import BatcherClosedError as BatcherClosedError
    from packscore.errors import InputError as InputError
    from packscore.errors import InputTypeError as InputTypeError
    from packscore.errors import LaunchError as LaunchError
    from packscore.errors import LoadError as LoadError
    from packscore.errors import MaskTooLargeError as MaskTooLargeError
    from packscore.errors import MissingPackageError as MissingPackageError
    from packscore.errors import NonFiniteScoreError as NonFiniteScoreError
    from packscore.errors import NotPatchedError as NotPatchedError
    from packscore.errors import OutOfMemoryError as OutOfMemoryError
    from packscore.errors import PackscoreError as PackscoreError
    from packscore.errors import QueueFullError as QueueFullError
    from packscore.errors import RequestTooLargeError as RequestTooLargeError
    from packscore.errors import ScoringError as ScoringError
    from packscore.errors import StalePrefixError as StalePrefixError
    from packscore.errors import UnexpectedCompileError as UnexpectedCompileError
    from packscore.errors import UnsupportedModelError as UnsupportedModelError
    from packscore.errors import UnsupportedVersionError as UnsupportedVersionError
    from packscore.flows.planner import Explanation as Explanation
    from packscore.flows.planner import Plan as Plan
    from packscore.flows.planner import Workload as Workload
    from packscore.integrations.cross_encoder import CrossEncoder as CrossEncoder
    from packscore.integrations.pipeline import MultiItemScoringPipeline as MultiItemScoringPipeline
    from packscore.integrations.pipeline import register_pipelines as register_pipelines
    from packscore.patching import is_patched as is_patched
    from packscore.patching import patch_model as patch_model
    from packscore.patching import patched as patched
    from packscore.patching import unpatch_model as unpatch_model
    from packscore.prefixes import Prefix as Prefix
    from packscore.programs.program import ModelProgram as ModelProgram
    from packscore.reading.readouts import Content as Content
    from packscore.reading.readouts import Hidden as Hidden
    from packscore.reading.readouts import Label as Label
    from packscore.reading.readouts import ScoreRequest as ScoreRequest
    from packscore.results import Flow as Flow
    from packscore.results import MaskChoice as MaskChoice
    from packscore.results import NonFiniteChoice as NonFiniteChoice
    from packscore.results import RankedDocument as RankedDocument
    from packscore.results import ScoreResult as ScoreResult
    from packscore.results import Usage as Usage
    from packscore.scoring import MultiItemScorer as MultiItemScorer
    from packscore.shipped import shipped_model_path as shipped_model_path
    from packscore.text.named import PROMPTS as PROMPTS
    from packscore.text.prompts import PromptSpec as PromptSpec
    from packscore.verify import ParityReport as ParityReport
    from packscore.verify import SampleParity as SampleParity
    from packscore.verify import Tolerance as Tolerance
    from packscore.verify import verify_parity as verify_parity

__version__ = "0.2.0"

# The public names and where they live; the block above repeats them for type checkers, and a test
# compares the two.
_HOMES = {
    "batcher.batcher": ("Batcher",),
    "batcher.stats": ("BatcherStats",),
    "calls": ("program_of",),
    "decisions.answers": ("Answer", "ChoiceAnswer", "Decision", "NoulAnswer", "ScoreAnswer"),
    "decisions.prompt": ("DecisionPrompt",),
    "decisions.questions": ("Choice", "Noul", "Score"),
    "encoded": ("EncodedRequest",),
    "errors": (
        *("BatcherClosedError", "InputError", "InputTypeError", "LaunchError", "LoadError"),
        *("MaskTooLargeError", "MissingPackageError", "NonFiniteScoreError", "NotPatchedError"),
        *("OutOfMemoryError", "PackscoreError", "QueueFullError", "RequestTooLargeError"),
        *("ScoringError", "StalePrefixError", "UnexpectedCompileError", "UnsupportedModelError"),
        "UnsupportedVersionError",
    ),
    "flows.planner": ("Explanation", "Plan", "Workload"),
    "integrations.cross_encoder": ("CrossEncoder",),
    "integrations.pipeline": ("MultiItemScoringPipeline", "register_pipelines"),
    "patching": ("is_patched", "patch_model", "patched", "unpatch_model"),
    "prefixes": ("Prefix",),
    "programs.program": ("ModelProgram",),
    "reading.readouts": ("Content", "Hidden", "Label", "ScoreRequest"),
    "results": (
        *("Flow", "MaskChoice", "NonFiniteChoice", "RankedDocument", "ScoreResult", "Usage"),
    ),
    "scoring": ("MultiItemScorer",),
    "shipped": ("shipped_model_path",),
    "text.named": ("PROMPTS",),
    "text.prompts": ("PromptSpec",),
    "verify": ("ParityReport", "SampleParity", "Tolerance", "verify_parity"),
}
_HOME_OF = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
