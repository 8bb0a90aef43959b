"""A Qwen3 decoder layer on a TPU as four kernels: projections, attention, projection, MLP.

Traced as they are, the modules between the residual stream and attention become a dozen passes over
memory: halves of heads are sliced, turned and joined, and arrays change their layout for attention.
The MLP's gate is computed within its last product, which waits for it. Experts stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3MLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeMLP

from packscore.traced_ops import LayerPages, attend
from packscore_kernels import (
    SegmentSchedule,
    can_gate,
    can_project,
    gated_mlp,
    project_out,
    project_qkv,
)

FUSED_LAYERS = (Qwen3DecoderLayer, Qwen3MoeDecoderLayer)
FUSED_MLPS = (Qwen3MLP, Qwen3MoeMLP)


def can_fuse(layer: nn.Module, implementation: Any, itemsize: int) -> bool:
    """Whether a layer's attention runs through the kernels."""
    if type(layer) not in FUSED_LAYERS or implementation not in ("pallas", "pallas_interpret"):
        return False
    attention: Any = layer.self_attn
    config = attention.config
    return attention.q_proj.bias is None and can_project(
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        config.hidden_size,
        itemsize,
    )


def can_fuse_mlp(mlp: Any, itemsize: int) -> bool:
    """Whether an MLP of a layer that is fused runs through a kernel too."""
    return (
        type(mlp) in FUSED_MLPS
        and mlp.config.hidden_act == "silu"
        and can_gate(mlp.hidden_size, mlp.intermediate_size, itemsize)
    )


def fused_layer(
    call: Callable[..., jax.Array],
    layer: Any,
    weights: Mapping[str, jax.Array],
    hidden: jax.Array,  # [1, num_tokens, hidden_size]
    rotary: tuple[jax.Array, jax.Array],  # [1, num_tokens, head_dim]
    schedule: SegmentSchedule,
    pages: LayerPages | None,
    implementation: Any,
) -> jax.Array:
    """The layer as a function of its weights; see `can_fuse`.

    Args:
      call: (module, its weights, its inputs) -> its output, through torchax.
      layer: the decoder layer.
      weights: of the layer, by their names in it.
      hidden: the residual stream.
      rotary: cosine and sine of the positions.
      schedule: who sees whom.
      pages: the pool, which the layer changes in place.
      implementation: of the kernels.

    Returns:
      [1, num_tokens, hidden_size]: the residual stream behind the layer.
    """
    attention = layer.self_attn

    def of(name: str) -> jax.Array:
        return weights[f"self_attn.{name}.weight"]

    q, k, v = project_qkv(
        hidden[0],
        weights["input_layernorm.weight"],
        (of("q_proj"), of("k_proj"), of("v_proj")),
        (of("q_norm"), of("k_norm")),
        (rotary[0][0], rotary[1][0]),
        eps=layer.input_layernorm.variance_epsilon,
        implementation=implementation,
    )
    attended = attend(q, k, v, schedule, pages, attention.scaling, implementation)
    hidden = project_out(attended, of("o_proj"), hidden[0], implementation=implementation)
    if can_fuse_mlp(layer.mlp, hidden.dtype.itemsize):
        gate, up, down = (weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return gated_mlp(
            hidden,
            weights["post_attention_layernorm.weight"],
            (gate, up, down),
            eps=layer.post_attention_layernorm.variance_epsilon,
            implementation=implementation,
        )[None]
    hidden = hidden[None]

    def through(name: str, x: jax.Array) -> jax.Array:
        own = {
            key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(name)
        }
        return call(getattr(layer, name), own, x)

    return hidden + through("mlp", through("post_attention_layernorm", hidden))
