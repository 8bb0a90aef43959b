"""A Qwen3 decoder layer on a TPU as four kernels: projections, attention, projection, MLP.

Traced as they are, the modules between the residual stream and attention become a dozen passes over
memory: halves of heads are sliced, turned and joined, and arrays change their layout for attention.
XLA computes the MLP's gate within its last product, which waits for it. A mixture's
experts are grouped products.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from torch import nn

from packscore.interfaces import FUSED_LAYERS, FUSED_MLPS, MIXTURE, Interface
from packscore.model.sizes import ModelSizes
from packscore.programs.sizes import ProgramKey
from packscore.programs.traced_ops import KernelImplementation, LayerAttention
from packscore_kernels import (
    LiveTokens,
    can_gate,
    can_project,
    gated_mlp,
    project_out,
    project_qkv,
)
from packscore_kernels.hardware import cdiv
from packscore_kernels.layer.api import interpret_of
from packscore_kernels.layer.experts import grouped_experts
from packscore_kernels.layer.walks import QkvSteps, mlp_walk, out_walk, qkv_walk


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


def can_skip_tiles(layer: nn.Module, implementation: KernelImplementation, itemsize: int) -> bool:
    """Whether all of a layer runs through kernels, which can leave out tiles without a token."""
    mlp = getattr(layer, "mlp", None)
    return can_fuse(layer, implementation, itemsize) and can_fuse_mlp(mlp, itemsize)


def grid_steps(
    sizes: ModelSizes, itemsize: int, key: ProgramKey, block_q: int, num_tokens: int
) -> int:
    """Steps of all grids in a launch of so many tokens, of a program that walks over tiles.

    Args:
      sizes: of the model.
      itemsize: bytes of a weight.
      key: of the program.
      block_q: rows of attention's tiles.
      num_tokens: of the launch.
    """
    live, room = LiveTokens(num_tokens, key.tile), key.num_tokens
    heads = sizes.heads, sizes.kv_heads
    into = qkv_walk(heads, sizes.hidden, itemsize, room, live)
    back = out_walk(sizes.heads, sizes.hidden, itemsize, room, live)
    mlp = mlp_walk(sizes.hidden, sizes.inner, itemsize, room, live)
    if into is None or back is None or mlp is None:
        raise ValueError(f"{key} is of no model whose layers are kernels")
    steps = cdiv(num_tokens, into.tokens) * QkvSteps.of(*heads, into.chunk).per_tile
    steps += cdiv(num_tokens, back.tokens) * (sizes.hidden // back.chunk)
    steps += cdiv(num_tokens, mlp.tokens) * (sizes.inner // mlp.chunk)
    steps += sizes.kv_heads * cdiv(num_tokens, block_q) + bool(key.num_pages)
    return sizes.layers * steps


def fused_layer(
    call: Callable[..., jax.Array],
    layer: Any,
    weights: Mapping[str, jax.Array],
    index: jax.Array,  # i32[]
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
    implementation, live, x = attend.implementation, attend.live, hidden[0]

    def stack(name: str) -> jax.Array:
        return weights[f"{name}.weight"]

    # The attention's exponentials are powers of two: with q scaled by its norm it scales nothing.
    scale = layer.self_attn.scaling / math.log(2)
    q_norm = stack("self_attn.q_norm")[index].astype("float32") * scale
    q, k, v = project_qkv(
        x,
        stack("input_layernorm")[index],
        (stack("self_attn.q_proj"), stack("self_attn.k_proj"), stack("self_attn.v_proj")),
        (q_norm, stack("self_attn.k_norm")[index]),
        (rotary[0][0], rotary[1][0]),
        index,
        eps=layer.input_layernorm.variance_epsilon,
        implementation=implementation,
        live=live,
    )
    attended = attend(q, k, v, sm_scale=math.log(2))
    back = stack("self_attn.o_proj")
    x = project_out(attended, back, x, index, implementation=implementation, live=live)
    if can_fuse_mlp(layer.mlp, x.dtype.itemsize):
        return gated_mlp(
            x,
            stack("post_attention_layernorm")[index],
            (stack("mlp.gate_proj"), stack("mlp.up_proj"), stack("mlp.down_proj")),
            index,
            eps=layer.post_attention_layernorm.variance_epsilon,
            implementation=implementation,
            live=live,
        )[None]
    hidden = x[None]

    def through(name: str, x: jax.Array) -> Any:
        own = {
            key.removeprefix(f"{name}."): w[index]
            for key, w in weights.items()
            if key.startswith(f"{name}.")
        }
        return call(operator.attrgetter(name)(layer), own, x)

    rows = through("post_attention_layernorm", hidden)
    if not _is_one(layer.mlp, (MIXTURE,)):
        plain: jax.Array = hidden + through("mlp", rows)
        return plain
    _, shares, chosen = through("mlp.gate", rows)
    experts = "mlp.experts"
    return hidden + grouped_experts(
        *(rows[0], chosen, shares),
        *(weights[f"{experts}.gate_up_proj"], weights[f"{experts}.down_proj"], index),
        lambda gate: call(layer.mlp.experts.act_fn, {}, gate),
        attend.schedule.counts[0],
        interpret_of(implementation),
    )
