"""The projections and the MLP of a decoder layer, by one of three implementations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from packscore_kernels.errors import ArgumentError
from packscore_kernels.layer.mlp import gated_mlp_pallas
from packscore_kernels.layer.projections import project_out_pallas, project_qkv_pallas
from packscore_kernels.layer.tiles import LiveTokens, product, rms_norm, shared
from packscore_kernels.layer.walks import (
    COLUMNS,
    HEAD_DIM,
    TILE_TOKENS,
    mlp_walk,
    out_walk,
    qkv_walk,
)

ProjectionImplementation = Literal["pallas", "pallas_interpret", "xla"]
Weights3 = tuple[jax.Array, jax.Array, jax.Array]
Layer = int | jax.Array  # the number of a layer, which may be traced


def can_project(
    num_q_heads: int, num_kv_heads: int, head_dim: int, hidden_size: int, itemsize: int
) -> bool:
    """Whether the kernels take these heads on the chip that is traced for."""
    if head_dim != HEAD_DIM or hidden_size % HEAD_DIM:
        return False
    heads = num_q_heads, num_kv_heads
    return bool(
        qkv_walk(heads, hidden_size, itemsize, min(TILE_TOKENS))
        and out_walk(num_q_heads, hidden_size, itemsize, min(TILE_TOKENS))
    )


@jax.named_scope("project_qkv")  # by which a profile knows it
def project_qkv(
    x: jax.Array,  # [num_tokens, hidden_size]
    x_norm: jax.Array,  # [hidden_size]
    weights: Weights3,  # each [num_layers, num_heads * head_dim, hidden_size]
    norms: tuple[jax.Array, jax.Array],  # [head_dim]
    rotary: tuple[jax.Array, jax.Array],  # [num_tokens, head_dim]
    layer: Layer,
    *,
    eps: float,
    implementation: ProjectionImplementation = "pallas",
    live: LiveTokens | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """From the residual stream to what attention reads, in one pass over the tokens.

    Args:
      x: the residual stream.
      x_norm: weight of the RMS norm before the projections.
      weights: of q, k and v, of all layers, each as torch keeps it.
      norms: weights of the RMS norms of each head of q and of k.
      rotary: cosine and sine of the positions, both halves of a head alike.
      layer: whose weights; the kernel fetches them from the stack, which is not copied.
      eps: of all three norms.
      implementation: "pallas" (TPU), "pallas_interpret" or "xla".
      live: how many rows are tokens; None computes all rows, and so does "xla".

    Returns:
      (q [num_q_heads, num_tokens, head_dim], k and v [num_kv_heads, num_tokens, head_dim]): q and
      k normalised and rotated, as `segment_paged_attention` takes them.

    Raises:
      ArgumentError: heads that the kernel does not take.
    """
    options: dict[str, Any] = {"eps": eps, "implementation": implementation, "live": live}
    q, k, v = _projected(x, x_norm, weights, norms, rotary, layer, **options)
    return q, k, v


@jax.named_scope("project_kv")  # by which a profile knows it
def project_kv(
    x: jax.Array,  # [num_tokens, hidden_size]
    x_norm: jax.Array,  # [hidden_size]
    weights: tuple[jax.Array, jax.Array],  # each [num_layers, num_kv_heads * head_dim, hidden_size]
    norm: jax.Array,  # [head_dim]
    rotary: tuple[jax.Array, jax.Array],  # [num_tokens, head_dim]
    layer: Layer,
    *,
    eps: float,
    implementation: ProjectionImplementation = "pallas",
    live: LiveTokens | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The keys and values of `project_qkv`, bit by bit, where few tokens have queries.

    Args:
      x: the residual stream.
      x_norm: weight of the RMS norm before the projections.
      weights: of k and v, of all layers, each as torch keeps it.
      norm: weight of the RMS norm of each head of k.
      rotary: cosine and sine of the positions, both halves of a head alike.
      layer: whose weights.
      eps: of both norms.
      implementation: "pallas" (TPU), "pallas_interpret" or "xla".
      live: how many rows are tokens; None computes all rows, and so does "xla".

    Returns:
      (k, v), [num_kv_heads, num_tokens, head_dim] each.

    Raises:
      ArgumentError: heads that the kernel does not take.
    """
    options: dict[str, Any] = {"eps": eps, "implementation": implementation, "live": live}
    k, v = _projected(x, x_norm, weights, (norm,), rotary, layer, **options)
    return k, v


