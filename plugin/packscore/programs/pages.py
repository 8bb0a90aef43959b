"""Keys and values of prefixes in pages, as one array that compiled programs change in place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from packscore.flows.page_pool import PAGE_SIZE, PrefixLease
from packscore.model.sizes import ModelSizes
from packscore.programs.mesh.chips import ChipGroup
from packscore.programs.mesh.cuts import MODEL, PartitionSpec
from packscore.programs.sizes import MAX_PAGES
from packscore_kernels.hardware import shape_of


def pages_within(sizes: ModelSizes, dtype: Any, cache_bytes: int) -> int:
    """Pages that so many bytes hold, and that a schedule can name."""
    page_bytes = sizes.page_bytes(PAGE_SIZE, jnp.dtype(dtype).itemsize)
    return min(cache_bytes // page_bytes, MAX_PAGES)


# How the chips of a copy share the array of pages: each has its heads of every page.
PAGES = PartitionSpec(None, MODEL)


def pool_struct(
    sizes: ModelSizes, dtype: Any, num_pages: int, num_chips: int = 1
) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the pages of all layers of a model, as one array.

    Args:
      sizes: of what each chip has of the model.
      dtype: of keys and values.
      num_pages: of a layer.
      num_chips: whose heads lie side by side.
    """
    page = (num_chips * sizes.kv_heads, 2, PAGE_SIZE, sizes.head_dim)
    return shape_of((sizes.layers * num_pages, *page), dtype)


class DevicePages:
    """Pages of all layers as one array, handed from launch to launch and changed in place.

    Args:
      num_pages: pages of a layer.
      struct: of the array, from `pool_struct`.
      chips: where it is.
    """

    def __init__(self, num_pages: int, struct: jax.ShapeDtypeStruct, chips: ChipGroup) -> None:
        self.num_pages = num_pages
        self.struct = struct
        self._place = chips.sharding(PAGES)
        self._array: jax.Array | None = None
        self._lock = threading.Lock()
        # called when a launch failed and took what was in the pages with it
        self.on_lost: Callable[[], None] = lambda: None

    def through(
        self,
        run: Callable[[jax.Array], tuple[Any, jax.Array]],
        leases: Sequence[PrefixLease | None] = (),
    ) -> Any:
        """Hand the array to a launch and keep what it makes of it.

        Args:
          run: the launch; the array is donated to it.
          leases: whose pages it reads.

        Raises:
          StalePrefixError: another launch failed since a lease was taken, and lost its pages.
        """
        with self._lock:
            for lease in leases:
                if lease is not None:
                    lease.check()
            array, self._array = self._array, None
            if array is None:
                array = jnp.zeros(self.struct.shape, self.struct.dtype, device=self._place)
            try:
                out, self._array = run(array)
            except BaseException:
                if array.is_deleted():
                    self.on_lost()
                else:
                    self._array = array
                raise
            return out

    def recover(self) -> None:
        """Let the array go if a launch that failed has spoilt it; waits for the device."""
        with self._lock:
            try:
                if self._array is not None:
                    self._array.block_until_ready()
            except Exception:
                self._array = None
                self.on_lost()
