"""What a skeleton's modules call while torchax traces them: attention and experts, in jax."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import torch
from torch import nn
from torch.nn import functional as F

from packscore.errors import InputError
from packscore.interfaces import FUNCTION_MODES, NO_DISPATCH_MODES, POP_FUNCTION_MODE
from packscore.model.last_layer import KeysValues, at_rows, keys_values
from packscore.model.place import TORCHTPU_STANDS_BEFORE_TORCHAX, torchtpu_is_loaded
from packscore.programs.interfaces import (
    DEFAULT_ENVIRONMENT,
    DEVICE_MODULE,
    imported,
)
from packscore.programs.mesh.axis import ONE_CHIP, ModelAxis
from packscore_kernels import (
    LiveTokens,
    PageWrites,
    ProjectionImplementation,
    SegmentSchedule,
    segment_paged_attention,
    write_kv_pages,
)
from packscore_kernels.attention.xla import segment_attention_dense
from packscore_kernels.layer.experts import ragged_product, through_experts
from packscore_kernels.row_attention.api import segment_attention_rows

# under which transformers finds both; no name of its own
NAME = "packscore_program"

# What every kernel of a program has: attention, page writes and the layer's products.
KernelImplementation = ProjectionImplementation

_lock = threading.Lock()


def torchax_environment() -> Any:
    """torchax's default environment, imported so that torch stays as it was in this process.

    Importing torchax registers an accelerator that is none: without this, `torch.compile` and
    `pin_memory` would believe in it.

    Raises:
      InputError: TorchTPU is in this process, which torchax cannot share.
      MissingPackageError, UnsupportedVersionError: torchax is not installed, or cannot be imported.
    """
    if torchtpu_is_loaded():
        raise InputError(f"device: {TORCHTPU_STANDS_BEFORE_TORCHAX}")
    with _lock:
        fast_path = torch.backends.mha.get_fastpath_enabled()
        try:
            imported("torchax")
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
        devices = DEVICE_MODULE()
        devices.is_available, devices.device_count = lambda: False, lambda: 0
        return DEFAULT_ENVIRONMENT()()


@dataclass
class LayerAttention:
    """The attention of one layer: who sees whom, and the pool of pages on its way through it."""

    schedule: SegmentSchedule  # of the layer's own pages
    implementation: KernelImplementation
    # [num_layers * num_pages, num_kv_heads, 2, page_size, head_dim]; None where nothing is cached
    kv_pages: jax.Array | None = None
    writes: PageWrites | None = None
    mask_impl: Literal["segment", "dense"] = "segment"
    window: jax.Array | None = None  # i32[]: how far back a row sees, under a dense mask
    live: LiveTokens | None = None  # None: all rows are computed
    axis: ModelAxis = ONE_CHIP  # the chips that have parts of its layer

    def __call__(
        self,
        q: jax.Array,  # [num_q_heads, num_tokens, head_dim]
        k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
        v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
        *,
        sm_scale: float,
        soft_cap: float | None = None,
    ) -> jax.Array:
        """Write what is new to the pages, which changes `kv_pages`, then attend.

        Returns:
          [num_q_heads, num_tokens, head_dim].
        """
        self.keep(k, v)
        implementation = self.implementation
        return segment_paged_attention(
            q,
            k,
            v,
            self.kv_pages,
            self.schedule,
            sm_scale=sm_scale,
            implementation="dense" if self.mask_impl == "dense" else implementation,
            soft_cap=soft_cap,
            sliding_window=self.window,
            live_tiles_only=self.live is not None,
        )

    def keep(self, k: jax.Array, v: jax.Array) -> None:
        """Write what is new to the pages, which changes `kv_pages`."""
        if self.kv_pages is not None and self.writes is not None:
            self.kv_pages = write_kv_pages(
                self.kv_pages, k, v, self.writes, implementation=self.implementation
            )

    def at_rows(
        self,
        q: jax.Array,  # [num_q_heads, num_rows, head_dim]
        k: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
        v: jax.Array,  # [num_kv_heads, num_tokens, head_dim]
        rows: jax.Array,  # i32[num_rows]
        *,
        sm_scale: float,
        soft_cap: float | None = None,
    ) -> jax.Array:
        """The attention of some rows, once the pages are written: as q."""
        given = q, k, v, self.kv_pages, self.schedule
        if self.mask_impl == "dense":
            return segment_attention_dense(
                *given,
                sm_scale=sm_scale,
                soft_cap=soft_cap,
                sliding_window=self.window,
                rows=rows,
            )
        given_rows = *given, rows
        implementation = self.implementation
        return segment_attention_rows(*given_rows, sm_scale=sm_scale, implementation=implementation)


@contextmanager
def torch_alone() -> Iterator[None]:
    """Within the block torch is itself, also where `torchax.enable_globally()` sends it to jax."""
    with ExitStack() as modes:
        while FUNCTION_MODES()():
            modes.enter_context(POP_FUNCTION_MODE()())
        modes.enter_context(NO_DISPATCH_MODES()())
        yield


def sum_over(axis: ModelAxis, linear: Any) -> None:
    """Let a product whose inputs the chips have in parts give them all the sum of their parts."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        env = torchax_environment()
        out: torch.Tensor = env.j2t_iso(axis.sum(env.t2j_iso(F.linear(x, linear.weight))))
        return out if linear.bias is None else out + linear.bias

    linear.forward = forward


