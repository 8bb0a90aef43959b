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
    project_kv,
    project_out,
    project_qkv,
)
from packscore_kernels.hardware import cdiv
from packscore_kernels.layer.api import interpret_of
from packscore_kernels.layer.experts import grouped_experts
from packscore_kernels.layer.walks import QkvSteps, mlp_walk, out_walk, qkv_walk

# (module, its weights, its inputs) -> its output, through torchax
Call = Callable[..., jax.Array]
Stacks = Mapping[str, jax.Array]  # of all layers, by the names of weights in one
Layer = int | jax.Array


def _is_one(module: nn.Module, classes: Iterable[Interface]) -> bool:
    return any(type(module) is known() for known in classes)


def can_fuse(
    layer: nn.Module, implementation: KernelImplementation, itemsize: int, chips: int = 1
) -> bool:
    """Whether a layer's attention runs through the kernels, cut over so many chips."""
    if not _is_one(layer, FUSED_LAYERS) or implementation == "xla":
        return False
    attention: Any = layer.self_attn
    sizes = ModelSizes.of(attention.config).cut(chips)
    return attention.q_proj.bias is None and can_project(
        sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.hidden, itemsize
    )


def can_fuse_mlp(mlp: Any, itemsize: int, chips: int = 1) -> bool:
    """Whether an MLP of a layer that is fused runs through a kernel too."""
    return (
        _is_one(mlp, FUSED_MLPS)
        and mlp.config.hidden_act == "silu"
        and can_gate(mlp.hidden_size, mlp.intermediate_size // chips, itemsize)
    )


def can_skip_tiles(
    layer: nn.Module, implementation: KernelImplementation, itemsize: int, chips: int = 1
) -> bool:
    """Whether all of a layer runs through kernels, which can leave out tiles without a token."""
    mlp = getattr(layer, "mlp", None)
    is_fused = can_fuse(layer, implementation, itemsize, chips)
    return is_fused and can_fuse_mlp(mlp, itemsize, chips)


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
    alone = 0, sizes.kv_heads
    last_into = qkv_walk(alone, sizes.hidden, itemsize, room, live)
    if into is None or back is None or mlp is None or last_into is None:
        raise ValueError(f"{key} is of no model whose layers are kernels")
    writes = int(bool(key.num_pages))
    steps = cdiv(num_tokens, into.tokens) * QkvSteps.of(*heads, into.chunk).per_tile
    steps += cdiv(num_tokens, back.tokens) * (sizes.hidden // back.chunk)
    steps += cdiv(num_tokens, mlp.tokens) * (sizes.inner // mlp.chunk)
    steps += sizes.kv_heads * cdiv(num_tokens, block_q) + writes
    # the last layer's keys and values; how many blocks of them its rows meet is left out
    last = cdiv(num_tokens, last_into.tokens) * QkvSteps.of(*alone, last_into.chunk).per_tile
    return (sizes.layers - 1) * steps + last + writes


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
    q, k, v = _projected(layer, weights, index, hidden[0], rotary, attend)
    attended = attend(q, k, v, sm_scale=math.log(2))
    count = attend.schedule.counts[0]
    return _behind(call, layer, weights, index, hidden[0], attended, attend, count)


def fused_rows(
    call: Call,
    layer: Any,
    weights: Stacks,
    index: Layer,
    hidden: jax.Array,  # [1, num_tokens, hidden_size]
    rotary: tuple[jax.Array, jax.Array],  # [1, num_tokens, head_dim]
    attend: LayerAttention,
) -> Callable[[jax.Array], jax.Array]:
    """The layer at few rows, and the keys and values of all tokens in the pages of its attention.

    XLA computes the products of the rows: another copy of the kernels would be as long as the
    first, and so few rows wait for weights in either. Experts alone are the kernel's here too, for
    XLA would copy all of the layer's.

    Returns:
      i32[num_rows] to [num_rows, hidden_size]: the residual stream behind the layer at those rows.
    """
    k, v = project_kv(
        hidden[0],
        weights["input_layernorm.weight"][index],
        (weights["self_attn.k_proj.weight"], weights["self_attn.v_proj.weight"]),
        weights["self_attn.k_norm.weight"][index],
        (rotary[0][0], rotary[1][0]),
        index,
        eps=layer.input_layernorm.variance_epsilon,
        implementation=attend.implementation,
        live=attend.live,
    )
    attend.keep(k, v)

    def at(rows: jax.Array) -> jax.Array:
        cos, sin = (part[:, rows] for part in rotary)
        x = hidden[0, rows]
        q, _, _ = _projected(layer, weights, index, x, (cos, sin), attend, by_xla=True)
        attended = attend.at_rows(q, k, v, rows, sm_scale=math.log(2))
        given = index, x, attended, attend, len(x)
        return _behind(call, layer, weights, *given, by_xla=True)[0]

    return at


def _projected(
    layer: Any,
    weights: Stacks,
    index: Layer,
    x: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    attend: LayerAttention,
    *,
    by_xla: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of [num_tokens, hidden_size]."""

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
        implementation="xla" if by_xla else attend.implementation,
        live=attend.live,
    )


def _behind(
    call: Call,
    layer: Any,
    weights: Stacks,
    index: Layer,
    x: jax.Array,
    attended: jax.Array,
    attend: LayerAttention,
    count: int | jax.Array,
    *,
    by_xla: bool = False,
) -> jax.Array:
    """What stands behind attention, on [num_tokens, hidden_size], of which `count` are tokens."""
    axis, by = attend.axis, "xla" if by_xla else attend.implementation
    run: dict[str, Any] = {"share": axis.share, "implementation": by, "live": attend.live}

    def stack(name: str) -> jax.Array:
        return weights[f"{name}.weight"]

    back = stack("self_attn.o_proj")
    x = axis.sum(project_out(attended, back, x, index, **run))
    if can_fuse_mlp(layer.mlp, x.dtype.itemsize, axis.chips):
        mlp = gated_mlp(
            x,
            stack("post_attention_layernorm")[index],
            (stack("mlp.gate_proj"), stack("mlp.up_proj"), stack("mlp.down_proj")),
            index,
            eps=layer.post_attention_layernorm.variance_epsilon,
            **run,
        )
        return axis.sum(mlp)[None]
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
    gate_up, down = weights[f"{experts}.gate_up_proj"], weights[f"{experts}.down_proj"]
    given = grouped_experts(
        *(rows[0], chosen, shares, gate_up, down, index),
        lambda gate: call(layer.mlp.experts.act_fn, {}, gate),
        count,
        interpret_of(attend.implementation),
        axis.first(gate_up.shape[1]),
    )
    return hidden + axis.sum(given)
