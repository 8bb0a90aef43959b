"""From what a command was given to its run over files, or to what that would take."""

from __future__ import annotations

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
) -> ExitCode:
    """Run a command over its input, here or by the workers of a cluster.

    Raises:
      UsageError, RunError: nothing was run, or it cannot go on.
    """
    how = {"resume": paths.resume, "overwrite": paths.overwrite}
    if on_ray is not None:
        if dry_run:
            raise UsageError("--dry-run counts on this machine; leave --ray out, and name a file")
        formats = (paths.input_format, paths.output_format)
        folder = plan_parts(on_ray, paths.input, paths.output, paths.errors, *formats, **how)
        # imported here: it brings torch
        from packscore.cli.fleet.command import run_on_ray

        return run_on_ray(folder, read, chosen, task, on_ray, quiet=quiet)
    files = plan_files(
        paths.input, paths.output, paths.errors, paths.input_format, paths.output_format, **how
    )
    if task["command"] == "decide" and files.output_format in TABLES:
        raise UsageError(
            f"--output={paths.output}: decisions are written as jsonl or parquet, not as "
            f"{files.output_format}; name a .jsonl, .jsonl.gz or .parquet file"
        )
    return run_over_files(files, read, chosen, task, dry_run=dry_run, quiet=quiet)


def run_over_files(
    files: FilePlan,
    read: ReadOptions,
    chosen: ModelOptions,
    task: Mapping[str, Any],
    *,
    dry_run: bool,
    quiet: bool,
) -> ExitCode:
    """Run a command over its input.

    Args:
      files: of the run.
      read: how the input is read.
      chosen: the model.
      task: the command, one of `tasks.TASKS`, and its own options.
      dry_run: count only.
      quiet: tell errors alone.

    Raises:
      UsageError, RunError: nothing was run, or it cannot go on.
    """
    reserved = reserved_fields(files.output_format, task["command"])
    with open_input(files.input, files.input_format, read, reserved) as entries:
        if not quiet:
            tell(entries.understood)
        if not dry_run:
            with locked(files.written):
                check_free(files)
                return _run_open(files, read, entries, chosen, task, quiet=quiet)
        return _count(entries, chosen, task)


def _options(task: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in task.items() if name != "command"}


def _count(entries: Input, chosen: ModelOptions, task: Mapping[str, Any]) -> ExitCode:
    from packscore.cli import tasks
    from packscore.cli.dry_run import make_plan
    from packscore.cli.load import check_labels, load

    loaded = load(chosen, weights=False)
    check_labels(task, loaded)
    made = tasks.TASKS[task["command"]](loaded.scorer, **_options(task))
    plan = make_plan(entries, made)
    typer.echo(plan.text())
    return ExitCode.BAD_RECORDS if plan.bad_records else ExitCode.OK


def _run_open(
    files: FilePlan,
    read: ReadOptions,
    entries: Input,
    chosen: ModelOptions,
    task: Mapping[str, Any],
    *,
    quiet: bool,
) -> ExitCode:
    from packscore.cli import run as running
    from packscore.cli import tasks
    from packscore.cli.load import check_labels, load

    loaded = load(chosen)
    check_labels(task, loaded)
    if not quiet:
        tell(f"{chosen.model} on {loaded.device} in {loaded.dtype}")
    made = tasks.TASKS[task["command"]](loaded.scorer, **_options(task))
    settings = running.settings_of(loaded, chosen, read, files.input_format, dict(task))
    holder = getattr(read.names, "query", "state")
    shape = Shape(holder, task["command"], loaded.label_names, entries.rows)
    code = running.run_file(files, entries, made, settings, shape, quiet=quiet)
    if not quiet:
        loaded.cache.tell_new()
    return code