def round_once(activation: nn.Module) -> None:
    """Let an activation compute in float32, as torch's own do of bfloat16, and not step by step."""
    own = activation.forward
    activation.forward = lambda x: own(x.float()).to(x.dtype)


def program_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_q_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    attention_mask: torch.Tensor | None,
    scaling: float,
    layer_attention: LayerAttention,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention that the skeleton's layers call while they are traced."""
    env = torchax_environment()
    q, k, v = (env.t2j_iso(x)[0] for x in (query, key, value))
    out = layer_attention(q, k, v, sm_scale=scaling, soft_cap=softcap)
    result: torch.Tensor = env.j2t_iso(jnp.transpose(out, (1, 0, 2))[None])
    return result, None


def program_experts(
    module: nn.Module,
    hidden_states: torch.Tensor,  # [num_tokens, hidden_size]
    top_k_index: torch.Tensor,  # i64[num_tokens, num_chosen]
    top_k_weights: torch.Tensor,  # [num_tokens, num_chosen]
) -> torch.Tensor:
    """The experts of a mixture while they are traced; see `packscore_kernels.layer.experts`."""
    env = torchax_environment()
    experts: Any = module
    tensors = (hidden_states, top_k_index, top_k_weights, experts.gate_up_proj, experts.down_proj)
    hidden, index, weights, gate_up, down = (env.t2j_iso(x) for x in tensors)

    def activation(gate: jax.Array) -> jax.Array:
        out: jax.Array = env.t2j_iso(experts.act_fn(env.j2t_iso(gate)))
        return out

    axis: ModelAxis = experts.model_axis
    is_own, own = axis.own(index, len(gate_up))
    chosen = jnp.where(is_own, own, len(gate_up))
    product = ragged_product(chosen, len(gate_up))
    out = axis.sum(through_experts(hidden, chosen, weights, gate_up, down, activation, product))
    result: torch.Tensor = env.j2t_iso(out)
    return result


class KeysValuesOf(nn.Module):
    """A layer as what makes its keys and values."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden: torch.Tensor, rotary: KeysValues) -> KeysValues:
        """Of all tokens."""
        return keys_values(self.module, hidden, rotary)


class Bound(nn.Module):
    """A layer with the keywords that are jax values, and no torch ones, put in by hand."""

    def __init__(self, module: nn.Module, **keywords: Any) -> None:
        super().__init__()
        self.module = module
        self._keywords = keywords

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        return self.module(*args, attention_mask=None, **kwargs, **self._keywords)


class AtRows(Bound):
    """The same of some rows, between the keys and values of all tokens."""

    def forward(self, rows: Any, found: Any, hidden: Any, **kwargs: Any) -> Any:
        """Call `at_rows`."""
        return at_rows(self.module, rows, found, hidden, **kwargs, **self._keywords)
