"""A mixture's experts in programs: tokens sorted by expert, and two grouped products.

Hugging Face loops over the experts that were hit, which is data, or gathers a copy of an expert's
weights for every token. The kernel is jax's own (megablox), and it reads the stack of all layers in
place; XLA's `ragged_dot` stands for it where there is no TPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from packscore_kernels.hardware import LANES, precision_of

# Rows of a tile: an expert's last one is full of others' rows, which are computed in vain.
TILE_ROWS = 256
# Bytes of an expert's weights that a step multiplies, of which the kernel holds two.
BLOCK_BYTES = 3 * 2**20

# (rows sorted by expert, which of the two weights) to their products
Product = Callable[[jax.Array, jax.Array], jax.Array]


def grouped_experts(
    hidden: jax.Array,  # [num_tokens, hidden_size]
    index: jax.Array,  # i[num_tokens, num_chosen]
    weights: jax.Array,  # [num_tokens, num_chosen]
    gate_up: jax.Array,  # [num_layers, num_experts, 2 * columns, hidden_size]
    down: jax.Array,  # [num_layers, num_experts, hidden_size, columns]
    layer: int | jax.Array,  # i32[]
    activation: Callable[[jax.Array], jax.Array],
    count: int | jax.Array,  # i32[]
    interpret: Any,
    first: int | jax.Array = 0,  # i32[]
) -> jax.Array:
    """What the chosen experts of one layer give, weighted and summed.

    Args:
      hidden: rows of tokens.
      index: the experts of each token.
      weights: of these.
      gate_up: of all layers and experts, as torch keeps them.
      down: the same.
      layer: whose experts.
      activation: of the gate.
      count: how many rows are tokens; no expert meets the others, whose results are zeros.
      interpret: what Pallas takes by this name.
      first: the number of the first expert that is here, of those that `index` names; what others
        give is left out.

    Returns:
      [num_tokens, hidden_size] in the dtype of `hidden`.
    """
    num_layers, num_experts = gate_up.shape[:2]
    is_token = (jnp.arange(len(hidden)) < count)[:, None]
    own, is_own = index - first, (index >= first) & (index < first + num_experts)
    chosen = jnp.where(is_token & is_own, layer * num_experts + own, num_layers * num_experts)
    gate_up, down = (x.reshape(-1, *x.shape[2:]) for x in (gate_up, down))
    product = kernel_product(chosen, len(gate_up), interpret)
    return through_experts(hidden, chosen, weights, gate_up, down, activation, product)


def through_experts(
    hidden: jax.Array,  # [num_tokens, hidden_size]
    chosen: jax.Array,  # i[num_tokens, num_chosen]
    weights: jax.Array,  # [num_tokens, num_chosen]
    gate_up: jax.Array,  # [num_groups, 2 * columns, hidden_size]
    down: jax.Array,  # [num_groups, hidden_size, columns]
    activation: Callable[[jax.Array], jax.Array],
    product: Product,
) -> jax.Array:
    """Tokens sorted by group, two products, and the sum of what each token's groups give.

    A number behind the last group is no group, and gives nothing.
    """
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    inner = product(hidden[order // chosen.shape[1]], gate_up)
    gate, up = jnp.split(inner, 2, axis=-1)
    in_order = product(activation(gate) * up, down)[jnp.argsort(order)]
    given = in_order.reshape(*chosen.shape, -1) * weights[..., None]
    # rows of no group are whatever the product leaves there
    given = jnp.where((chosen < len(gate_up))[..., None], given, 0)
    return given.sum(1).astype(hidden.dtype)


def sizes_of(chosen: jax.Array, num_groups: int) -> jax.Array:
    """i32[num_groups]: choices of each; higher numbers are no group."""
    return jnp.bincount(chosen.reshape(-1), length=num_groups).astype(jnp.int32)


def ragged_product(chosen: jax.Array, num_groups: int) -> Product:
    """By XLA."""
    sizes = sizes_of(chosen, num_groups)

    def product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        turned, precision = jnp.swapaxes(matrices, 1, 2), precision_of(rows.dtype)
        out: jax.Array = jax.lax.ragged_dot(rows, turned, sizes, precision=precision)
        return out

    return product


def kernel_product(chosen: jax.Array, num_groups: int, interpret: Any) -> Product:
    """By the kernel, whose grid ends with the last row of a group."""
    # imported here: whoever has no mixture needs none of it
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    sizes = sizes_of(chosen, num_groups)

    def product(rows: jax.Array, matrices: jax.Array) -> jax.Array:
        (count, inner), columns = rows.shape, matrices.shape[1]
        most = BLOCK_BYTES // (inner * rows.dtype.itemsize)
        tile = math.gcd(count, TILE_ROWS), inner, columns_of_step(columns, most)
        # the kernel says nothing of it, and refuses bfloat16 more than the one pass that it needs
        with jax.default_matmul_precision(precision_of(rows.dtype).name.lower()):
            out: jax.Array = gmm(
                *(rows, matrices, sizes, rows.dtype, tile), transpose_rhs=True, interpret=interpret
            )
        return out

    return product


def columns_of_step(columns: int, most: int) -> int:
    """The widest equal part of so many columns, in whole registers; all where there is none."""
    parts = (columns // n for n in range(1, columns // LANES + 1) if columns % (n * LANES) == 0)
    return next(
        (part for part in parts if part <= most), LANES if columns % LANES == 0 else columns
    )
