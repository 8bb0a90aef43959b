"""Peak memory of `packscore rank in.parquet -o out.parquet` as files grow.

    python benchmarks/offline_memory.py --shape rows --rows 100000 1000000
    python benchmarks/offline_memory.py --shape queries lists --rows 100000 1000000 --without-model

Every input is one row group, the worst that a writer can make. The model is the shipped one, under
a prompt of a few tokens, so that a million rows of few queries take minutes; `--without-model`
loads it too, and writes made-up scores, for what files alone take. A result is replaced by a later
one of its kind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

import provenance
from packscore import MultiItemScorer, Usage, shipped_model_path
from packscore.cli import tasks
from packscore.cli.app import app
from packscore.files.records import Record

PROMPT = {"prefix": "{query}:", "item": " {item}", "suffix": ""}
WORDS = ("open", "read", "write", "close", "list", "sort", "copy", "move", "tree", "file")
# By shape: rows of a query, and items of a row; None: a row has one text instead of a list.
SHAPES: dict[str, tuple[int, int | None]] = {
    "rows": (500, None),
    "queries": (20, None),
    "lists": (1, 5),
}
RESULTS = provenance.HERE / "results" / "offline_memory.json"


def text(i: int) -> str:
    """A short one, of a thousand."""
    return f"{WORDS[i % 10]} {i % 100}"


def write_input(path: Path, shape: str, num_rows: int) -> None:
    """One row group."""
    per_query, num_items = SHAPES[shape]
    rows = range(num_rows)
    columns: dict[str, Any] = {"key": list(rows)}
    columns["query"] = [f"{WORDS[i // per_query % 10]} {i // per_query}" for i in rows]
    if num_items is None:
        columns["item"] = [text(7 * i) for i in rows]
    else:
        columns["items"] = [[text(7 * i + j) for j in range(num_items)] for i in rows]
    parquet.write_table(pa.table(columns), path, row_group_size=num_rows)


def run(command: Sequence[str], folder: Path) -> tuple[int, float]:
    """Run a command; its peak resident bytes and its seconds of processor."""
    # one thread: on a machine that others use, two wait for each other
    process = subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def without_model(words: list[str]) -> None:
    """The command, with made-up scores."""
    usage = Usage(1, 1, 0, 0, 0, (), (), "packed", "segment")

    def made_up(scorer: MultiItemScorer, **options: Any) -> tasks.Task:
        def run(record: Record) -> tuple[dict[str, Any], Usage]:
            entries = [{"corpus_id": i, "score": 1 / (record.line + i)} for i in range(record.size)]
            return {"ranking": entries}, usage

        return tasks.Task(run, tasks.rank_task(scorer, **options).encode)

    tasks.TASKS["rank"] = made_up
    app(words)


def measured(shape: str, num_rows: int, folder: Path, *, with_model: bool) -> dict[str, Any]:
    """One run over one input."""
    source, output = folder / "in.parquet", folder / "out.parquet"
    # apart: what this process once had would count as the peak of those that it starts
    writer = multiprocessing.get_context("spawn").Process(
        target=write_input, args=(source, shape, num_rows)
    )
    writer.start()
    writer.join()
    (folder / "prompt.json").write_text(json.dumps(PROMPT))
    start = ["-m", "packscore"] if with_model else [str(Path(__file__).resolve()), "--made-up"]
    command = [sys.executable, *start, "rank", source.name, "-o", output.name]
    command += ["-m", str(shipped_model_path()), "--device", "cpu", "--overwrite"]
    command += ["--prompt", "prompt.json", "--labels", "no,yes"]
    peak, seconds = run(command, folder)
    found = parquet.ParquetFile(output).metadata
    return {
        "shape": shape,
        "with_model": with_model,
        "rows": num_rows,
        "peak_rss_bytes": peak,
        "cpu_seconds": round(seconds, 1),
        "output_rows": found.num_rows,
        "output_row_groups": found.num_row_groups,
        "input_bytes": source.stat().st_size,
        "output_bytes": output.stat().st_size,
    }


def keep(result: dict[str, Any], path: Path, command: str) -> None:
    """Put a result among those that are there, with where it comes from."""
    packages = ("torch", "transformers", "pyarrow")
    result = {**result, "made": provenance.made(command, *packages)}
    found = json.loads(path.read_text()) if path.exists() else []
    key = ("shape", "with_model", "rows")
    found = [one for one in found if any(one[name] != result[name] for name in key)]
    found = sorted([*found, result], key=lambda one: [one[name] for name in key])
    path.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Measure the shapes and rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--without-model", action="store_true", help="Make scores up.")
    parser.add_argument("--json", type=Path, default=RESULTS, help="The file of results.")
    options = parser.parse_args()
    command = f"python benchmarks/{Path(__file__).name} {' '.join(sys.argv[1:])}".strip()
    for shape in options.shape:
        for num_rows in options.rows:
            with tempfile.TemporaryDirectory() as folder:
                result = measured(
                    shape, num_rows, Path(folder), with_model=not options.without_model
                )
            keep(result, options.json, command)
            print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--made-up"]:
        without_model(sys.argv[2:])
    main()
