"""`packscore score | rank | decide | serve | verify | doctor | warmup | selftest`."""

from __future__ import annotations

from typing import Annotated

import typer

import packscore
from packscore.cli import options as opt
from packscore.cli.decide import decide
from packscore.cli.exits import ExitCode, exit_codes
from packscore.cli.fleet import options as ray_opt
from packscore.cli.serve import ENVIRONMENT, serve
from packscore.cli.start import Paths, run_command
from packscore.files.failures import UsageError

app = typer.Typer(
    name="packscore",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Score many items against one query, exactly, with the query computed once.",
    epilog="Exit codes: 0 all good, 1 failure, 2 usage error, 3 some records were bad, "
    "130 interrupted.",
)


def main() -> None:
    """The console script."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(packscore.__version__)
        raise typer.Exit


@app.callback()
def _packscore(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    pass


@app.command()
def score(
    input: opt.Input,
    output: opt.Output,
    model: opt.Model,
    prompt: opt.Prompt = "qwen3-reranker",
    instruction: opt.Instruction = None,
    labels: opt.Labels = None,
    label_token_ids: opt.LabelTokenIds = None,
    apply_softmax: Annotated[
        bool, typer.Option("--apply-softmax", help="Softmax over the labels, not the vocabulary.")
    ] = False,
    return_items: Annotated[
        bool, typer.Option("--return-items", help="Copy the items to the output.")
    ] = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    cache_dir: opt.CacheDir = None,
    max_tokens: opt.MaxTokens = None,
    on_long: opt.OnLong = "truncate",
    on_non_finite: opt.OnNonFinite = "raise",
    input_format: opt.InputFormat = None,
    output_format: opt.OutputFormat = None,
    query_field: opt.QueryField = "query",
    items_field: opt.ItemsField = None,
    id_field: opt.IdField = None,
    delimiter: opt.Delimiter = None,
    group: opt.Group = None,
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
    """Write P(label) for every item of every record."""
    task = {"command": "score", "apply_softmax": apply_softmax, "return_items": return_items}
    with exit_codes():
        chosen = opt.ModelOptions(
            model,
            revision,
            device,
            dtype,
            prompt,
            instruction,
            opt.split_labels(labels),
            opt.split_ids(label_token_ids),
            max_tokens,
            on_long,
            on_non_finite,
            cache_dir=cache_dir,
        )
        read = opt.read_options(
            query_field, items_field, id_field, max_line_bytes, delimiter, group
        )
        paths = Paths(input, output, errors, input_format, output_format, resume, overwrite)
        on_ray = ray_opt.ray_options(ray, ray_address, workers, worker_resources, part_rows)
        code = run_command(
            paths, read, chosen, task, on_ray, dry_run=dry_run, quiet=quiet, price_per_hour=price
        )
    raise typer.Exit(code)


@app.command()
def rank(
    input: opt.Input,
    output: opt.Output,
    model: opt.Model,
    top_k: Annotated[int | None, typer.Option(min=1, help="Keep so many; default: all.")] = None,
    return_documents: Annotated[
        bool, typer.Option("--return-documents", help="Put each document into its entry.")
    ] = False,
    prompt: opt.Prompt = "qwen3-reranker",
    instruction: opt.Instruction = None,
    labels: opt.Labels = None,
    label_token_ids: opt.LabelTokenIds = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    cache_dir: opt.CacheDir = None,
    max_tokens: opt.MaxTokens = None,
    on_long: opt.OnLong = "truncate",
    on_non_finite: opt.OnNonFinite = "raise",
    input_format: opt.InputFormat = None,
    output_format: opt.OutputFormat = None,
    query_field: opt.QueryField = "query",
    items_field: opt.ItemsField = None,
    id_field: opt.IdField = None,
    delimiter: opt.Delimiter = None,
    group: opt.Group = None,
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
    """Write every record's documents by their score, best first."""
    task = {"command": "rank", "top_k": top_k, "return_documents": return_documents}
    with exit_codes():
        chosen = opt.ModelOptions(
            model,
            revision,
            device,
            dtype,
            prompt,
            instruction,
            opt.split_labels(labels),
            opt.split_ids(label_token_ids),
            max_tokens,
            on_long,
            on_non_finite,
            cache_dir=cache_dir,
        )
        read = opt.read_options(
            query_field, items_field, id_field, max_line_bytes, delimiter, group, once=True
        )
        paths = Paths(input, output, errors, input_format, output_format, resume, overwrite)
        on_ray = ray_opt.ray_options(ray, ray_address, workers, worker_resources, part_rows)
        code = run_command(
            paths, read, chosen, task, on_ray, dry_run=dry_run, quiet=quiet, price_per_hour=price
        )
    raise typer.Exit(code)


