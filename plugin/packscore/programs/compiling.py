"""Programs compiled from shapes alone, and kept on disk for the next process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from packscore.programs.head import whole_head
from packscore.programs.sizes import HeadKey, ProgramKey
from packscore.programs.traced_model import TracedModel
from packscore.programs.traced_ops import LayerPages

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


def compile_program(
    traced: TracedModel,
    weights: Any,
    key: ProgramKey | HeadKey,
    inputs: tuple[Any, ...],
    device: Any,
    implementation: str,
) -> Any:
    """Compile one program from shapes alone, for a device that need not be there."""

    def program(weights: Any, *arrays: Any) -> Any:
        if isinstance(key, HeadKey):
            return whole_head(weights, *arrays)
        if not key.num_labels:
            tokens = arrays[:-1]  # all but the label ids, of which there are none
            return traced.hidden_rows(weights, *tokens, implementation=implementation)
        pages = None
        if key.num_pages:
            kv_pages, *arrays, writes = arrays  # type: ignore[assignment]
            pages = LayerPages(kv_pages, writes)
        found = traced.label_logits(
            weights,
            *arrays,
            over_vocabulary=key.over_vocabulary,
            pages=pages,
            implementation=implementation,
        )
        return found if pages is None else (found, pages.kv_pages)

    sharding = jax.sharding.SingleDeviceSharding(device)
    struct: Any = jax.ShapeDtypeStruct
    shapes = jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=sharding), (weights, *inputs))
    mesh = jax.sharding.Mesh([device], ("x",)).abstract_mesh  # pltpu asks it what chip this is
    with jax.sharding.use_abstract_mesh(mesh):
        # the pool is changed in place
        donated = (1,) if isinstance(key, ProgramKey) and key.num_pages else ()
        return jax.jit(program, donate_argnums=donated).lower(*shapes).compile()
