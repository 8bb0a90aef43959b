"""The sizes of a model that costs, pages and launches depend on: the one reader of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that costs depend on; columns are what a token's row becomes."""

    layers: int
    heads: int
    q: int  # columns of the queries
    kv: int  # of the keys, and of the values
    hidden: int
    inner: int  # of the MLP, or of the experts that one token meets
    all_inner: int  # of all experts

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        """The sizes of a configuration."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        inner = all_inner = config.intermediate_size
        experts = getattr(config, "num_experts", None)
        if experts:
            inner = config.num_experts_per_tok * config.moe_intermediate_size
            all_inner = experts * config.moe_intermediate_size
        q, kv = heads * head_dim, kv_heads * head_dim
        return cls(config.num_hidden_layers, heads, q, kv, hidden, inner, all_inner)

    @property
    def weights(self) -> int:
        """Weights of a layer that one token is multiplied with."""
        return self.hidden * (2 * self.q + 2 * self.kv + 3 * self.inner)

    @property
    def all_weights(self) -> int:
        """Weights of all layers."""
        return self.layers * self.hidden * (2 * self.q + 2 * self.kv + 3 * self.all_inner)

    @property
    def columns(self) -> int:
        """Columns that a layer's products write for one token."""
        return self.q + 2 * self.kv + 2 * self.hidden + 2 * self.inner


def activation_bytes(config: Any, dtype: torch.dtype) -> int:
    """An upper estimate of what one packed token takes while a layer runs.

    Attention has queries, keys and values before and after the rotation, and two partial results
    in float32; the MLP has its gate, its other half, and what becomes of them.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    attention = 4 * head_dim * (heads + 2 * kv_heads) * dtype.itemsize + 12 * head_dim * heads
    mlp = 4 * getattr(config, "intermediate_size", 4 * config.hidden_size) * dtype.itemsize
    return int(3 * config.hidden_size * dtype.itemsize + max(attention, mlp))


def page_bytes(config: object, dtype: Any, page_size: int) -> int:
    """Bytes that one page takes in all layers of a model of this configuration."""
    heads = int(getattr(config, "num_attention_heads", 1))
    hidden = int(getattr(config, "hidden_size", 1))
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layers = int(getattr(config, "num_hidden_layers", 1))
    return int(2 * layers * kv_heads * head_dim * page_size * dtype.itemsize)
