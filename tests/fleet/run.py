"""Score on a Ray cluster of this machine and kill its parts, in an environment of its own.

    python tests/fleet/run.py             # two workers, some 3 GB while it runs
    python tests/fleet/run.py --only stages

What it asks is in check.py: 100 000 pairs over 2 000 queries by two workers, ten of which are
killed on the way, and by the local command; the driver killed and resumed; the stages of Ray Data;
the deployment of Ray Serve; and the same with what holds it together taken out, which must be seen.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


def main() -> int:
    """Make the environment and run the checks; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", type=Path, help="a folder that keeps the environment")
    options, passed_on = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        python = _environment(options.keep or Path(scratch) / "venv")
        command = [str(python), "-P", "-m", "fleet.check", *passed_on]
        paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "plugin", ROOT / "jax_kernels")))
        quiet = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        environment = {**os.environ, "PYTHONPATH": paths, **quiet}
        return subprocess.run(command, env=environment, check=False).returncode


def _environment(folder: Path) -> Path:
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # with the suite's own torch, which comes without CUDA
    pins = [ROOT / "tests/versions/ci.txt", HERE / "constraints.txt"]
    constraints = [part for pin in pins for part in ("--constraint", str(pin))]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *constraints, f"{ROOT}[ray,serve]"], check=True)
    return python


if __name__ == "__main__":
    raise SystemExit(main())
