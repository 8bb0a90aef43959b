"""How the suite runs: what is left out, in what order, and what its processes share."""

from __future__ import annotations

import gc
import os

# before transformers loads: the suite must never reach for a hub
os.environ["HF_HUB_OFFLINE"] = "1"
# and torch's threads would turn in circles while they wait, on cores that the other process needs
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# eight devices of a CPU stand for the chips of a slice; all that knows of no mesh runs on the first
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import tempfile
from pathlib import Path
from typing import Any

import pytest

from selection import HAS_JAX, LONGEST_FIRST, needs_jax, takes_jax, unit_of

LEFT_OUT = pytest.StashKey[int]()
ON_A_TPU = "tpu"  # what -m says where the tests of a chip are to run


def pytest_configure(config: pytest.Config) -> None:
    """What one process compiles the others find, in a folder of this run or one that is given.

    Raises:
      pytest.UsageError: a chip is asked for that is not there, or by several processes.
    """
    if config.option.markexpr == ON_A_TPU:
        _check_tpu(config)
    else:  # jax would look for a TPU, as libtpu makes it do
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="packscore_tests_")
    config.add_cleanup(folder.cleanup)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": folder.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def _check_tpu(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("a TPU has one owner: pytest -m tpu -n 0 tests/tpu")
    from packscore.cli.doctor import ask_jax
    from packscore.loading import tpu_is_plugged_in

    if not tpu_is_plugged_in():
        raise pytest.UsageError("pytest -m tpu needs a TPU, and this machine has none")
    devices, failure = ask_jax()
    if not any(found["platform"] == "tpu" for found in devices):
        raise pytest.UsageError(f"jax sees no TPU: {failure or 'install packscore[tpu]'}")


def pytest_sessionstart(session: pytest.Session) -> None:
    # the process that hands out tests, and runs none, starts sooner without torch and transformers
    if not session.config.pluginmanager.hasplugin("dsession"):
        session.config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Units of tests in the order of the collection, for the default `--dist loadfile`."""
    from xdist.scheduler import LoadFileScheduling

    class UnitScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    return UnitScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without jax, files that import it are left out as tests of the `jax` mark are."""
    test_file = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if not HAS_JAX and test_file and needs_jax(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # before -m asks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if takes_jax(item) or needs_jax(item.path):
            item.add_marker("jax")
    order = {unit: place for place, unit in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(unit_of(item.nodeid), len(order)))


def pytest_collection_finish() -> None:
    # what was imported stays: a collection in the middle of a test need not look at all of it
    gc.collect()
    gc.freeze()


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long"):
            item.config.stash[LEFT_OUT] = item.config.stash.get(LEFT_OUT, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # every worker collects, and leaves out, the same tests
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if left_out := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} long tests left out: pytest -m long runs them")