def _projected(
    x: jax.Array,
    x_norm: jax.Array,
    weights: Sequence[jax.Array],
    norms: Sequence[jax.Array],
    rotary: tuple[jax.Array, jax.Array],
    layer: Layer,
    *,
    eps: float,
    implementation: ProjectionImplementation,
    live: LiveTokens | None,
) -> Sequence[jax.Array]:
    head_dim, hidden_size = norms[0].shape[0], x.shape[1]
    if implementation == "xla":
        rows = rms_norm(x, x_norm, eps).astype(x.dtype)
        cos, sin = (part.astype(jnp.float32)[:, None] for part in rotary)

        def heads(weight: jax.Array, norm: jax.Array | None) -> jax.Array:
            out = product(rows, weight).reshape(len(rows), -1, head_dim)
            if norm is not None:
                out = rms_norm(out, norm, eps)
                first, second = jnp.split(out, 2, axis=-1)
                out = out * cos + jnp.concatenate([-second, first], axis=-1) * sin
            return out.astype(x.dtype).transpose(1, 0, 2)

        own = (weight[layer] for weight in weights)
        return [heads(w, n) for w, n in zip(own, (*norms, None), strict=True)]
    if head_dim != HEAD_DIM or hidden_size % HEAD_DIM:
        raise ArgumentError(
            f"{head_dim=} must be {HEAD_DIM} and {hidden_size=} a multiple of it; pass "
            "implementation='xla'"
        )
    return project_qkv_pallas(
        x,
        x_norm,
        weights,
        norms,
        rotary,
        _as_array(layer),
        eps=eps,
        live=live,
        interpret=interpret_of(implementation),
    )


@jax.named_scope("project_out")  # by which a profile knows it
def project_out(
    attended: jax.Array,  # [num_q_heads, num_tokens, head_dim]
    weight: jax.Array,  # [num_layers, hidden_size, num_q_heads * head_dim]
    x: jax.Array,  # [num_tokens, hidden_size]
    layer: Layer,
    *,
    share: float = 1.0,
    implementation: ProjectionImplementation = "pallas",
    live: LiveTokens | None = None,
) -> jax.Array:
    """What attention found, back into the residual stream.

    Args:
      attended: as `segment_paged_attention` returns it.
      weight: of the output projection, of all layers, each as torch keeps it.
      x: the residual stream, which is added.
      layer: whose weight.
      share: of the residual stream that is added: of each of n chips that have parts of the heads,
        and whose results are summed, 1 / n.
      implementation: "pallas" (TPU), "pallas_interpret" or "xla".
      live: how many rows are tokens; None computes all rows, and so does "xla".

    Returns:
      [num_tokens, hidden_size] in the dtype of x.
    """
    if implementation == "xla":
        rows = attended.transpose(1, 0, 2).reshape(len(x), -1)
        return (shared(x, share) + product(rows, weight[layer])).astype(x.dtype)
    options: dict[str, Any] = {"live": live, "interpret": interpret_of(implementation)}
    return project_out_pallas(attended, weight, x, _as_array(layer), share=share, **options)


def can_gate(hidden_size: int, intermediate_size: int, itemsize: int) -> bool:
    """Whether `gated_mlp` takes an MLP of these sizes on the chip that is traced for."""
    return mlp_walk(hidden_size, intermediate_size, itemsize, min(TILE_TOKENS)) is not None


@jax.named_scope("gated_mlp")  # by which a profile knows it
def gated_mlp(
    x: jax.Array,  # [num_tokens, hidden_size]
    x_norm: jax.Array,  # [hidden_size]
    weights: Weights3,
    layer: Layer,
    *,
    eps: float,
    share: float = 1.0,
    implementation: ProjectionImplementation = "pallas",
    live: LiveTokens | None = None,
) -> jax.Array:
    """The second half of a decoder layer: x + down(silu(gate(norm(x))) * up(norm(x))).

    Args:
      x: the residual stream.
      x_norm: weight of the RMS norm before the MLP.
      weights: gate and up, each [num_layers, intermediate_size, hidden_size], and down
        [num_layers, hidden_size, intermediate_size], each layer's as torch keeps it.
      layer: whose weights.
      eps: of the norm.
      share: of the residual stream that is added: of each of n chips that have parts of the
        columns, and whose results are summed, 1 / n.
      implementation: "pallas" (TPU), "pallas_interpret" or "xla".
      live: how many rows are tokens; None computes all rows, and so does "xla".

    Returns:
      [num_tokens, hidden_size] in the dtype of x.

    Raises:
      ArgumentError: sizes that the kernel does not take.
    """
    if implementation == "xla":
        rows = rms_norm(x, x_norm, eps).astype(x.dtype)
        gate, up = (product(rows, weight[layer]) for weight in weights[:2])
        gated = (jax.nn.silu(gate) * up).astype(x.dtype)
        return (shared(x, share) + product(gated, weights[2][layer])).astype(x.dtype)
    (num_tokens, hidden_size), intermediate_size = x.shape, weights[0].shape[1]
    walk = mlp_walk(hidden_size, intermediate_size, x.dtype.itemsize, num_tokens, live)
    if walk is None:
        raise ArgumentError(
            f"{hidden_size=} must be a multiple of 128 and {intermediate_size=} of "
            f"{COLUMNS}, small enough for the chip; pass implementation='xla'"
        )
    options: dict[str, Any] = {"live": live, "interpret": interpret_of(implementation)}
    return gated_mlp_pallas(
        x, x_norm, weights, _as_array(layer), walk, eps=eps, share=share, **options
    )


def _as_array(layer: Layer) -> jax.Array:
    return jnp.asarray(layer, jnp.int32).reshape(1)


def interpret_of(implementation: ProjectionImplementation) -> Any:
    """What a kernel is told of how it is run."""
    return pltpu.InterpretParams() if implementation == "pallas_interpret" else False
