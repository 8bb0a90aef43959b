"""The sizes of a model that costs, pages and launches depend on: the one reader of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a decoder; columns are what a token's row becomes."""

    layers: int
    heads: int  # of the queries
    kv_heads: int  # of the keys, and of the values
    head_dim: int
    hidden: int
    mlp: int  # columns of the MLP of a layer without experts
    experts: int = 0
    experts_per_token: int = 0
    expert_mlp: int = 0  # columns of one expert

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        """The sizes of a configuration."""
        heads, hidden = config.num_attention_heads, config.hidden_size
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        dense = config.num_hidden_layers, heads, kv_heads, head_dim, hidden
        experts = getattr(config, "num_experts", None)
        if not experts:
            return cls(*dense, config.intermediate_size)
        columns = getattr(config, "moe_intermediate_size", config.intermediate_size)
        mixture = experts, config.num_experts_per_tok, columns
        return cls(*dense, config.intermediate_size, *mixture)

    def cut(self, chips: int) -> ModelSizes:
        """What each of so many chips has of them: equal parts, and of few kv heads at least one.

        A chip has whole experts, of which a token meets one in as many; here it is that part of
        each.
        """
        return replace(
            self,
            heads=self.heads // chips,
            kv_heads=max(self.kv_heads // chips, 1),
            mlp=self.mlp // chips,
            expert_mlp=self.expert_mlp // chips,
        )

    @property
    def q(self) -> int:
        """Columns of the queries."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Columns of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    @property
    def inner(self) -> int:
        """Columns of the MLP, or of the experts that one token meets."""
        return self.experts_per_token * self.expert_mlp if self.experts else self.mlp

    @property
    def all_inner(self) -> int:
        """Columns of the MLP, or of all experts."""
        return self.experts * self.expert_mlp if self.experts else self.mlp

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

    def page_bytes(self, page_size: int, itemsize: int) -> int:
        """Bytes that one page of so many tokens takes in all layers."""
        return 2 * self.layers * self.kv * page_size * itemsize

    def activation_bytes(self, itemsize: int) -> int:
        """An upper estimate of what one packed token takes while a layer runs.

        Attention has queries, keys and values before and after the rotation, and two partial
        results in float32; the MLP has its gate, its other half, and what becomes of them.
        """
        attention = 4 * (self.q + 2 * self.kv) * itemsize + 12 * self.q
        return 3 * self.hidden * itemsize + max(attention, 4 * self.mlp * itemsize)
