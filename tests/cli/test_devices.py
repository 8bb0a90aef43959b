"""What `--device` chooses, and what it leaves alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from packscore.loading import tpu_is_plugged_in

LOADED = """
{told}
import jax
assert jax.devices()
print("libtpu.so" in open("/proc/self/maps").read())
"""
TOLD = "from packscore.cli.load import place_for; place_for('jax')"


def _jax_starts_libtpu(told: str) -> bool:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    code = LOADED.format(told=told)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip() == "True"


@pytest.mark.jax
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux what is loaded")
@pytest.mark.skipif(tpu_is_plugged_in(), reason="this machine has the TPU that must be absent")
def test_programs_on_the_cpu_start_no_libtpu() -> None:
    assert _jax_starts_libtpu("")  # by itself jax does
    assert not _jax_starts_libtpu(TOLD)
