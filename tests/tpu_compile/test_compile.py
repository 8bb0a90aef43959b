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

from compile_programs import shapes
from packscore_kernels.hardware import CHIPS

PROGRAMS = Path(__file__).with_name("compile_programs.py")
SCRIPT = Path(__file__).with_name("compile_variants.py")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed here")


COMMANDS = {
    **{chip: (SCRIPT, chip) for chip in sorted(CHIPS)},
    "calibrate": (BENCHMARKS / "tpu_compiler" / "schedule.py", "calibrate"),
    "v6e 0.6B": (PROGRAMS, "v6e", "0.6B"),
    "v5e 0.6B": (PROGRAMS, "v5e", "0.6B", "--over-vocabulary"),
    "v6e 4B": (PROGRAMS, "v6e", "4B"),
    "v6e 8B": (PROGRAMS, "v6e", "8B"),
    **{
        f"{chip} cycles": (BENCHMARKS / "kernel_cycles.py", "--chip", chip, "--json", "--sweep")
        for chip in ("v6e", "v5e")
    },
}


def run(name):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    paths = [str(BENCHMARKS), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
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
@pytest.mark.parametrize("name", sorted(CHIPS))
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


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "hbm_bytes"),
    [("v6e 0.6B", 32e9), ("v5e 0.6B", 16e9), ("v6e 4B", 32e9), ("v6e 8B", 32e9)],
)
def test_whole_models_compile(name, hbm_bytes, output):
    """Qwen3 of its real sizes, a query of 2 000 tokens and 500 items, on one chip."""
    out = json.loads(output(name))
    print(name, out)
    # nothing of tokens x tokens or tokens x vocabulary, and no weight baked into the program
    for kind in ("squares", "logits", "constants"):
        assert out[kind] == [], kind
    assert out["argument_bytes"] >= out["weight_bytes"] + out["pool_bytes"]
    # K, V and what attention found pass between the kernels as they are
    assert out["copies"] == []
    around = {"gated_mlp", "project_out", "project_qkv"}
    assert set(out["kernels"]) == {*around, "segment_paged_attention", "write_kv_pages"}
    # the pool is changed in place
    assert out["aliased_bytes"] >= out["pool_bytes"] > 0
    assert out["argument_bytes"] + out["temporary_bytes"] <= hbm_bytes
    assert out["code_bytes"] <= 20e6


def test_the_reader_of_programs_sees_what_must_not_be_there():
    line = "  %scores = bf16[16,12288,12288]{2,1,0:T(8,128)} fusion(%q), kind=kLoop"
    argument = "  %w = bf16[151936,1024]{1,0} parameter(0)"
    assert [sizes for sizes, _ in shapes(f"{line}\n{argument}")] == [[16, 12288, 12288]]
