"""A Qwen3 decoder layer on a TPU as four kernels: projections, attention, projection, MLP.

Traced as they are, the modules between the residual stream and attention become a dozen passes over
memory: halves of heads are sliced, turned and joined, and arrays change their layout for attention.
XLA computes the MLP's gate within its last product, which waits for it. Experts stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from torch import nn

from packscore.interfaces import FUSED_LAYERS, FUSED_MLPS, Interface
from packscore.model.sizes import ModelSizes
from packscore.programs.traced_ops import KernelImplementation, LayerAttention
from packscore_kernels import (
    can_gate,
    can_project,
    gated_mlp,
    project_kv,
    project_out,
    project_qkv,
)

# (module, its weights, its inputs) -> its output, through torchax
Call = Callable[..., jax.Array]
Stacks = Mapping[str, jax.Array]  # of all layers, by the names of weights in one
Layer = int | jax.Array


def _is_one(module: nn.Module, classes: Iterable[Interface]) -> bool:
    return any(type(module) is known() for known in classes)


def can_fuse(layer: nn.Module, implementation: KernelImplementation, itemsize: int) -> bool:
    """Whether a layer's attention runs through the kernels."""
    if not _is_one(layer, FUSED_LAYERS) or implementation == "xla":
        return False
    attention: Any = layer.self_attn
    sizes = ModelSizes.of(attention.config)
    return attention.q_proj.bias is None and can_project(
        sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.hidden, itemsize
    )


def can_fuse_mlp(mlp: Any, itemsize: int) -> bool:
    """Whether an MLP of a layer that is fused runs through a kernel too."""
    return (
        _is_one(mlp, FUSED_MLPS)
        and mlp.config.hidden_act == "silu"
        and can_gate(mlp.hidden_size, mlp.intermediate_size, itemsize)
    )


def fused_layer(
    call: Call,
    layer: Any,
    weights: Stacks,
    index: Layer,
    hidden: jax.Array,  # [1, num_tokens, hidden_size]
    rotary: tuple[jax.Array, jax.Array],  # [1, num_tokens, head_dim]
    attend: LayerAttention,
) -> jax.Array:
    """The layer as a function of its weights; see `can_fuse`.

    Args:
      call: (module, its weights, its inputs) -> its output, through torchax.
      layer: a decoder layer, for its modules.
      weights: of all layers, stacked, by their names in one. The kernels fetch what they need from
        the stacks: a slice handed to them would be a copy, for which the chip waits.
      index: of the layer that is computed.
      hidden: the residual stream.
      rotary: cosine and sine of the positions.
      attend: its attention, with the pages that it changes; says how the kernels are run.

    Returns:
      [1, num_tokens, hidden_size]: the residual stream behind the layer.
    """
    implementation, x = attend.implementation, hidden[0]
    q, k, v = _projected(layer, weights, index, x, rotary, implementation)
    attended = attend(q, k, v, sm_scale=math.log(2))
    return _behind(call, layer, weights, index, x, attended, implementation)


def fused_keys_values(
    layer: Any,
    weights: Stacks,
    index: Layer,
    hidden: jax.Array,  # [1, num_tokens, hidden_size]
    rotary: tuple[jax.Array, jax.Array],  # [1, num_tokens, head_dim]
    implementation: KernelImplementation,
) -> tuple[jax.Array, jax.Array]:
    """The keys and values of the layer, [num_kv_heads, num_tokens, head_dim] each."""
    return project_kv(
        hidden[0],
        weights["input_layernorm.weight"][index],
        (weights["self_attn.k_proj.weight"], weights["self_attn.v_proj.weight"]),
        weights["self_attn.k_norm.weight"][index],
        (rotary[0][0], rotary[1][0]),
        index,
        eps=layer.input_layernorm.variance_epsilon,
        implementation=implementation,
    )


def fused_rows(
    call: Call,
    layer: Any,
    weights: Stacks,
    index: Layer,
    hidden: jax.Array,  # [1, num_rows, hidden_size]
    rotary: tuple[jax.Array, jax.Array],  # [1, num_rows, head_dim]
    attend: Callable[..., jax.Array],  # queries [num_q_heads, num_rows, head_dim] -> the same
) -> jax.Array:
    """The layer at few rows, whose products XLA computes: no tile of a kernel is as small.

    Returns:
      [1, num_rows, hidden_size]: the residual stream behind the layer.
    """
    q, _, _ = _projected(layer, weights, index, hidden[0], rotary, "xla")
    attended = attend(q, sm_scale=math.log(2))
    return _behind(call, layer, weights, index, hidden[0], attended, "xla")


def _projected(
    layer: Any,
    weights: Stacks,
    index: Layer,
    x: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    implementation: KernelImplementation,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def stack(name: str) -> jax.Array:
        return weights[f"{name}.weight"]

    # The attention's exponentials are powers of two: with q scaled by its norm it scales nothing.
    scale = layer.self_attn.scaling / math.log(2)
    q_norm = stack("self_attn.q_norm")[index].astype("float32") * scale
    return project_qkv(
        x,
        stack("input_layernorm")[index],
        (stack("self_attn.q_proj"), stack("self_attn.k_proj"), stack("self_attn.v_proj")),
        (q_norm, stack("self_attn.k_norm")[index]),
        (rotary[0][0], rotary[1][0]),
        index,
        eps=layer.input_layernorm.variance_epsilon,
        implementation=implementation,
    )


def _behind(
    call: Call,
    layer: Any,
    weights: Stacks,
    index: Layer,
    x: jax.Array,
    attended: jax.Array,
    implementation: KernelImplementation,
) -> jax.Array:
    """What stands behind attention, on the residual stream [num_tokens, hidden_size]."""

    def stack(name: str) -> jax.Array:
        return weights[f"{name}.weight"]

    x = project_out(attended, stack("self_attn.o_proj"), x, index, implementation=implementation)
    if can_fuse_mlp(layer.mlp, x.dtype.itemsize):
        return gated_mlp(
            x,
            stack("post_attention_layernorm")[index],
            (stack("mlp.gate_proj"), stack("mlp.up_proj"), stack("mlp.down_proj")),
            index,
            eps=layer.post_attention_layernorm.variance_epsilon,
            implementation=implementation,
        )[None]
    hidden = x[None]

    def through(name: str, x: jax.Array) -> jax.Array:
        own = {
            key.removeprefix(f"{name}."): w[index]
            for key, w in weights.items()
            if key.startswith(f"{name}.")
        }
        return call(getattr(layer, name), own, x)

    return hidden + through("mlp", through("post_attention_layernorm", hidden))
