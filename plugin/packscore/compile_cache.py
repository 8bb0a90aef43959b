"""Compiled programs on disk, so that the next process need not compile them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

# jax keeps only what took long to compile; here every program is kept
OPTIONS: dict[str, Any] = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_enable_compilation_cache": True,
}


@contextmanager
def compiling_into(folder: Path | None) -> Iterator[None]:
    """Within the block jax looks for compiled programs in `folder`, and keeps new ones there.

    jax's configuration is the process's: it is put back afterwards. None leaves it alone, so that
    `JAX_COMPILATION_CACHE_DIR` does what it does for all of jax.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    options = {**OPTIONS, "jax_compilation_cache_dir": str(folder)}
    before = {name: getattr(jax.config, name) for name in options}
    try:
        _configure(options)
        yield
    finally:
        _configure(before)


def _configure(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)  # type: ignore[no-untyped-call]
    compilation_cache.reset_cache()  # jax reads the folder once
