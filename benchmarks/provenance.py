"""Where a result comes from: date, commit, versions and machine, for the files that tell it."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def today() -> str:
    """The date, as 2026-12-31."""
    return datetime.date.today().isoformat()


def commit() -> str:
    """The short name of the commit, with a + where files differ from it."""
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--short") else "")


def _git(*command: str) -> str:
    done = subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in packages if name in installed}


def cpu() -> str:
    """What the processor calls itself."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def load() -> list[float]:
    """How many processes wanted a core, over the last 1, 5 and 15 minutes."""
    return [round(x, 1) for x in os.getloadavg()]


def made(command: str, *packages: str) -> dict[str, Any]:
    """All of it, for a part of a file."""
    return {
        "date": today(),
        "commit": commit(),
        "command": command,
        "versions": {"python": platform.python_version(), **versions(*packages)},
        "machine": {
            "cpu": cpu(),
            "cores": len(os.sched_getaffinity(0)),
            "load_at_start": load(),
        },
    }
