"""Python code in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

# Programs of other processes compiled as `quick_programs` compiles those of this one.
QUICK_PROGRAMS = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}


def run_fresh(code: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
