"""From what a command was given to its run over files, or to what that would take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from packscore.cli.columns import Shape, reserved_fields
from packscore.cli.exits import ExitCode, tell
from packscore.cli.fleet.options import RayOptions, plan_parts
from packscore.cli.options import ModelOptions
from packscore.files.failures import UsageError
from packscore.files.file_plan import FilePlan, check_free, plan_files
from packscore.files.inputs import Input, open_input
from packscore.files.locks import locked
from packscore.files.look import ReadOptions
from packscore.files.readers import TABLES
from packscore.files.sources import is_stream


@dataclass(frozen=True)
class Paths:
    """The files that a command names, and what to do with those that are there."""

    input: str
    output: str
    errors: Path | None
    input_format: str | None
    output_format: str | None
    resume: bool
    overwrite: bool


def run_command(
    paths: Paths,
    read: ReadOptions,
    chosen: ModelOptions,
    task: Mapping[str, Any],
    on_ray: RayOptions | None,
    *,
    dry_run: bool,
    quiet: bool,
    price_per_hour: float | None,
) -> ExitCode:
    """Run a command over its input, here or by the workers of a cluster.

    Raises:
      UsageError, RunError: nothing was run, or it cannot go on.
    """
    if on_ray is not None:
        of_a_plan = {"--dry-run": dry_run, "--price-per-hour": price_per_hour is not None}
        for option, given in of_a_plan.items():
            if given:
                raise UsageError(
                    f"{option} is for a plan of one machine: leave --ray out, and name a file"
                )
        formats = (paths.input_format, paths.output_format)
        folder = plan_parts(
            *(on_ray, paths.input, paths.output, paths.errors, *formats),
            resume=paths.resume,
            overwrite=paths.overwrite,
        )
        # imported here: it brings torch
        from packscore.cli.fleet.command import run_on_ray

        return run_on_ray(folder, read, chosen, task, on_ray, quiet=quiet)
    files = plan_files(
        *(paths.input, paths.output, paths.errors, paths.input_format, paths.output_format),
        resume=paths.resume,
        overwrite=paths.overwrite,
    )
    if task["command"] == "decide" and files.output_format in TABLES:
        raise UsageError(
            f"--output={paths.output}: decisions are written as jsonl or parquet, not as "
            f"{files.output_format}; name a .jsonl, .jsonl.gz or .parquet file"
        )
    return run_over_files(
        files, read, chosen, task, dry_run=dry_run, quiet=quiet, price_per_hour=price_per_hour
    )


def run_over_files(
    files: FilePlan,
    read: ReadOptions,
    chosen: ModelOptions,
    task: Mapping[str, Any],
    *,
    dry_run: bool,
    quiet: bool,
    price_per_hour: float | None = None,
) -> ExitCode:
    """Run a command over its input.

    Args:
      files: of the run.
      read: how the input is read.
      chosen: the model.
      task: the command, one of `tasks.TASKS`, and its own options.
      dry_run: count only.
      quiet: tell errors alone.
      price_per_hour: of the machine, for what is told of the cost.

    Raises:
      UsageError, RunError: nothing was run, or it cannot go on.
    """
    if price_per_hour is not None and not math.isfinite(price_per_hour):
        raise UsageError(f"--price-per-hour={price_per_hour} must be a number, 0 or more")
    reserved = reserved_fields(files.output_format, task["command"])
    with open_input(files.input, files.input_format, read, reserved) as entries:
        if not quiet:
            tell(entries.understood)
        if not dry_run:
            with locked(files.written):
                check_free(files)
                return _run_open(files, read, entries, chosen, task, quiet, price_per_hour)
        return _count(entries, chosen, task)


def _options(task: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in task.items() if name != "command"}


def _count(entries: Input, chosen: ModelOptions, task: Mapping[str, Any]) -> ExitCode:
    from packscore.cli import tasks
    from packscore.cli.load import check_labels, load
    from packscore.cli.plan import make_plan

    loaded = load(chosen, weights=False)
    check_labels(task, loaded)
    made = tasks.TASKS[task["command"]](loaded.scorer, **_options(task))
    plan = make_plan(entries, made)
    typer.echo(plan.table())
    return ExitCode.BAD_RECORDS if plan.bad_records else ExitCode.OK


def _run_open(
    files: FilePlan,
    read: ReadOptions,
    entries: Input,
    chosen: ModelOptions,
    task: Mapping[str, Any],
    quiet: bool,
    price_per_hour: float | None,
) -> ExitCode:
    from packscore.cli import run as running
    from packscore.cli import tasks
    from packscore.cli.load import check_labels, load
    from packscore.cli.plan import foretold

    loaded = load(chosen)
    check_labels(task, loaded)
    if not quiet:
        tell(f"{chosen.model} on {loaded.device} in {loaded.dtype}")
    made = tasks.TASKS[task["command"]](loaded.scorer, **_options(task))
    settings = running.settings_of(loaded, chosen, read, files.input_format, dict(task))
    holder = getattr(read.names, "query", "state")
    shape = Shape(holder, task["command"], loaded.label_names, entries.rows)

    def foretell() -> None:
        if not quiet and not is_stream(files.input):
            tell(f"plan: {foretold(files.input, entries, made, loaded.scorer, price_per_hour)}")

    code = running.run_file(
        files, entries, made, settings, shape,
        quiet=quiet, foretell=foretell, price_per_hour=price_per_hour,
    )  # fmt: skip
    if not quiet:
        loaded.cache.tell_new()
    return code
