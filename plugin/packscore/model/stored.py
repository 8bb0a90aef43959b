"""Weights that torch has not: tensors without values, which know the files that have theirs.

A model of them is loaded in a moment and takes no memory; programs read of every weight the part
that a chip is to have. Whatever else would compute with one, write it, move it, copy it or save it
is an error by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from torch import nn

from packscore.errors import UnsupportedModelError

# From a path to the file, which is open for one read: what was read of it stays mapped until then.
Files = Callable[[Path], Any]


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, and where it lies in a weight.

    Args:
      file: of safetensors.
      name: of the tensor in it.
      start: of what it fills, along each axis of the weight.
      shape: of what it fills; where that has an axis more, as an expert of several has, it is 1.
    """

    file: Path
    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]

    def copy_to(self, target: torch.Tensor, files: Files, axis: int, rows: slice) -> None:
        """Fill what of these rows, along the axis, is in it: the target begins at their first."""
        start, size = self.start[axis], self.shape[axis]
        first, last = max(start, rows.start), min(start + size, rows.stop)
        if first >= last:
            return
        into = [slice(at, at + n) for at, n in zip(self.start, self.shape, strict=True)]
        into[axis] = slice(first - rows.start, last - rows.start)
        of = [slice(0, n) for n in self.shape]
        of[axis] = slice(first - start, last - start)
        stored = files(self.file).get_slice(self.name)
        # mapped from the file, and cast to the target's dtype where that is another
        target[tuple(into)].copy_(stored[tuple(of[-len(stored.get_shape()) :])])


def refuse(what: str) -> NoReturn:
    """Say by name that something would need weights which torch has not.

    Raises:
      UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        f"{what} would need the model's weights in torch, which with mesh=... went from the "
        "checkpoint to its chips alone; score it with MultiItemScorer, or load it without mesh to "
        "call, change, move, copy, save or unpatch it"
    )


def _refuse(self: torch.Tensor, *_: Any) -> NoReturn:
    refuse("reading or setting values")


class Stored(torch.Tensor):
    """A tensor whose values are in files, or few and kept beside it; torch has none of them."""

    pieces: tuple[Piece, ...]
    value: torch.Tensor | None  # of a buffer, which no checkpoint has

    def read(
        self, axis: int = 0, rows: slice | None = None, size: int | None = None
    ) -> torch.Tensor:
        """Values in memory of their own, in this tensor's dtype.

        Args:
          axis: along which only `rows` are read.
          rows: with a start and a stop; None reads all of it.
          size: rows of what is returned; behind those that were read there are zeros.
        """
        if self.value is not None:
            return self.value.clone()
        rows = rows or slice(0, self.shape[axis])
        shape = list(self.shape)
        shape[axis] = rows.stop - rows.start if size is None else size
        target = torch.zeros(shape, dtype=self.dtype)
        with ExitStack() as opened:
            files = functools.cache(lambda path: opened.enter_context(safe_open(path, "pt")))
            for piece in self.pieces:
                piece.copy_to(target, files, axis, rows)
        return target

    def read_rows(self, rows: list[int] | slice) -> torch.Tensor:
        """Rows by their numbers, or one after the other, in memory of their own."""
        each = [rows] if isinstance(rows, slice) else [slice(row, row + 1) for row in rows]
        return torch.cat([self.read(0, slice(*one.indices(len(self)))) for one in each])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is no method
        cls, func: Any, *_: Any, **__: Any
    ) -> NoReturn:
        """Whatever torch would compute."""
        refuse(f"torch's {func.overloadpacket.__name__!r}")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's is untyped
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"

    # these reach the memory past what torch dispatches
    data = property(_refuse, _refuse)
    numpy = tolist = share_memory_ = _refuse  # type: ignore[assignment]  # it returns nothing
    __deepcopy__ = __reduce_ex__ = _refuse


class StoredParameter(Stored, nn.Parameter):
    """The same as a parameter of a module."""


def stored(
    like: torch.Tensor, pieces: tuple[Piece, ...] = (), value: torch.Tensor | None = None
) -> Stored:
    """A tensor without values, of the shape and dtype of another, a parameter if that is one."""
    kind = StoredParameter if isinstance(like, nn.Parameter) else Stored
    found = torch.empty(like.shape, dtype=like.dtype, device="meta").as_subclass(kind)
    found.pieces, found.value = pieces, value
    return found


def refuse_state(module: nn.Module, *_: Any) -> NoReturn:
    """What stands before `load_state_dict` of a module that has such tensors."""
    refuse(f"load_state_dict of {type(module).__name__}")


def is_stored(model: nn.Module) -> bool:
    """Whether torch has not the weights of a model, which are in its checkpoint."""
    return any(isinstance(parameter, Stored) for parameter in model.parameters())
