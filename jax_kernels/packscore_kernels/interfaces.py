"""Names of Pallas that the kernels are written in; it is experimental, and renames things."""

from __future__ import annotations

# By module, with the grouped product of a mixture's experts; who imports the kernels may ask for
# these first.
PALLAS = {
    "jax.experimental.pallas": (
        *("ANY", "BlockSpec", "Buffered", "cdiv", "ds", "loop", "multiple_of", "pallas_call"),
        *("num_programs", "program_id", "when"),
    ),
    "jax.experimental.pallas.tpu": (
        *("CompilerParams", "InterpretParams", "PrefetchScalarGridSpec", "SMEM", "SemaphoreType"),
        *("VMEM", "get_tpu_info", "make_async_copy", "roll"),
    ),
    "jax.experimental.pallas.ops.tpu.megablox.gmm": ("gmm",),
}
