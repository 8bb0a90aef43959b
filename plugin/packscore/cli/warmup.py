"""`packscore warmup`: compile ahead, into a folder that later processes read."""

from __future__ import annotations

import os
import time
from pathlib import Path

from packscore.cli.exits import tell
from packscore.cli.options import ModelOptions
from packscore.files.failures import RunError


def warm_up(
    model: str,
    revision: str | None,
    device: str,
    dtype: str,
    max_tokens: int,
    num_labels: int,
    cache_dir: Path | None,
    *,
    quiet: bool,
) -> None:
    """Compile every program that requests of up to `max_tokens` tokens can need.

    Raises:
      RunError: the model has no compiled programs.
    """
    if cache_dir is None:
        tell(
            "no cache folder: the programs end with this process; pass --cache-dir, or set "
            "JAX_COMPILATION_CACHE_DIR here and where you score"
        )
    else:
        # jax reads them when it is imported; it would leave out what compiles in under a second
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_dir.resolve())
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # imported behind the environment
    from packscore import program_of
    from packscore.cli.load import load

    options = ModelOptions(
        model, revision, device, dtype, "qwen3-reranker", None, None, None, None, "truncate"
    )
    loaded = load(options)
    program = program_of(loaded.scorer.model)
    if program is None:
        raise RunError(f"--model={model} has no compiled programs on {device}")
    started = time.perf_counter()
    count = program.warmup(
        max_tokens=max_tokens, num_labels=num_labels, show_progress_bar=not quiet
    )
    tell(f"{count} programs ready in {time.perf_counter() - started:.1f} s on {program.device}")
