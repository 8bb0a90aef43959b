"""What a program under a dense mask takes of a device's memory, before it is taken."""

from __future__ import annotations

from typing import Any

import jax
import psutil

from packscore.model.masks import check_mask_fits
from packscore.model.sizes import ModelSizes
from packscore.programs.sizes import DenseKey, token_ladder


def free_bytes(device: jax.Device) -> int:
    """Memory that new arrays can have; a CPU's is the machine's."""
    stats: dict[str, Any] = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return int(psutil.virtual_memory().available)
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def pair_bytes(sizes: ModelSizes, itemsize: int, platform: str = "cpu") -> int:
    """Bytes for each pair of a token and a key, in the one layer that runs, as compilers count.

    The mask, and once more as numbers, by which NaN is kept where it belongs; the scores of all
    heads in float32; and where XLA does not fuse them into the product, as it does for a TPU, their
    exponentials and these in the values' dtype.
    """
    return 1 + 4 + sizes.heads * (4 if platform == "tpu" else 4 + 4 + itemsize)


def fitting_tokens(sizes: ModelSizes, itemsize: int, device: jax.Device, most: int) -> int:
    """The largest bucket up to `most` whose tokens fit under a mask now; the smallest if none."""
    room = free_bytes(device) // pair_bytes(sizes, itemsize, device.platform)
    ladder = token_ladder(most)
    return max((tokens for tokens in ladder if tokens**2 <= room), default=ladder[0])


def check_dense_fits(
    model: Any, sizes: ModelSizes, itemsize: int, device: jax.Device, key: DenseKey, longest: int
) -> None:
    """Say what a launch under a dense mask needs, before it exists.

    Args:
      model: whose program it is.
      sizes: of the model.
      itemsize: bytes of a value.
      device: where it runs.
      key: of the program.
      longest: tokens of its longest sequence.

    Raises:
      MaskTooLargeError: it needs more than is free on `device`.
    """
    per_pair = pair_bytes(sizes, itemsize, device.platform)
    what = (
        f"on {device} for {key.num_tokens:,} tokens that see up to {key.num_keys:,} "
        f"({per_pair} bytes for each pair)"
    )
    needed = per_pair * key.num_tokens * key.num_keys
    check_mask_fits(model, longest, needed, free_bytes(device), what)
