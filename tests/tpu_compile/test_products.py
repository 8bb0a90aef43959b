"""Every product of every program asks a TPU for as many bits as its operands have.

A TPU multiplies float32 in one pass of bfloat16 unless it is asked for more, and no result on a CPU
shows that. Programs are read as they are traced for a chip, which takes no compiler.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import transformers
from jax.experimental import pallas as pl
from jax.lax import Precision

from every_model import MASKED, MODELS
from packscore.model.family import TRACED_MODEL_TYPES
from packscore.model.sizes import ModelSizes
from packscore.programs.compiling import arguments_of, trace_program, tracing_on
from packscore.programs.sizes import DenseKey, HeadKey, ProgramKey
from packscore.programs.traced_model import TracedModel
from packscore.programs.weights import weight_shapes
from products import equations, faults, products
from selection import cover

DTYPES = ("float32", "bfloat16")
KINDS = {"v5e": "TPU v5 lite", "v6e": "TPU v6 lite"}
# What is read: labels, over the vocabulary or not, and hidden states.
READS = {"labels": 64, "rows": 0}
CASES = cover(
    (f"{name}-{dtype}-{read}-pages{pages}-{mask}-{implementation}-{chip}", features, features)
    for name in MODELS
    for dtype in DTYPES
    for read in READS
    for pages in (0, 16)
    for mask in (["dense"] if name in MASKED else ["segment", "dense"])
    for implementation in ("pallas", "xla")
    for chip in KINDS
    for features in [(name, dtype, read, pages, mask, implementation, chip)]
)


def chip_mesh(chip: str) -> jax.sharding.AbstractMesh:
    device = jax.sharding.AbstractDevice(KINDS[chip], num_cores=1, platform="tpu")
    return jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)


def traced(
    name: str, dtype: str, key: ProgramKey | HeadKey, implementation: Any, chip: str
) -> jax.stages.Traced:
    """A program as `compile_program` traces it, with nothing around it."""
    architecture, config = MODELS[name]
    model = TracedModel(getattr(transformers, architecture), config)
    weights = weight_shapes(model.skeleton, jnp.dtype(dtype), model.cuts)
    norm = weights["norm"]["weight"]
    arguments = weights, *arguments_of(key, ModelSizes.of(config), norm, chip)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    return trace_program(model, key, shapes, implementation)


@pytest.mark.parametrize(
    ("name", "dtype", "read", "pages", "mask", "implementation", "chip"), CASES
)
def test_every_product_has_the_bits_of_its_operands(
    name: str, dtype: str, read: str, pages: int, mask: str, implementation: str, chip: str
) -> None:
    walks = (name, mask, implementation) == ("qwen3-kernels", "segment", "pallas")
    key = ProgramKey(256, 256, READS[read], pages, tile=128 if walks else 0)
    if mask == "dense":
        key = DenseKey.of(key, 3)
    with tracing_on(chip_mesh(chip)):
        program = traced(name, dtype, key, implementation, chip)
    assert faults(program.jaxpr, dtype) == []
    in_kernels = {"pallas_call" in path for path, _ in products(program.jaxpr)}
    if mask == "segment":  # whose attention is a kernel
        assert (implementation == "pallas") in in_kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "shipped"])
def test_so_has_the_head_of_ordinary_calls(name: str, dtype: str) -> None:
    with tracing_on(chip_mesh("v6e")):
        program = traced(name, dtype, HeadKey(8), "pallas", "v6e")
    assert faults(program.jaxpr, dtype) == []
    assert len(products(program.jaxpr)) == 1


def test_the_table_has_every_family() -> None:
    families = {config.model_type for _, config in MODELS.values()}
    assert families == set(TRACED_MODEL_TYPES)


@pytest.mark.parametrize(
    ("name", "count"),
    [("shipped", 7 + 2 + 7), ("llama", 7 + 2 + 7), ("qwen3_moe-kernels", 1 + 1)],
)
def test_programs_traced_with_no_word_of_precision_fail(name: str, count: int) -> None:
    """The fault that this file is here for: a layer's own products, and a mixture's router.

    Those of the scanned layers; of the last one keys and values of all tokens, and all of its rows.
    """
    key = ProgramKey(256, 256, 64)
    with jax.sharding.use_abstract_mesh(chip_mesh("v6e")):
        found = faults(traced(name, "float32", key, "pallas", "v6e").jaxpr, "float32")
    assert len(found) == count
    assert all("a product of float32 at precision None" in fault for fault in found)


def test_kernels_are_traced_whatever_the_process_asks_for() -> None:
    """Mosaic refuses bfloat16 at the highest: kernels say what they want, in both dtypes."""
    key = ProgramKey(256, 256, 64, 16)
    for asked in (None, "bfloat16", "highest"):
        with (
            jax.default_matmul_precision(asked) if asked else nullcontext(),
            jax.sharding.use_abstract_mesh(chip_mesh("v6e")),
        ):
            for dtype in DTYPES:
                program = traced("qwen3-kernels", dtype, key, "pallas", "v6e")
                assert faults(program.jaxpr, dtype) == []


X = jax.ShapeDtypeStruct((128, 128), jnp.float32)
B = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)


def in_a_kernel(x: jax.Array, **options: Any) -> Any:
    def kernel(x: Any, out: Any) -> None:
        out[...] = jax.lax.cond(
            x[0, 0] > 0,
            lambda: jax.lax.dot(x[...], x[...], **options).astype(jnp.float32),
            lambda: jnp.zeros(out.shape, out.dtype),
        )

    return pl.pallas_call(kernel, out_shape=X)(x)


def in_a_scan(x: jax.Array) -> Any:
    return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, None, length=2)


@pytest.mark.parametrize(
    ("function", "operand", "dtype", "words"),
    [
        (in_a_scan, X, "float32", "float32 at precision None"),
        (in_a_kernel, X, "float32", "float32 at precision None"),
        (lambda x: jnp.dot(x, x, precision="high"), X, "float32", "float32 at precision"),
        (lambda x: x.astype(jnp.bfloat16), X, "float32", "in a model of float32"),
        (in_a_scan, B, "bfloat16", "no module of torch rounds"),
        (in_a_kernel, B, "bfloat16", "Mosaic refuses"),
        (lambda x: jnp.exp(x), B, "bfloat16", "computes it in float32"),
        (lambda x: jax.nn.softmax(x), B, "bfloat16", "computes it in float32"),
        (lambda x: jnp.mean(x, dtype=x.dtype), B, "bfloat16", "computes it in float32"),
    ],
    ids=[
        *("scan", "kernel", "high", "narrowed", "bfloat16-scan", "bfloat16-kernel"),
        *("exponential", "softmax", "mean"),
    ],
)
def test_the_reader_sees_what_must_not_be_there(
    function: Any, operand: Any, dtype: str, words: str
) -> None:
    jaxpr = jax.jit(function).trace(operand).jaxpr
    assert any(words in fault for fault in faults(jaxpr, dtype)), [*equations(jaxpr)]


def test_the_reader_passes_what_is_right() -> None:
    one_pass = {"precision": Precision.DEFAULT, "preferred_element_type": jnp.float32}
    for function, operand in (
        (lambda x: jnp.dot(x, x, precision="highest"), X),
        (lambda x: in_a_kernel(x, precision=Precision.HIGHEST), X),
        (lambda x: in_a_kernel(x, **one_pass), B),
        (lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32), B),
        (lambda x: jnp.mean(x), B),
    ):
        assert faults(jax.jit(function).trace(operand).jaxpr, str(operand.dtype)) == []
