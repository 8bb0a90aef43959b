"""Run another library's own tests with packscore in the place of what they test.

    python tests/peers/run.py --checkout FOLDER

The checkout is a clone of the library at a tag; nothing of it is copied here, and nothing is
downloaded: names on the hub lead to small checkpoints made for the run (`stand_ins.py`).
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

HERE = Path(__file__).parent
SUITES = {
    "models": "tests/cross_encoder/test_model.py",
    "trainer": "tests/cross_encoder/test_trainer.py",
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
    with tempfile.TemporaryDirectory() as folder:
        environment = _environment(Path(folder), options.without)
        # imported here: it reads the environment
        import stand_ins
        from transformers.utils import logging

        logging.disable_progress_bar()
        stand_ins.write(Path(folder) / "hub", checkout)
        failed = 0
        for suite in [options.suite] if options.suite else SUITES:
            failed += _run(checkout, suite, environment, options.only)
    return int(failed > 0)


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
    # -P: the installed library is tested, and not the one that lies in the checkout
    command = [sys.executable, "-P", "-m", "pytest", "-p", "peers_plugin", "-p", "no:cacheprovider"]
    chosen = ["-k", only] if only else []
    done = subprocess.run(
        [*command, *chosen, SUITES[suite]],
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
    found = json.loads(outcomes.read_text(encoding="utf-8"))
    outcomes.unlink()
    counts = collections.Counter(entry["outcome"] for entry in found)
    print(f"{suite}: " + ", ".join(f"{counts[x]} {x}" for x in ("passed", "failed", "skipped")))
    for entry in found:
        if entry["outcome"] != "passed":
            name = entry["test"].rpartition("::")[2]
            print(f"  {entry['outcome']} {name}: {entry['reason'][:200]}")
    return counts["failed"]


if __name__ == "__main__":
    sys.exit(main())
