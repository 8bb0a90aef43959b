"""What pytest loads beside either plugin: what became of every test, for the process outside."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

outcomes: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note what became of a test; a part of one (a subtest) is told of where it failed."""
    is_bad = report.outcome != "passed"
    is_whole = not isinstance(report, pytest.SubtestReport)
    if not (report.failed or (is_whole and (is_bad or report.when == "call"))):
        return
    reason = ""
    if report.skipped:
        reason = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else "")
    elif report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else str(report.longrepr)).splitlines()
        reason = lines[0] if lines else ""
    found = outcomes.get(report.nodeid)
    if found is None or found["outcome"] != "failed":
        name = report.nodeid.rpartition("::")[2]
        outcomes[report.nodeid] = {"test": name, "outcome": report.outcome, "reason": reason}


def pytest_sessionfinish() -> None:
    """Hand the outcomes to the process that started this one."""
    Path(os.environ["PEERS_OUTCOMES"]).write_text(json.dumps(outcomes), encoding="utf-8")
