"""`packscore decide`: what it takes beside the other commands, and one state with bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packscore.cli import options as opt
from packscore.cli.exits import exit_codes
from packscore.cli.fleet import options as ray_opt
from packscore.cli.options import ModelOptions
from packscore.cli.start import Paths, run_command
from packscore.files.failures import UsageError
from packscore.files.look import ReadOptions
from packscore.files.readers import delimiter_from
from packscore.files.states import StateFields

if TYPE_CHECKING:
    from packscore import Decision

FORMATS = ("systemone", "decisions")
BAR_WIDTH = 24


def decide(
    model: opt.Model,
    input: Annotated[
        str | None,
        typer.Argument(
            help="A file of states, as rank takes one of queries; - is stdin. Or --state.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="The .jsonl, .jsonl.gz or .parquet file to write; - is stdout."
        ),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(help="One state instead of a file, as text; - reads it from stdin."),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(
            help="A JSON file of questions for all states: an object (System One) or a list "
            "(OpenAI); default: each line has its own.",
            show_default=False,
        ),
    ] = None,
    permutations: Annotated[
        int, typer.Option(min=1, help="Orders of its options in which a question is asked.")
    ] = 1,
    body: Annotated[
        str, typer.Option("--format", help="Shape of what is written: systemone or decisions.")
    ] = "systemone",
    as_json: Annotated[
        bool, typer.Option("--json", help="With --state: print the body, not bars.")
    ] = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    cache_dir: opt.CacheDir = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Budget of the state and one question, in tokens.")
    ] = None,
    input_format: Annotated[
        str | None, typer.Option(help="jsonl, csv, tsv or parquet; default: by the suffix.")
    ] = None,
    state_field: Annotated[
        str, typer.Option(help="Field or column of the state; a.b is b inside a.")
    ] = "state",
    questions_field: Annotated[
        str, typer.Option(help="Field or column of the questions.")
    ] = "questions",
    delimiter: opt.Delimiter = None,
    errors: opt.Errors = None,
    resume: opt.Resume = False,
    overwrite: opt.Overwrite = False,
    max_line_bytes: opt.MaxLineBytes = opt.DEFAULT_MAX_LINE_BYTES,
    ray: ray_opt.Ray = False,
    ray_address: ray_opt.RayAddress = None,
    workers: ray_opt.NumWorkers = None,
    worker_resources: ray_opt.WorkerResources = None,
    part_rows: ray_opt.PartRows = None,
    dry_run: opt.DryRun = False,
    price: opt.Price = None,
    quiet: opt.Quiet = False,
) -> None:
    """Answer typed questions about every state, with a probability for each option."""
    with exit_codes():
        chosen = model_options(model, revision, device, dtype, max_tokens, cache_dir)
        given = None if questions is None else read_file(questions)
        asked = task(permutations, body)
        if state is not None:
            of_files: dict[str, object] = {"INPUT": input, "--output": output, "--errors": errors}
            of_files |= {"--resume": resume, "--overwrite": overwrite, "--dry-run": dry_run}
            of_files |= {"--ray": ray, "--price-per-hour": price is not None}
            check_one(of_files, given)
            decide_one(state, given, chosen, asked, as_json=as_json)
            return
        on_ray = ray_opt.ray_options(ray, ray_address, workers, worker_resources, part_rows)
        paths = paths_of(input, output, errors, input_format, as_json, resume, overwrite)
        read = read_options(state_field, questions_field, given, max_line_bytes, delimiter)
        code = run_command(
            paths, read, chosen, asked, on_ray, dry_run=dry_run, quiet=quiet, price_per_hour=price
        )
    raise typer.Exit(code)


def model_options(
    model: str,
    revision: str | None,
    device: str,
    dtype: str,
    max_tokens: int | None,
    cache_dir: str | None,
) -> ModelOptions:
    """The model; questions bring their own prompt and labels, and nothing of them is cut."""
    return ModelOptions(
        model, revision, device, dtype, "plain", None, None, None, max_tokens, "error",
        cache_dir=cache_dir, reads_labels=False,
    )  # fmt: skip


def task(permutations: int, body: str) -> dict[str, Any]:
    """The command and its own options.

    Raises:
      UsageError: there is no such body.
    """
    if body not in FORMATS:
        raise UsageError(
            f"--format={body!r} must be one of {', '.join(FORMATS)}; a file's own format is "
            "--input-format"
        )
    return {"command": "decide", "permutations": permutations, "body": body}


def read_file(path: str) -> Any:
    """Questions from a JSON file, all of them checked.

    Raises:
      UsageError: it cannot be read.
      InputError, InputTypeError: a question is malformed.
    """
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--questions={path} cannot be read as JSON: {error}") from error
    # imported here: what checks questions brings numpy and torch
    from packscore.decisions.reading import read_decisions, read_questions

    (read_decisions if isinstance(given, list) else read_questions)(given)
    return given


def paths_of(
    input_path: str | None,
    output_path: str | None,
    errors: Path | None,
    input_format: str | None,
    as_json: bool,
    resume: bool,
    overwrite: bool,
) -> Paths:
    """The files of a run over many states.

    Raises:
      UsageError: one is missing or does not fit.
    """
    if input_path is None or output_path is None:
        raise UsageError("decide needs INPUT and --output, or one --state with --questions")
    if as_json:
        raise UsageError("--json prints the body of one --state; a file is written as JSON anyway")
    return Paths(input_path, output_path, errors, input_format, None, resume, overwrite)


def read_options(
    state_field: str,
    questions_field: str,
    given: Any,
    max_line_bytes: int,
    delimiter: str | None,
) -> ReadOptions:
    """How the input is read."""
    names = StateFields(state_field, questions_field, given)
    between = None if delimiter is None else delimiter_from(delimiter)
    return ReadOptions(names, max_line_bytes, between)


def check_one(files: Mapping[str, Any], given: Any) -> None:
    """Refuse what does not go with one state.

    Raises:
      UsageError: naming it.
    """
    for name, value in files.items():
        if value:
            raise UsageError(f"--state is one state, and {name} is for a file of them; pass one")
    if given is None:
        raise UsageError("--state needs --questions, a JSON file of what is asked about it")


def decide_one(
    state: str, given: Any, chosen: ModelOptions, task: Mapping[str, Any], *, as_json: bool
) -> None:
    """Print the answers about one state: bars, or the body as JSON."""
    from packscore.cli.load import load
    from packscore.cli.tasks import BODIES

    text = typer.get_text_stream("stdin").read() if state == "-" else state
    found = load(chosen).scorer.decide(text, given, permutations=task["permutations"])
    if as_json:
        typer.echo(json.dumps(BODIES[task["body"]](found), ensure_ascii=False, indent=2))
    else:
        print_bars(found)


def print_bars(decision: Decision) -> None:
    """Every answer as a line, and a bar for each of its options."""
    from rich.bar import Bar
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from packscore import ChoiceAnswer, NoulAnswer
    from packscore.decisions.questions import Level

    table = Table.grid(padding=(0, 2))
    for name, answer in decision.answers.items():
        if isinstance(answer, NoulAnswer):
            said, rows = f"{answer.noul:.3f}", {"yes": answer.noul, "no": 1 - answer.noul}
        elif isinstance(answer, ChoiceAnswer):
            said, rows = (
                _text(answer.choice),
                {_text(k): p for k, p in answer.probabilities.items()},
            )
        else:
            said = f"{answer.score:.3f} of {len(answer.legend) - 1}"
            levels = (x.label if isinstance(x, Level) else x for x in answer.legend.values())
            rows = dict(zip(map(_text, levels), answer.probabilities.values(), strict=True))
        table.add_row(Text(_text(name), "bold"), Text(said, "bold"))
        for option, p in rows.items():
            bar = Bar(1, 0, p, width=BAR_WIDTH, color="cyan")
            table.add_row(Text(f"  {option}"), Text(f"{p:.3f}"), bar)
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    usage = decision.usage
    console.print(f"{usage.input_tokens:,} tokens, {decision.model}", style="dim")


def _text(value: Any) -> str:
    """Text that moves no cursor: what is no string is JSON, and so is what is not printable."""
    plain = isinstance(value, str) and value.isprintable()
    return value if plain else json.dumps(value, ensure_ascii=True)
