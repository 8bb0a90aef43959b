"""What a traced program computes with fewer bits than it should, kernels and scans included.

No result on a CPU shows it: there a float32 product is float32's, whatever its precision says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from jax.lax import Precision

PRODUCTS = {"dot_general", "ragged_dot_general", "conv_general_dilated"}
# What Hugging Face's modules, or torch's kernels for them, compute in float32 in every dtype.
IN_FLOAT32 = {
    *("reduce_sum", "reduce_prod", "cumsum", "cumprod", "cumlogsumexp", "top_k", "sort"),
    *("exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "erf", "erfc", "cos", "sin"),
    *("rsqrt", "sqrt", "div", "pow", "integer_pow", "square"),
}
HIGHEST, ONE_PASS = (Precision.HIGHEST,) * 2, (Precision.DEFAULT,) * 2


def equations(jaxpr: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(names of the equations it is inside of, equation), of a jaxpr and of all that it holds."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield path, equation
        for inner in jax.tree.leaves([*equation.params.values()], is_leaf=_is_jaxpr):
            if _is_jaxpr(inner):
                yield from equations(inner, (*path, equation.primitive.name))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


def products(jaxpr: Any) -> list[tuple[tuple[str, ...], Any]]:
    """Those of the `equations` that are products."""
    return [found for found in equations(jaxpr) if found[1].primitive.name in PRODUCTS]


def faults(jaxpr: Any, dtype: str) -> list[str]:
    """Every equation with too few bits, in words.

    Args:
      jaxpr: of a program.
      dtype: of the model's weights.
    """
    return [
        f"{'/'.join((*path, equation.primitive.name))}: {fault}: {str(equation)[:300]}"
        for path, equation in equations(jaxpr)
        for fault in _faults(equation, "pallas_call" in path, dtype)
    ]


def _faults(equation: Any, in_kernel: bool, dtype: str) -> Iterator[str]:
    name = equation.primitive.name
    operands, results = _dtypes(equation.invars), _dtypes(equation.outvars)
    if dtype == "float32" and "bfloat16" in operands | results:
        yield "bfloat16 in a model of float32"
    if name in IN_FLOAT32 and "bfloat16" in operands:
        yield "Hugging Face computes it in float32"
    if name not in PRODUCTS:
        return
    precision = equation.params["precision"]
    if "float32" in operands and precision != HIGHEST:
        yield f"a product of float32 at precision {precision}"
    if operands == {"bfloat16"} and in_kernel and precision != ONE_PASS:
        yield f"a product of bfloat16 at precision {precision}, which Mosaic refuses"
    if operands == {"bfloat16"} and results != {"float32"} and not _rounds_in_torch(equation):
        yield "a product that is rounded to bfloat16 and that no module of torch rounds"


def _dtypes(variables: Any) -> set[str]:
    return {str(x.aval.dtype) for x in variables if hasattr(x.aval, "dtype")}


def _rounds_in_torch(equation: Any) -> bool:
    """Whether the product is that of an `nn.Linear`, or of experts, which are linear too."""
    is_linear = "linear" in str(equation.source_info.name_stack).split("/")
    return is_linear or equation.primitive.name == "ragged_dot_general"
