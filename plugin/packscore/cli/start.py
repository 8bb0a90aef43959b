"""From what a command was given to its run over files, or to what that would take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from packscore.cli.columns import Shape, reserved_fields
from packscore.cli.exits import ExitCode, tell
from packscore.cli.options import ModelOptions
from packscore.files.failures import UsageError
from packscore.files.file_plan import FilePlan, check_free
from packscore.files.inputs import Input, open_input
from packscore.files.locks import locked
from packscore.files.look import ReadOptions

if TYPE_CHECKING:
    from packscore.cli.load import Loaded


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
    from packscore.cli.load import load

    loaded = load(chosen, weights=False)
    _check_labels(task, loaded)
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
    from packscore.cli.load import load

    loaded = load(chosen)
    _check_labels(task, loaded)
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


def _check_labels(task: Mapping[str, Any], loaded: Loaded) -> None:
    names = loaded.label_names
    if task["command"] == "rank" and len(names) != loaded.num_ranked:
        wants = (
            "compares two labels, (negative, positive)," if loaded.num_ranked == 2 else "reads one"
        )
        raise UsageError(f"rank {wants} and not {names}")
