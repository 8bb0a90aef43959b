"""Run tpu_notebook.ipynb from top to bottom in a kernel of its own, and store what it printed.

pip install '.[test]' && python examples/run_notebook.py
python examples/run_notebook.py ran.ipynb  # into another file
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("tpu_notebook.ipynb")
TIMEOUT_S = 1800  # a cell; a TPU's programs are compiled in one of them
QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm's, where there are no widgets


def run(path: Path) -> nbformat.NotebookNode:
    """The notebook as it is behind a run in an empty folder.

    Raises:
      CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(
            notebook,
            timeout=TIMEOUT_S,
            kernel_name="python3",
            resources=resources,
            record_timing=False,
            coalesce_streams=True,
        ).execute(env={**os.environ, **QUIET})
    return notebook


def main(target: Path = NOTEBOOK) -> None:
    """Run and store."""
    notebook = run(NOTEBOOK)
    # which Python ran it is nobody's concern
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.validate(notebook)
    nbformat.write(notebook, target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
