"""From what a command was given to its run over files, or to what that would take."""

from __future__ import annotations

import math
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
from packscore.files.sources import is_stream

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
    from packscore.cli.load import load
    from packscore.cli.plan import make_plan

    loaded = load(chosen, weights=False)
    _check_labels(task, loaded)
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
    from packscore.cli.load import load
    from packscore.cli.plan import foretold

    loaded = load(chosen)
    _check_labels(task, loaded)
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


def _check_labels(task: Mapping[str, Any], loaded: Loaded) -> None:
    names = loaded.label_names
    if task["command"] == "rank" and len(names) != loaded.num_ranked:
        wants = (
            "compares two labels, (negative, positive)," if loaded.num_ranked == 2 else "reads one"
        )
        raise UsageError(f"rank {wants} and not {names}")
