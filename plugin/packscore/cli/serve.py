"""`packscore serve`: models by name behind every client's endpoint."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from packscore.cli import options as opt
from packscore.cli.exits import exit_codes, tell
from packscore.files.failures import RunError, UsageError

if TYPE_CHECKING:
    from packscore import MultiItemScorer

# every option is also PACKSCORE_SERVE_ and its name, lists with blanks between
ENVIRONMENT = {"auto_envvar_prefix": "PACKSCORE_SERVE"}


def serve(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            help="Hub name or folder of a model, or NAME=MODEL for the name clients call it by; "
            "several: the first answers requests that name none.",
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of a LoRA adapter of the first model, served beside it."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one, and prints it.")
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=["PACKSCORE_API_KEY", "PACKSCORE_SERVE_API_KEY"],
            show_envvar=True,
            help="A key that requests must carry; several may be. Others can read a command line: "
            "use the environment.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask from a browser.")
    ] = None,
    prompt: opt.Prompt = "qwen3-reranker",
    instruction: opt.Instruction = None,
    labels: opt.Labels = None,
    device: opt.Device = "auto",
    mesh: opt.Mesh = None,
    dtype: opt.Dtype = "auto",
    revision: opt.Revision = None,
    cache_dir: opt.CacheDir = None,
    max_tokens: opt.MaxTokens = None,
    on_long: opt.OnLong = "truncate",
    prefix_cache_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes of pages that queries may stay in.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request.")] = 8 * 2**20,
    max_items: Annotated[int, typer.Option(min=1, help="Of a request.")] = 10_000,
    max_questions: Annotated[int, typer.Option(min=1, help="Of a request.")] = 400,
    max_request_tokens: Annotated[
        int, typer.Option(min=1, help="Of a request, its items together.")
    ] = 1_000_000,
    timeout_seconds: Annotated[
        float, typer.Option(min=0.001, help="After which a request is given up.")
    ] = 300.0,
    queue_requests: Annotated[int, typer.Option(min=1, help="That may wait.")] = 1024,
    queue_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of items, that may wait; default: about a million.")
    ] = None,
    window_seconds: Annotated[
        float, typer.Option(min=0, help="How long a first request waits for others.")
    ] = 0.003,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, help="How long a server that stops tells so before it is gone."),
    ] = 1.0,
    quiet: opt.Quiet = False,
) -> None:
    """Serve models over HTTP, to the clients of Cohere, Jina, TEI, vLLM, SGLang and others."""
    with exit_codes():
        chosen = opt.ModelOptions(
            model="",
            revision=revision,
            device=device,
            mesh=mesh,
            dtype=dtype,
            prompt=prompt,
            instruction=instruction,
            labels=opt.split_labels(labels),
            label_token_ids=None,
            max_tokens=max_tokens,
            on_long=on_long,
            cache_dir=cache_dir,
            reads_labels=False,
            prefix_cache_bytes=prefix_cache_bytes,
        )
        models, adapters = _named(model), _named(adapter or [], "--adapter")
        twice = sorted(set(models) & set(adapters))
        if twice:
            raise UsageError(f"--adapter {twice[0]} has the name of a --model; name it else")
        for key in api_key or ():
            if not key.strip():
                raise UsageError("--api-key is empty; leave it out, or pass a key")
        try:
            from packscore import serve as serving
            from packscore.serve.server import Server, bind, log_to_stderr
        except ImportError as error:
            raise UsageError(str(error)) from error
        limits = serving.Limits(
            max_body_bytes=max_body_bytes,
            max_items=max_items,
            max_questions=max_questions,
            timeout_seconds=timeout_seconds,
        )
        try:
            listener = bind(host, port)
        except OSError as error:
            raise UsageError(f"--host={host} --port={port}: {error.strerror}") from error
        scorers = _load(models, adapters, chosen)
        for scorer in scorers.values():
            scorer.start_batcher(
                max_requests=queue_requests,
                max_tokens=queue_tokens,
                window_seconds=window_seconds,
                max_request_tokens=max_request_tokens,
            )
        app = serving.create_app(
            scorers, limits=limits, api_keys=api_key or (), cors_origins=cors_origin or ()
        )
        log_to_stderr(quiet=quiet)
        place = f"[{host}]" if ":" in host else host
        address = f"http://{place}:{listener.getsockname()[1]}"
        listening = functools.partial(tell, f"serving {', '.join(scorers)} at {address}")
        Server(app, listener, drain_seconds, listening).run_until_stopped()


def _named(given: list[str], option: str = "") -> dict[str, str]:
    """NAME=PATH each, or where no `option` needs names also a path alone."""
    found: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or (not option and os.path.isdir(one)):
            if option:
                raise UsageError(f"{option} {one} must be NAME=FOLDER")
            name, path = one.rstrip("/\\").replace("\\", "/").rpartition("/")[2], one
        if not name or not path:
            raise UsageError(f"{option or '--model'} {one} must be NAME=FOLDER")
        if name in found:
            raise UsageError(f"{option or '--model'} {name} is there twice; name one else")
        found[name] = path
    return found


def _load(
    models: dict[str, str], adapters: dict[str, str], chosen: opt.ModelOptions
) -> dict[str, MultiItemScorer]:
    from packscore import PackscoreError
    from packscore.cli.load import load
    from packscore.serve.adapters import bytes_of, with_adapter

    scorers: dict[str, MultiItemScorer] = {}
    try:
        for name, path in models.items():
            loaded = load(replace(chosen, model=path))
            scorers[name] = loaded.scorer
            size = bytes_of(loaded.scorer.model)
            tell(f"{name}: {path} on {loaded.device} in {loaded.dtype}, {size:,} bytes")
        base = next(iter(scorers.values()))
        for name, path in adapters.items():
            scorers[name] = with_adapter(base, path)
            size = bytes_of(scorers[name].model, beside=base.model)
            tell(f"{name}: adapter {path}, {size:,} bytes beside its base")
    except (RunError, PackscoreError) as error:
        raise UsageError(str(error)) from error
    return scorers
