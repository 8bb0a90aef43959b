"""Weights of a checkpoint straight to the chips: each part is read, and sent to where it belongs.

A tensor of the files is read once, whatever chips have a part of it. The host holds one part at a
time, and a chip its own parts and those of one layer twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from packscore.model.family import output_head
from packscore.model.stored import Stored
from packscore.programs.mesh.chips import ChipGroup
from packscore.programs.mesh.cuts import Cut, Cuts

Arrays = dict[str, jax.Array]
CutOf = Callable[[str], Cut]


def load_weights(
    model: PreTrainedModel, copies: Sequence[ChipGroup], cuts: Cuts
) -> list[dict[str, Arrays]]:
    """The weights of a model whose tensors are in files, on the chips of every copy.

    Args:
      model: whose tensors are `Stored`.
      copies: the chips of each, as many in each.
      cuts: over the chips of a copy.

    Returns:
      Of each copy what `put_weights` would give of the model's weights.
    """
    whole: Any = model
    decoder, head = whole.get_decoder(), output_head(model)
    groups = {name: _tensors(getattr(decoder, name)) for name in ("norm", "embed_tokens")}
    groups["rotary"] = _tensors(decoder.rotary_emb)
    if head.weight is not decoder.embed_tokens.weight:  # a tied one is there already
        groups["head"] = {"weight": head.weight}
    of_layers = [dict(layer.named_parameters()) for layer in decoder.layers]
    layers = _stacked(of_layers, copies, functools.partial(cuts.of, "layers"))
    found: list[dict[str, Arrays]] = [{"layers": stacks} for stacks in layers]
    for group, named in groups.items():
        parts = _on_chips(named, copies, functools.partial(cuts.of, group))
        for weights, own in zip(found, parts, strict=True):
            weights[group] = own
    return found


def _tensors(module: Any) -> dict[str, Stored]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _stacked(
    layers: Sequence[Mapping[str, Stored]], copies: Sequence[ChipGroup], cut_of: CutOf
) -> list[Arrays]:
    """The weights of equal layers, [num_layers, ...] each."""
    stacks = [_Stacks(len(layers), chips, cut_of) for chips in copies]
    for i, layer in enumerate(layers):
        of_copies = _on_chips(layer, copies, cut_of)
        for one in stacks:
            one.put(of_copies.pop(0), i)  # and nobody else has it
        _wait([one.arrays for one in stacks])
    return [one.arrays for one in stacks]


class _Stacks:
    """Weights of equal layers on the chips of one copy, where one layer after the other is put."""

    def __init__(self, num_layers: int, chips: ChipGroup, cut_of: CutOf) -> None:
        self.arrays: Arrays = {}
        self._num_layers, self._chips, self._cut_of = num_layers, chips, cut_of

    def put(self, layer: Arrays, i: int) -> None:
        """Put a layer into the memory that is there, on every chip for itself."""
        if not self.arrays:
            places = {name: self._chips.sharding(self._cut_of(name).spec(1)) for name in layer}
            shapes = {name: (self._num_layers, *x.shape) for name, x in layer.items()}
            kinds = {name: x.dtype for name, x in layer.items()}
            self._put = jax.jit(_put, donate_argnums=0, out_shardings=places)
            self.arrays = jax.jit(
                lambda: {name: jnp.zeros(shape, kinds[name]) for name, shape in shapes.items()},
                out_shardings=places,
            )()
        self.arrays = self._put(self.arrays, layer, i)


def _put(stacks: Arrays, layer: Arrays, i: jax.Array) -> Arrays:
    update = jax.lax.dynamic_update_index_in_dim
    return {name: update(stack, layer[name], i, 0) for name, stack in stacks.items()}


def _on_chips(
    named: Mapping[str, Stored], copies: Sequence[ChipGroup], cut_of: CutOf
) -> list[Arrays]:
    """Weights by name, on the chips of every copy."""
    found: list[Arrays] = [{} for _ in copies]
    for name, weight in named.items():
        cut = cut_of(name)
        parts: list[list[jax.Array]] = [[] for _ in copies]
        for values, chips in _parts(weight, cut):
            for own, copy in zip(parts, copies, strict=True):
                own += [jax.device_put(values, copy.devices[chip]) for chip in chips]
            del values
            _wait(parts)
        whole = cut.whole(tuple(weight.shape))
        for arrays, copy, own in zip(found, copies, parts, strict=True):
            place = copy.sharding(cut.spec())
            arrays[name] = jax.make_array_from_single_device_arrays(whole, place, own)
    return found


def _wait(sent: Any) -> None:
    """Until arrays are there, so that what they were made of is let go of before more is read."""
    for array in jax.tree.leaves(sent):
        array.block_until_ready()


def _parts(weight: Stored, cut: Cut) -> Iterator[tuple[npt.NDArray[Any], range]]:
    """Each part that differs, in the order of the chips, and the chips that have it."""
    if cut.axis is None:
        yield _to_numpy(weight.read()), range(cut.chips)
        return
    shape, sharers = tuple(weight.shape), cut.chips // cut.parts
    for first in range(0, cut.chips, sharers):
        own = cut.axis, cut.part(shape[cut.axis], first), cut.local(shape)[cut.axis]
        yield _to_numpy(weight.read(*own)), range(first, first + sharers)


def _to_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The same memory for numpy, whose bfloat16 is an extension that torch does not know."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return np.asarray(tensor)
