"""Ask `packscore serve` with every client there is, in an environment of its own.

    python tests/clients/run.py             # some 2 GB while it runs
    python tests/clients/run.py --record    # and keep what they sent, in recorded/

For each client it says whether the scores that it hands its user are those of the scorer without
a server; then JevBench's laws over HTTP, schemathesis over the OpenAPI schema, and the page in a
browser, if `chromium` is on PATH. What they sent is asked of the app again by
tests/serve/test_recorded.py, which needs none of them.

Left out, as of 26 November 2026: langchain-huggingface 1.2.3 has no client for rerankers (its
packages of Text Embeddings Inference are for embeddings), pip finds no langchain-jina, and vLLM's
and SGLang's own clients are `requests.post`, which docs/serve.md shows with curl.
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
# one environment cannot have it and langchain-cohere as pip sees it; nothing else of ours uses it
NEWEST_COHERE = "cohere==7.3.1"


def main() -> int:
    """Make the environment and run the checks; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--keep", type=Path, help="a folder that keeps the environment")
    options, passed_on = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        python = _environment(options.keep or Path(scratch) / "venv")
        failed = _check(python, passed_on)
        _pip(python, NEWEST_COHERE)
        failed += _check(python, ["--only", "cohere_"])
    return int(failed > 0)


def _environment(folder: Path) -> Path:
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # with the suite's own torch, which comes without CUDA
    pins = ["--constraint", str(ROOT / "tests/versions/ci.txt")]
    _pip(python, *pins, f"{ROOT}[serve]", "--requirement", str(HERE / "requirements.txt"))
    return python


def _pip(python: Path, *what: str) -> None:
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *what], check=True)


def _check(python: Path, options: list[str]) -> int:
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "benchmarks")])
    command = [str(python), "-P", "-m", "clients.check", *options]
    offline = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    environment = {**os.environ, "PYTHONPATH": paths, **offline}
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
