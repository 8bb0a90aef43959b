"""Every variant lowers and compiles for every chip, within its memory; no TPU is needed.

The compiler itself refuses a kernel that needs more VMEM than its limit, and the limit is never
above the chip's. Each chip has a process of its own: libtpu reads its environment when it loads.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_variants.py")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed here")


def run(*command):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_libtpu
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_every_variant_compiles(chip):
    results = [json.loads(line) for line in run(SCRIPT, chip).splitlines()]
    gather = results.pop()
    assert gather["name"] == "vector gather"
    # The refusal that shows the check has teeth.
    assert "Cannot do int indexing on TPU" in gather["error"]
    assert len(results) == 12
    for result in results:
        assert result["error"] is None, result


@needs_libtpu
def test_the_measuring_rod_is_calibrated():
    assert "of the peak" in run(BENCHMARKS / "tpu_schedule.py", "calibrate")


@needs_libtpu
@pytest.mark.parametrize(("chip", "most"), [("v6e", 0.95e6), ("v5e", 2.0e6)])
def test_the_reference_layer_stays_within_its_cycles(chip, most):
    out = json.loads(run(BENCHMARKS / "kernel_cycles.py", "--chip", chip, "--json", "--sweep"))
    assert out["cycles"] <= most
    assert out["flows"]["extend"]["cycles"] <= most
    assert out["sweep"]["items"]["line_error"] <= 0.05
    assert out["sweep"]["prefix"]["line_error"] <= PREFIX_LINE[chip]


# The first point, no prefix at all, has no whole blocks for the window to hide behind.
PREFIX_LINE = {"v6e": 0.06, "v5e": 0.06}
