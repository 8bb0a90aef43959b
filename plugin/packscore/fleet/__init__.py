"""Many machines: stages of a Ray dataset, each with one scorer in every worker of a pool.

Importing this loads neither Ray nor torch; what needs Ray says how it is installed.
"""

from __future__ import annotations

from packscore.fleet.reading import read_records as read_records
from packscore.fleet.stages import DecideStage as DecideStage
from packscore.fleet.stages import PairStage as PairStage
from packscore.fleet.stages import RankStage as RankStage
from packscore.fleet.stages import ScoreStage as ScoreStage
from packscore.fleet.workers import Workers as Workers
from packscore.fleet.workers import run_groups as run_groups
from packscore.fleet.workers import run_stage as run_stage

__all__ = [
    "DecideStage",
    "PairStage",
    "RankStage",
    "ScoreStage",
    "Workers",
    "read_records",
    "run_groups",
    "run_stage",
]
