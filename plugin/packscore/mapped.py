"""Memory-mapped checkpoints: give back the pages of weights that were copied out of them."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import torch

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
