"""The op as the attention of an ordinary call on torchax: every row of the batch by itself."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch

from packscore.programs.interfaces import TRACER
from packscore.programs.traced_ops import KernelImplementation, torchax_environment
from packscore_kernels import (
    SegmentLayout,
    SegmentSchedule,
    build_schedule,
    resolve_block_sizes,
    segment_paged_attention,
)


@dataclass(frozen=True, eq=False)
class RowAttention:
    """What the layers of one call attend with: to the tokens before a token in its row.

    Args:
      visible: bool[batch, num_tokens], False at padding; None where there is none.
      implementation: of the op.
    """

    visible: jax.Array | None
    implementation: KernelImplementation

    def __call__(
        self,
        query: torch.Tensor,  # [batch, num_q_heads, num_tokens, head_dim]
        key: torch.Tensor,  # [batch, num_kv_heads, num_tokens, head_dim]
        value: torch.Tensor,  # [batch, num_kv_heads, num_tokens, head_dim]
        sm_scale: float,
    ) -> torch.Tensor:
        """[batch, num_tokens, num_q_heads, head_dim]; zeros at padding."""
        env = torchax_environment()
        q, k, v = env.t2j_iso((query, key, value))
        out: torch.Tensor = env.j2t_iso(
            attend_rows(q, k, v, self.visible, sm_scale, self.implementation)
        )
        return out


def row_arguments(
    attention_mask: Any,  # [batch, num_tokens], or None
    implementation: KernelImplementation,
) -> dict[str, Any]:
    """What a model is called with in the place of its mask, so that the op is its attention.

    An empty 4-D mask keeps Hugging Face from building one; a model that dropped our attention
    would fail on its shape.
    """
    env = torchax_environment()
    visible = None
    if attention_mask is not None:
        is_there = attention_mask.device.type == "jax"
        mask = attention_mask if is_there else env.to_xla(attention_mask)
        visible = env.t2j_iso(mask).astype(bool)
    if visible is not None and not isinstance(visible, TRACER()) and bool(visible.all()):
        visible = None
    nothing = env.j2t_iso(jnp.zeros((1, 1, 0, 0)))
    return {"attention_mask": nothing, "row_attention": RowAttention(visible, implementation)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend_rows(
    q: jax.Array,  # [batch, num_q_heads, num_tokens, head_dim]
    k: jax.Array,  # [batch, num_kv_heads, num_tokens, head_dim]
    v: jax.Array,  # [batch, num_kv_heads, num_tokens, head_dim]
    visible: jax.Array | None,  # bool[batch, num_tokens]
    sm_scale: float,
    implementation: KernelImplementation,
) -> jax.Array:
    """Causal attention of every row by the op; its gradients are ordinary attention's.

    Returns:
      [batch, num_tokens, num_q_heads, head_dim]; zeros where nothing is visible.
    """
    batch, num_tokens = q.shape[0], q.shape[2]
    blocks = resolve_block_sizes(
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        dtype=q.dtype,
        num_tokens=batch * num_tokens,
        page_size=0,
    )
    schedule = _schedule_of(batch, num_tokens, blocks)
    out: jax.Array = _through_op(q, k, v, visible, schedule, sm_scale, implementation)
    return out


@functools.lru_cache(maxsize=64)
def _schedule_of(batch: int, num_tokens: int, blocks: Any) -> SegmentSchedule:
    layout = SegmentLayout.single(0, [num_tokens] * batch)
    return build_schedule(layout, block_sizes=blocks, page_size=0)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _through_op(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array | None,
    schedule: SegmentSchedule,
    sm_scale: float,
    implementation: KernelImplementation,
) -> jax.Array:
    batch, _, num_tokens, head_dim = q.shape
    if visible is not None:
        # a row's tokens in their order and padding behind them, where no token sees it
        order = jnp.argsort(~visible, axis=1, stable=True)
        q, k, v = (jnp.take_along_axis(x, order[:, None, :, None], axis=2) for x in (q, k, v))
    q, k, v = (
        jnp.swapaxes(x, 0, 1).reshape(x.shape[1], batch * num_tokens, head_dim) for x in (q, k, v)
    )
    out = segment_paged_attention(
        q, k, v, None, schedule, sm_scale=sm_scale, implementation=implementation
    )
    out = out.reshape(-1, batch, num_tokens, head_dim).transpose(1, 2, 0, 3)
    if visible is not None:
        back = jnp.argsort(order, axis=1)
        out = jnp.take_along_axis(out, back[:, :, None, None], axis=1)
        out = jnp.where(visible[:, :, None, None], out, 0)
    return out


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array | None,
    sm_scale: float,
    implementation: KernelImplementation,
) -> tuple[jax.Array, Any]:
    """The op has no gradients: where they are asked for, ordinary attention runs in its place."""

    def ordinary(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        seen = None if visible is None else visible[:, None, None, :]
        out = jax.nn.dot_product_attention(q, k, v, mask=seen, scale=sm_scale, is_causal=True)
        return out if visible is None else jnp.where(visible[:, :, None, None], out, 0)

    return jax.vjp(ordinary, q, k, v)


def _backward(
    sm_scale: float, implementation: KernelImplementation, pull: Any, gradient: jax.Array
) -> tuple[Any, ...]:
    return *pull(gradient), None


attend_rows.defvjp(_forward, _backward)
