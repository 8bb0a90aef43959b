"""A model's weights as jax arrays in the memory that torch keeps using."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

# Bytes to which arrays must be aligned that jax reads in place; others it copies.
JAX_ALIGNMENT = 64

# "embed_tokens", "rotary", "norm", "layers" (stacked), and "head" (vocabulary or classes) where it
# is not tied
Weights = dict[str, dict[str, Any]]


def stack_layers(layers: nn.ModuleList) -> dict[str, torch.Tensor]:
    """Stack the weights of equal layers and make the layers' own parameters views of the stacks.

    One copy of one weight at a time exists beside the model's, and none afterwards: torch and jax
    read the same memory.

    Returns:
      {name inside a layer: [num_layers, ...]}.
    """
    stacks = {}
    files = MappedFiles()
    owners = [dict(layer.named_parameters()) for layer in layers]
    for name, first in owners[0].items():
        stack = torch.empty((len(owners), *first.shape), dtype=first.dtype)
        for row, owner in zip(stack, owners, strict=True):
            owner[name].data = files.move(owner[name].detach().contiguous(), row)
        stacks[name] = stack
    return stacks


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """The same memory as a jax array; a weight that jax could not read in place is moved first."""
    if tensor.data_ptr() % JAX_ALIGNMENT or not tensor.is_contiguous():
        before = tensor.detach().contiguous()
        tensor.data = MappedFiles().move(before, torch.empty_like(before))
    return jnp.from_dlpack(tensor.detach())


def shares_memory(array: jax.Array, tensor: torch.Tensor) -> bool:
    """Whether jax reads what torch writes; on another device it reads a copy."""
    on_cpu = all(device.platform == "cpu" for device in array.devices())
    return on_cpu and array.unsafe_buffer_pointer() == tensor.data_ptr()


def to_torch(array: Any) -> torch.Tensor:
    """A jax array's values as a torch tensor on the CPU, of the same dtype."""
    values = np.asarray(array)
    if values.dtype == jnp.bfloat16:  # numpy's is an extension that torch does not know
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.copy())


MAPS = Path("/proc/self/maps")
# Linux's "these pages are not needed soon": unlike MADV_DONTNEED it keeps what was written to them
MADV_PAGEOUT = 21
PIECE = 1 << 24  # elements


class MappedFiles:
    """The files that this process has mapped, as they were when this was made.

    transformers maps checkpoints, so that reading a weight leaves its pages in the process; after
    a copy they would count twice. Where the system tells nothing of mappings, nothing is released.
    """

    def __init__(self) -> None:
        lines = MAPS.read_text().splitlines() if MAPS.exists() else []
        # "7f00-7f10 r--p 00000000 fe:00 123   /path"; memory of no file has no path
        fields = [line.split(maxsplit=5) for line in lines]
        bounds = [field[0].split("-") for field in fields if field[5:] and field[5][0] == "/"]
        self._ranges = [(int(start, 16), int(end, 16)) for start, end in bounds]

    def move(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Copy a contiguous tensor, a piece at a time whose pages are then given back.

        The source stays what it is: read again, its pages come back from the file.
        """
        values, places = source.view(-1), target.view(-1)
        is_mapped = self._holds(source)
        for start in range(0, len(values), PIECE):
            piece = values[start : start + PIECE]
            places[start : start + PIECE].copy_(piece)
            if is_mapped:
                _release(piece)
        return target

    def _holds(self, tensor: torch.Tensor) -> bool:
        start = tensor.data_ptr()
        return any(low <= start < high for low, high in self._ranges)


def _release(tensor: torch.Tensor) -> None:
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last:  # a system that does not know this refuses, and keeps the pages
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_PAGEOUT
        )
