"""The package alone: no torch, nothing at import, and its example runs."""

from __future__ import annotations

import doctest
import subprocess
import sys

from packscore_kernels.attention import api

CHECK = """
import sys
import packscore_kernels
assert "torch" not in sys.modules and "torchax" not in sys.modules
import jax
assert not jax._src.xla_bridge.backends_are_initialized()
"""


def test_import_needs_no_torch_and_starts_no_device() -> None:
    subprocess.run([sys.executable, "-c", CHECK], check=True)


def test_the_docstring_example_runs() -> None:
    result = doctest.testmod(api)
    assert result.attempted >= 5
    assert not result.failed