app.command()(decide)
app.command(context_settings=ENVIRONMENT)(serve)


@app.command()
def verify(
    input: opt.Input,
    model: opt.Model,
    limit: Annotated[int, typer.Option(min=1, help="Check so many records.")] = 20,
    prompt: opt.Prompt = "qwen3-reranker",
    instruction: opt.Instruction = None,
    labels: opt.Labels = None,
    label_token_ids: opt.LabelTokenIds = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    cache_dir: opt.CacheDir = None,
    max_tokens: opt.MaxTokens = None,
    on_long: opt.OnLong = "truncate",
    input_format: opt.InputFormat = None,
    query_field: opt.QueryField = "query",
    items_field: opt.ItemsField = None,
    id_field: opt.IdField = None,
    delimiter: opt.Delimiter = None,
    max_line_bytes: opt.MaxLineBytes = opt.DEFAULT_MAX_LINE_BYTES,
) -> None:
    """Compare packed scores with the unpacked model's, on your own records."""
    with exit_codes():
        chosen = opt.ModelOptions(
            model,
            revision,
            device,
            dtype,
            prompt,
            instruction,
            opt.split_labels(labels),
            opt.split_ids(label_token_ids),
            max_tokens,
            on_long,
            cache_dir=cache_dir,
        )
        read = opt.read_options(query_field, items_field, id_field, max_line_bytes, delimiter, None)
        from packscore.cli.verify import verify_file

        code = verify_file(input, input_format, read, chosen, limit)
    raise typer.Exit(code)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices, what will run where, and what is wrong."""
    with exit_codes():
        from packscore.cli.doctor import examine

        found = examine()
        typer.echo(found.json() if as_json else found.text())
    raise typer.Exit(ExitCode.FAILURE if found.problems else ExitCode.OK)


@app.command()
def warmup(
    model: opt.Model,
    device: Annotated[str, typer.Option(help="tpu or jax.")] = "jax",
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the largest request, all of its items together.")
    ] = 4096,
    num_labels: Annotated[int, typer.Option(min=1, help="Labels of a request.")] = 2,
    cache_dir: opt.CacheDir = None,
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    quiet: opt.Quiet = False,
) -> None:
    """Compile the programs of a model ahead of time."""
    with exit_codes():
        if device not in ("tpu", "jax"):
            raise UsageError(f"--device={device!r} must be tpu or jax: torch compiles nothing")
        from packscore.cli.warmup import warm_up

        warm_up(model, revision, device, dtype, max_tokens, num_labels, cache_dir, quiet=quiet)


@app.command()
def selftest(
    device: Annotated[
        str, typer.Option(help="auto, tpu, cuda, mps, cpu (torch and programs) or jax (programs).")
    ] = "auto",
    ab: Annotated[bool, typer.Option("--ab", help="Time the dense mask too: four cells.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Hub name or folder of what is timed; default: Qwen3-0.6B's shape, random.",
        ),
    ] = None,
    dtype: opt.Dtype = "auto",
    query: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the query that is timed.")
    ] = None,
    items: Annotated[
        str | None, typer.Option(help="Its items and their tokens, such as 500x20.")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=1, help="Runs of each way that are not timed.")
    ] = None,
    runs: Annotated[int | None, typer.Option(min=1, help="Runs of each way that are.")] = None,
    output: Annotated[
        str, typer.Option("--json", help="The file to write; - is stdout, without the text.")
    ] = "packscore-selftest.json",
) -> None:
    """Check every way to score against eager torch, and time a request, part by part."""
    with exit_codes():
        from packscore.cli.selftest import selftest as run_selftest

        code = run_selftest(
            device=device,
            model=model,
            dtype=dtype,
            query=query,
            items=items,
            warmup=warmup,
            runs=runs,
            ab=ab,
            output=output,
        )
    raise typer.Exit(code)
