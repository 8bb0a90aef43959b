"""Every variant lowers and compiles for every chip, within its memory; no TPU is needed.

The compiler itself refuses a kernel that needs more VMEM than its limit, and the limit is never
above the chip's. Each chip has a process of its own: libtpu reads its environment when it loads.
"""

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_variants.py")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed here")


COMMANDS = {
    **{chip: (SCRIPT, chip) for chip in ("v4", "v5e", "v5p", "v6e", "tpu7x")},
    "calibrate": (BENCHMARKS / "tpu_schedule.py", "calibrate"),
    **{
        f"{chip} cycles": (BENCHMARKS / "kernel_cycles.py", "--chip", chip, "--json", "--sweep")
        for chip in ("v6e", "v5e")
    },
}


def run(name):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    command = [sys.executable, *map(str, COMMANDS[name])]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def output(request):
    """The output of a command; those of the chosen tests start at once, two at a time."""
    wanted = [
        item.callspec.params.get("name", "calibrate") if hasattr(item, "callspec") else "calibrate"
        for item in request.session.items
        if item.path == Path(__file__)
    ]
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(run, name) for name in dict.fromkeys(wanted)}

        def wait(name):
            done = running[name].result()
            assert done.returncode == 0, done.stderr[-2000:]
            return done.stdout

        yield wait


@needs_libtpu
@pytest.mark.parametrize("name", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_every_variant_compiles(name, output):
    results = [json.loads(line) for line in output(name).splitlines()]
    gather = results.pop()
    assert gather["name"] == "vector gather"
    # The refusal that shows the check has teeth.
    assert "Cannot do int indexing on TPU" in gather["error"]
    assert len(results) == 12
    for result in results:
        assert result["error"] is None, result


@needs_libtpu
def test_the_measuring_rod_is_calibrated(output):
    assert "of the peak" in output("calibrate")


@needs_libtpu
@pytest.mark.parametrize(("name", "most"), [("v6e cycles", 0.95e6), ("v5e cycles", 2.0e6)])
def test_the_reference_layer_stays_within_its_cycles(name, most, output):
    out = json.loads(output(name))
    assert out["cycles"] <= most
    assert out["flows"]["extend"]["cycles"] <= most
    assert out["sweep"]["items"]["line_error"] <= 0.05
    assert out["sweep"]["prefix"]["line_error"] <= 0.05
