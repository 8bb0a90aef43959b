"""`packscore warmup`: compile ahead, into a folder that later processes read."""

from __future__ import annotations

import time

from packscore import program_of
from packscore.cli.exits import tell
from packscore.cli.load import load
from packscore.cli.options import ModelOptions
from packscore.files.failures import RunError


def warm_up(options: ModelOptions, max_tokens: int, num_labels: int, *, quiet: bool) -> None:
    """Compile every program that requests of up to `max_tokens` tokens can need.

    Raises:
      RunError: the model has no compiled programs.
    """
    loaded = load(options)
    program = program_of(loaded.scorer.model)
    if program is None:
        raise RunError(f"--model={options.model} has no compiled programs on {options.device}")
    started = time.perf_counter()
    count = program.warmup(
        max_tokens=max_tokens, num_labels=num_labels, show_progress_bar=not quiet
    )
    tell(f"{count} programs ready in {time.perf_counter() - started:.1f} s on {program.place}")
    if loaded.cache.folder is None:
        tell("no program is kept: they end with this process")
    loaded.cache.tell_new()
