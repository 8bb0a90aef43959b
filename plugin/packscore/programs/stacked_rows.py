"""A model that is on torchax: its layers' tensors become rows of stacks, which programs read.

A torchax tensor is a torch tensor around a jax array, `_elem`, and a write gives it another one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import nn

from packscore.errors import UnsupportedModelError
from packscore.interfaces import TORCHAX_ARRAY
from packscore.programs.interfaces import TENSOR, TO_TORCH_DTYPE

Tensor: Any = TENSOR()


class StackedRow(Tensor):  # type: ignore[misc]
    """A layer's tensor without an array of its own: whoever reads it gets its row of a stack.

    Written to, it is an ordinary torchax tensor again.
    """

    # the array that a watch of the weights knows this tensor by is the whole stack
    _row: int

    @property
    def _elem(self) -> jax.Array:
        row: jax.Array = _row_of(self.__dict__[TORCHAX_ARRAY], self._row)
        return row

    @_elem.setter
    def _elem(self, value: jax.Array) -> None:
        self.__class__ = Tensor
        setattr(self, TORCHAX_ARRAY, value)

    @property
    def shape(self) -> torch.Size:
        """Known without the row, as is what follows."""
        return torch.Size(self.__dict__[TORCHAX_ARRAY].shape[1:])

    @property
    def ndim(self) -> int:
        """Axes of the row."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The stack's."""
        found: torch.dtype = TO_TORCH_DTYPE()(self.__dict__[TORCHAX_ARRAY].dtype)
        return found

    @property
    def jax_device(self) -> Any:
        """Where the stack is."""
        return self.__dict__[TORCHAX_ARRAY].device


@jax.jit
def _row_of(stack: jax.Array, row: int) -> jax.Array:
    found: jax.Array = jax.lax.dynamic_index_in_dim(stack, row, keepdims=False)
    return found


@jax.jit
def _stack(*rows: jax.Array) -> jax.Array:
    stack: jax.Array = jnp.stack(rows)
    return stack


def stack_rows(layers: nn.ModuleList) -> dict[str, jax.Array]:
    """Stack the weights of equal layers, and make the layers' own tensors rows of the stacks.

    One weight of all layers exists twice at a time, and none afterwards.

    Returns:
      {name inside a layer: [num_layers, ...]}.
    """
    owners = [dict(layer.named_parameters()) for layer in layers]
    return {name: _stacked([owner[name] for owner in owners]) for name in owners[0]}


def _stacked(tensors: list[Any]) -> jax.Array:
    stack: jax.Array = held_array(tensors[0])
    is_whole = stack.shape[:1] == (len(tensors),)
    if is_whole and all(_is_row(tensor, stack, i) for i, tensor in enumerate(tensors)):
        return stack
    stack = _stack(*(tensor.jax() for tensor in tensors))
    for i, tensor in enumerate(tensors):
        tensor.__class__ = StackedRow
        tensor.__dict__.update({TORCHAX_ARRAY: stack, "_row": i})
    return stack


def _is_row(tensor: Any, stack: jax.Array, row: int) -> bool:
    return type(tensor) is StackedRow and held_array(tensor) is stack and tensor._row == row


def held_array(tensor: torch.Tensor) -> jax.Array:
    """What a torchax tensor keeps alive: an array of its own, or the stack that it is a row of."""
    array: jax.Array = tensor.__dict__[TORCHAX_ARRAY]
    return array


def place_of(model: nn.Module) -> jax.Device:
    """The one jax device that a model's weights are on.

    Raises:
      UnsupportedModelError: they are on several.
    """
    on_torchax = (p for p in model.parameters() if isinstance(p, Tensor))
    found = {device for p in on_torchax for device in held_array(p).devices()}
    if len(found) != 1:
        names = ", ".join(sorted(map(str, found)))
        raise UnsupportedModelError(
            f"the model's weights are on {len(found)} devices ({names}), and a program runs on "
            "one; move the model to one device"
        )
    return found.pop()
