"""What the chips of one copy tell each other inside a traced function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from packscore.programs.mesh.cuts import MODEL


@dataclass(frozen=True)
class ModelAxis:
    """The chips that run a traced function together, each on its part of the weights.

    One chip has nobody to ask: all of this is then what it would be without.

    Args:
      chips: how many.
    """

    chips: int = 1

    @property
    def share(self) -> float:
        """Of what all chips have: what each adds, so that the sum has it once."""
        return 1 / self.chips

    def sum(self, x: jax.Array) -> jax.Array:
        """Over all chips, for all of them."""
        if self.chips == 1:
            return x
        out: jax.Array = lax.psum(x, MODEL)  # type: ignore[no-untyped-call]  # untyped in jax
        return out

    def largest(self, x: jax.Array) -> jax.Array:
        """Over all chips, for all of them."""
        if self.chips == 1:
            return x
        out: jax.Array = lax.pmax(x, MODEL)  # type: ignore[no-untyped-call]  # untyped in jax
        return out

    def logsumexp(self, x: jax.Array) -> jax.Array:
        """Over all chips, for all of them; -inf where all have that."""
        if self.chips == 1:
            return x
        found: jax.Array = jax.nn.logsumexp(lax.all_gather(x, MODEL), axis=0)
        return found

    def first(self, count: int) -> Any:
        """The number of this chip's first row, where every chip has `count` of them."""
        return lax.axis_index(MODEL) * count if self.chips > 1 else 0

    def own(self, ids: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """Which of some rows this chip has, and where: (bool, as ids; as ids, 0 where not)."""
        at = ids - self.first(count)
        is_own = (at >= 0) & (at < count)
        return is_own, jnp.where(is_own, at, 0)


ONE_CHIP = ModelAxis()
