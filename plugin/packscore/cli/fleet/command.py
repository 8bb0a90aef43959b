"""`--ray`: the driver, which plans the parts, has them made, and says what was done."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packscore.cli import run as running
from packscore.cli.columns import reserved_fields
from packscore.cli.exits import ExitCode, tell
from packscore.cli.fleet.options import RayOptions
from packscore.cli.fleet.work import Job, PartWorker
from packscore.cli.load import check_labels, load, place_for
from packscore.cli.options import ModelOptions
from packscore.files.failures import RunError, UsageError
from packscore.files.folder import (
    MAX_PARTS,
    FolderPlan,
    begin_folder,
    check_empty,
    finish_folder,
)
from packscore.files.locks import locked
from packscore.files.look import ReadOptions
from packscore.files.parts import cut, open_part
from packscore.fleet import run_stage
from packscore.fleet.cluster import LOCAL, address_of, connected


def run_on_ray(
    folder: FolderPlan,
    read: ReadOptions,
    chosen: ModelOptions,
    task: Mapping[str, Any],
    ray: RayOptions,
    *,
    quiet: bool,
) -> ExitCode:
    """Run a command over its input, in parts.

    Args:
      folder: the files of the run.
      read: how the input is read.
      chosen: the model.
      task: the command, one of `tasks.TASKS`, and its own options.
      ray: the cluster and its workers.
      quiet: tell errors alone.

    Raises:
      UsageError, RunError: nothing was run, or it cannot go on; parts that are done stay.
    """
    reserved = reserved_fields(folder.output_format, task["command"])
    with open_part(folder.input, range(0), read, reserved) as entries:
        if not quiet:
            tell(entries.understood)
    chosen = _for_all_machines(chosen, ray)
    settings = _settings(chosen, read, task)
    parts = list(cut(folder.input, read, folder.part_rows, reserved))
    if len(parts) > MAX_PARTS:
        raise UsageError(
            f"--part-rows={folder.part_rows} makes {len(parts):,} parts, and {MAX_PARTS:,} are the "
            "most; pass more rows a part"
        )
    Path(folder.output).mkdir(exist_ok=True)
    with locked([folder.note]):
        check_empty(folder)
        job = Job(folder, read, chosen, dict(task), begin_folder(folder, settings))
        missing = {i: parts[i] for i in range(len(parts)) if not folder.part(i).exists()}
        if not quiet:
            done = len(parts) - len(missing)
            tell(f"{len(parts):,} parts" + (f", {done:,} of them done" if done else ""))
        started = time.perf_counter()
        counts = _make(job, missing, ray, quiet=quiet) if missing else {}
        finish_folder(folder, job.settings, len(parts))
    bad = any(folder.errors(i).exists() for i in range(len(parts)))
    if not quiet:
        counted = "questions" if task["command"] == "decide" else "items"
        _tell_counts(folder, counts, counted, time.perf_counter() - started)
    return ExitCode.BAD_RECORDS if bad else ExitCode.OK


def _for_all_machines(chosen: ModelOptions, ray: RayOptions) -> ModelOptions:
    """The model as every worker finds it: absolute paths, and one device."""
    device = chosen.device
    if device == "auto":
        if address_of(ray.address) != LOCAL:
            raise UsageError(
                "--device=auto: machines of a cluster may choose differently; pass --device cpu, "
                "cuda or tpu"
            )
        device = place_for(device).name
    here = {
        name: os.path.abspath(path)
        for name in ("model", "prompt", "cache_dir")
        if (path := getattr(chosen, name)) is not None and os.path.exists(path)
    }
    return dataclasses.replace(chosen, device=device, **here)


def _settings(chosen: ModelOptions, read: ReadOptions, task: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run on one machine, from the tokenizer and the configuration alone."""
    loaded = load(chosen, weights=False)
    check_labels(task, loaded)
    dtype = loaded.dtype if chosen.dtype == "auto" else chosen.dtype
    loaded = dataclasses.replace(loaded, device=chosen.device, dtype=dtype)
    return running.settings_of(loaded, chosen, read, "parquet", dict(task))


def _make(job: Job, parts: Mapping[int, range], ray: RayOptions, *, quiet: bool) -> dict[str, int]:
    """Have parts made, and add up what workers say of them."""
    total: dict[str, int] = {}
    with connected(ray.address, quiet=quiet) as module:
        workers = ray.workers(job.chosen.device, module.cluster_resources(), len(parts))
        if not quiet:
            tell(f"{job.chosen.model} on {workers.count} workers, {job.chosen.device}")
        ranges = [{"part": i, "start": rows.start, "stop": rows.stop} for i, rows in parts.items()]
        dataset = module.data.from_items(ranges, override_num_blocks=len(ranges))
        made = run_stage(dataset, PartWorker, {"job": job}, workers=workers, batch_size=1)
        try:
            for row in made.iter_rows():
                told = json.loads(row["told"])
                if "failure" in told:
                    raise RunError(told["failure"])
                for name, count in told.items():
                    total[name] = total.get(name, 0) + count
        except KeyboardInterrupt:
            tell(f"what is done is in {job.folder.output}; the same command with --resume goes on")
            raise
        except module.exceptions.RayError as error:
            raise RunError(
                f"a worker cannot go on: {' '.join(str(error).split())[-500:]}; what is done is "
                f"in {job.folder.output}, and the same command with --resume goes on"
            ) from error
    return total


def _tell_counts(
    folder: FolderPlan, counts: Mapping[str, int], counted: str, seconds: float
) -> None:
    if not counts:
        tell(f"{folder.output} is complete; nothing to do")
        return
    tell(
        f"{counts['records']:,} records, {counts['items']:,} {counted} in {seconds:.1f} s, "
        f"{counts['items'] / seconds:,.0f} {counted}/s"
    )
    if counts["truncated"]:
        tell(f"{counts['truncated']:,} items lost their end to the budget (truncated_items)")
    if counts["non_finite"]:
        tell(f"{counts['non_finite']:,} scores are not finite (non_finite_items)")
    if counts["bad"]:
        tell(f"{counts['bad']:,} bad records, by line and reason in {folder.errors(0).parent}")
