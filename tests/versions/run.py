"""Run the suite's core against other versions of what packscore builds on, each in its own venv.

    python tests/versions/run.py                 # every set whose Python is here
    python tests/versions/run.py oldest newest   # these

A set is a Python and what pip is told to install; the packages that it does not name are the newest
that the ranges of pyproject.toml and this machine's pip allow. What passed is written, with the
versions that were there and the date, into plugin/packscore/tested_versions.json, which `packscore
doctor` and docs/install.md show; a set that fails loses its row. Torch comes with CUDA in most
sets: some 6 GB each while it runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "plugin/packscore/tested_versions.json"
PAGE = ROOT / "docs/install.md"
SHOWN = ("torch", "transformers", "accelerate", "numpy", "jax", "jaxlib", "torchax", "libtpu")
OTHERS = ("sentence-transformers", "peft", "langchain-core", "llama-index-core", "rerankers")
# the core: scores, labels, flows, changes, libraries around it, and programs against torch
CORE = (
    *("tests/scoring", "tests/text", "tests/model", "tests/torch_engine", "tests/flows"),
    *("tests/integrations/test_cross_encoder.py", "tests/integrations/test_pipeline.py"),
    *("tests/integrations/test_adapters.py", "tests/programs/test_program_exactness.py"),
    *("tests/programs/test_plain_calls.py", "tests/programs/test_dense_programs.py"),
    *("tests/programs/test_on_torchax.py", "tests/kernels/test_implementations.py"),
)


@dataclass(frozen=True)
class Set:
    """What an environment is made of.

    Attributes:
      python: "3.11"; it is looked for on PATH.
      pins: requirements that come first, as a user has them before packscore.
      extra: what of packscore is installed.
      marks: pytest's -m.
      tests: what of the suite is run; nothing: all of it.
      left_out: tests of these that these versions cannot pass, and why.
    """

    python: str
    pins: tuple[str, ...] = ()
    extra: str = "test"
    marks: str = "not long and not tpu"
    tests: tuple[str, ...] = CORE
    left_out: dict[str, str] = field(default_factory=dict)


SETS = {
    "oldest": Set(
        "3.11",
        (
            *("torch==2.11.0", "transformers==5.4.0", "accelerate==1.10.0", "numpy==2.0.2"),
            *("jax==0.10.0", "torchax==0.0.13", "sentence-transformers==6.1.0"),
            *("langchain-core==1.0.0", "llama-index-core==0.14.0", "typer==0.20.0"),
        ),
        left_out={
            "tests/programs/test_on_torchax.py::test_one_kind_of_weight_exists_twice_at_a_time": (
                "jax 0.10.0 keeps a constant of 264 bytes, and the test counts every byte"
            ),
            "tests/integrations/test_cross_encoder.py::test_a_compiled_model_runs_as_their_own": (
                "torchax 0.0.13 leaves torch.compile of torch 2.11 with a device that it cannot use"
            ),
        },
    ),
    "newest": Set("3.13"),
    "new torch, old transformers": Set("3.11", ("transformers==5.12.0", "jax==0.10.2")),
    "old torch, new transformers": Set("3.12", ("torch==2.12.0", "jax==0.11.2")),
    "without jax": Set(
        "3.11",
        ("torch==2.13.0", "transformers==5.23.0"),
        "test-torch",
        "not jax and not long and not tpu",
        (),
    ),
}


def main() -> int:
    """Run the sets that are named; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of: {', '.join(SETS)}")
    parser.add_argument("--keep", type=Path, help="a folder that keeps the environments")
    options = parser.parse_args()
    for name in set(options.sets) - set(SETS):
        parser.error(f"no set is named {name!r}; there are {', '.join(SETS)}")
    failed = 0
    for name in options.sets or SETS:
        python = shutil.which(f"python{SETS[name].python}")
        if python is None or not _works(python):
            print(f"{name}: python{SETS[name].python} is not on PATH: not run")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            row = _run(SETS[name], python, (options.keep or Path(scratch)) / name.replace(" ", "_"))
        _write(name, row)
        failed += not row["result"].startswith("passed")
        print(f"{name}: {row['result']}", flush=True)
    print(table(read_rows()))
    return int(failed > 0)


def _works(python: str) -> bool:
    done = subprocess.run([python, "-c", "import venv"], capture_output=True, check=False)
    return done.returncode == 0


def _run(made_of: Set, python: str, folder: Path) -> dict[str, Any]:
    """A row of the table: versions, date, how many tests passed and failed."""
    # nothing of the caller's: its packages, its constraints
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PIP_COMPILE": "0", "HF_HUB_OFFLINE": "1"}
    here = folder / "bin/python"
    pip = [str(here), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    began = time.monotonic()
    subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
    if made_of.pins:
        subprocess.run([*pip, *made_of.pins], env=environment, check=True)
    before = _versions(here)
    subprocess.run([*pip, f"{ROOT}[{made_of.extra}]"], env=environment, check=True)
    versions = _versions(here)
    named = {re.split("==", pin)[0] for pin in made_of.pins}
    moved = {name for name in named if before[name] != versions[name]}
    if moved:  # a user's own would have been taken away
        raise SystemExit(
            f"pip changed {', '.join(sorted(moved))}, which was there before packscore"
        )
    installed_s = time.monotonic() - began
    subprocess.run([here, "-P", "examples/rerank.py"], cwd=ROOT, env=environment, check=True)
    tests = [str(here), "-P", "-m", "pytest", "-m", made_of.marks, "--tb=short", *made_of.tests]
    tests += [f"--deselect={test}" for test in made_of.left_out]
    done = subprocess.run(
        tests, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if failed or done.returncode:
        print(done.stdout)
    kept = {name.replace("-", "_"): versions.get(name) for name in ("python", *SHOWN, *OTHERS)}
    result = f"failed {failed or 1}" if failed or done.returncode else f"passed {counts['passed']}"
    today = datetime.date.today().isoformat()
    return {**kept, "date": today, "result": result, "install_s": round(installed_s)}


def _versions(python: Path) -> dict[str, str]:
    asked = (
        "import json, platform; from importlib.metadata import distributions;"
        "print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): d.version"
        " for d in distributions()} | {'python': platform.python_version()}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", asked], text=True))
    return found


def _write(name: str, row: dict[str, Any]) -> None:
    rows = {found["set"]: found for found in read_rows()}
    rows.pop(name, None)
    if row["result"].startswith("passed"):
        rows[name] = {"set": name, **row}
    ordered = [rows[known] for known in SETS if known in rows]
    TABLE.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    told = PAGE.read_text(encoding="utf-8")
    page = re.sub(r"(?m)^\| set \|.*(\n\|.*)*", lambda _: table(ordered), told)
    PAGE.write_text(page, encoding="utf-8")


def read_rows() -> list[dict[str, Any]]:
    """What passed when it was last run, a row a set."""
    found: list[dict[str, Any]] = json.loads(TABLE.read_text("utf-8")) if TABLE.exists() else []
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of docs/install.md."""
    columns = ("set", "python", "torch", "transformers", "accelerate", "jax", "torchax", "libtpu")
    columns = (*columns, "sentence_transformers", "result", "date")
    lines = [columns, ("---",) * len(columns)]
    lines += [tuple(str(row[column] or "-") for column in columns) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    raise SystemExit(main())
