"""The chips that one copy of a model is cut over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from packscore.programs.interfaces import SHARD_MAP
from packscore.programs.mesh.axis import ModelAxis
from packscore.programs.mesh.cuts import MODEL, PartitionSpec

REPLICATED = PartitionSpec()


def copies_told(copies: Sequence[ChipGroup]) -> str:
    """Where the copies of a model are, in words."""
    first, *others = copies
    if not others:
        return str(first)
    each = "a device" if len(first) == 1 else f"{len(first)} devices"
    return f"{len(copies)} copies, each on {each}, from {first.first} on"


@dataclass(frozen=True)
class ChipGroup:
    """The chips that one copy of a model is cut over.

    Args:
      devices: at least one, jax's or those of a topology; in this order they have the parts.
    """

    devices: tuple[Any, ...]

    @classmethod
    def of(cls, device: Any) -> ChipGroup:
        """One chip."""
        return cls((device,))

    def __len__(self) -> int:
        return len(self.devices)

    def __str__(self) -> str:
        return ", ".join(map(str, self.devices))

    @property
    def first(self) -> Any:
        """A chip that stands for all, which are of one kind."""
        return self.devices[0]

    @property
    def axis(self) -> ModelAxis:
        """What they tell each other."""
        return ModelAxis(len(self))

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Of jax, with the one axis that weights are cut over."""
        return Mesh(np.array(self.devices), (MODEL,))

    def sharding(self, spec: Any = REPLICATED) -> jax.sharding.Sharding:
        """Where an array is that is cut in this way."""
        if len(self) == 1:
            return SingleDeviceSharding(self.first)
        return NamedSharding(self.mesh, spec)

    def on_each(
        self, function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any
    ) -> Callable[..., Any]:
        """A function that each chip runs on its parts, as one of all chips' arrays.

        Args:
          function: of arrays, which `ModelAxis` speaks in.
          in_specs: how its arguments are cut, each a spec or a tree of them.
          out_specs: the same of what it returns.
        """
        if len(self) == 1:
            return function
        specs: dict[str, Any] = {"in_specs": in_specs, "out_specs": out_specs}
        # what is equal on all chips is so by what the function computes: the check knows no kernels
        shard_map: Callable[..., Callable[..., Any]] = SHARD_MAP()
        return shard_map(function, mesh=self.mesh, check_vma=False, **specs)
