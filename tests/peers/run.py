"""Run another library's own tests with packscore in the place of what they test.

    python tests/peers/run.py --checkout FOLDER

The checkout is a clone of the library at a tag, sentence-transformers or transformers; nothing of
it is copied here, and nothing is downloaded: names on the hub lead to small checkpoints made for
the run (`stand_ins.py`).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# (the plugin that puts packscore in place, their file): a checkout has those of its library
SUITES = {
    "models": ("peers_plugin", "tests/cross_encoder/test_model.py"),
    "trainer": ("peers_plugin", "tests/cross_encoder/test_trainer.py"),
    "qwen3": ("peers_qwen3", "tests/models/qwen3/test_modeling_qwen3.py"),
}


def main() -> int:
    """Run the suites; the exit status is 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", type=Path, required=True, help="folder of the clone")
    parser.add_argument("--suite", choices=SUITES, help="one of them; all by default")
    parser.add_argument(
        "--without", action="store_true", help="the same tests with their own class: the control"
    )
    parser.add_argument("-k", dest="only", help="as pytest's")
    options = parser.parse_args()
    checkout = options.checkout.resolve()
    wanted = [options.suite] if options.suite else SUITES
    suites = [name for name in wanted if (checkout / SUITES[name][1]).exists()]
    if not suites:
        files = ", ".join(SUITES[name][1] for name in wanted)
        parser.error(f"--checkout {checkout} has none of {files}")
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(Path(folder), options.without)
        if suites != ["qwen3"]:
            _write_stand_ins(Path(folder), checkout)
        failed = sum(_run(checkout, suite, environment, options.only) for suite in suites)
    return int(failed > 0)


def _write_stand_ins(folder: Path, checkout: Path) -> None:
    # imported here: it reads the environment
    import stand_ins
    from transformers.utils import logging

    logging.disable_progress_bar()
    stand_ins.write(folder / "hub", checkout)


def _environment(folder: Path, without: bool) -> dict[str, str]:
    os.environ |= {
        "HF_HOME": str(folder),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PEERS_OUTCOMES": str(folder / "outcomes.json"),
    }
    sys.path.insert(0, str(HERE))
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    alone = {"PEERS_WITHOUT": "1"} if without else {}
    return {**os.environ, "PYTHONPATH": path, **alone}


def _run(checkout: Path, suite: str, environment: dict[str, str], only: str | None) -> int:
    """How many tests failed; each has its line."""
    plugin, file = SUITES[suite]
    # -P: the installed library is tested, and not the one that lies in the checkout
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider"]
    plugins = ["-p", "peers_outcomes", "-p", plugin]
    chosen = ["-k", only] if only else []
    done = subprocess.run(
        [*command, *plugins, *chosen, file],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    outcomes = Path(environment["PEERS_OUTCOMES"])
    if not outcomes.exists():
        print(done.stdout, done.stderr, sep="\n")
        raise SystemExit(f"pytest ended with {done.returncode} before it ran a test")
    found = list(json.loads(outcomes.read_text(encoding="utf-8")).values())
    outcomes.unlink()
    counts = collections.Counter(entry["outcome"] for entry in found)
    print(f"{suite}: " + ", ".join(f"{counts[x]} {x}" for x in ("passed", "failed", "skipped")))
    for entry in found:
        if entry["outcome"] != "passed":
            print(f"  {entry['outcome']} {entry['test']}: {entry['reason'][:200]}")
    _tell_of_patches([entry for entry in found if entry.get("models") or entry.get("refusals")])
    return counts["failed"]


def _tell_of_patches(found: list[dict[str, Any]]) -> None:
    """How much of a suite ran patched, and what could not; nothing where nothing was patched."""
    if found:
        models, calls = (sum(entry[what] for entry in found) for what in ("models", "calls"))
        reached = sum(entry["calls"] > 0 for entry in found)
        print(f"  patched {models} models; {reached} tests called our attention, {calls} times")
    for entry in found:
        for refusal in entry["refusals"]:
            print(f"  left alone in {entry['test']}: {refusal[:200]}")


if __name__ == "__main__":
    sys.exit(main())
