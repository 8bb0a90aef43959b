"""The fleet on a Ray cluster of this machine; `run.py` makes the environment for it.

python -m fleet.check --only kills     # with tests/ and packscore's roots on PYTHONPATH
"""

from __future__ import annotations

import argparse
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from fleet import commands, controls, stages

CHECKS: dict[str, Callable[[Path], str]] = {
    "stages": stages.check_stages,
    "scattered": stages.check_groups,
    "docs": stages.check_docs,
    "serve": stages.check_serve,
    "no_model": commands.check_no_model,
    "decide": commands.check_decide,
    "driver": commands.check_driver,
    "control_rename": controls.check_rename,
    "control_cut": controls.check_cut,
    "kills": commands.check_kills,
}


def main() -> int:
    """Run what is asked for; the exit status is 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=CHECKS, nargs="+", default=list(CHECKS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = 0
    for name in options.only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = CHECKS[name](Path(folder))
            except Exception:
                failed += 1
                said = f"FAILED\n{traceback.format_exc()}"
        print(f"{name:<16}{time.monotonic() - began:>6.0f} s  {said}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
