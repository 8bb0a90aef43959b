"""A model's weights as jax arrays in the memory that torch keeps using."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from packscore.errors import UnsupportedModelError
from packscore.model.family import is_classifier, output_head
from packscore.model.masks import final_cap, windows_of
from packscore.model.place import is_on_torchax
from packscore.model.stored import is_stored
from packscore.model.weight_watch import WeightWatch, values_of
from packscore.programs.mesh.chips import ChipGroup
from packscore.programs.mesh.cuts import Cut, Cuts, lead_of
from packscore.programs.mesh.loading import load_weights
from packscore_kernels.hardware import shape_of

# Bytes to which arrays must be aligned that jax reads in place; others it copies.
JAX_ALIGNMENT = 64

# "embed_tokens", "rotary", "norm", "layers" (stacked), and "head" (vocabulary or classes) where it
# is not tied
Weights = dict[str, dict[str, Any]]


class DeviceWeights:
    """A model's weights on the chips of every copy, taken again when the model has others.

    Args:
      model: a plain Hugging Face model on the CPU.
      skeleton: the same without weights, by which it is checked.
      copies: where the weights are put, once each.
      cuts: over the chips of a copy.
      on_taken: each called with weights that were taken, before anybody else sees them.

    Raises:
      UnsupportedModelError: see `weights_of`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        skeleton: PreTrainedModel,
        copies: Sequence[ChipGroup],
        cuts: Cuts,
        on_taken: Sequence[Callable[[Weights], None]],
    ) -> None:
        self._skeleton = skeleton
        self._copies, self._cuts = copies, cuts
        self._on_taken = on_taken
        # how often the model was seen to be another
        self.generation = 0
        self._take(model)

    def _take(self, model: PreTrainedModel) -> None:
        whole: Any = model
        if is_stored(model):
            _check_same_modules(model, self._skeleton)
            of_copies = load_weights(model, self._copies, self._cuts)
        else:
            taken = weights_of(model, self._skeleton)
            of_copies = [put_weights(taken, chips, self._cuts) for chips in self._copies]
        arrays = of_copies[0]
        # what changes from here on is seen the next time
        watch = WeightWatch(model)
        is_one = len(self._copies) == len(self._copies[0]) == 1
        norm = whole.get_decoder().norm.weight
        self._is_shared = is_one and shares_memory(arrays["norm"]["weight"], norm)
        for told in self._on_taken:
            told(arrays)
        self.of_copies: list[Weights] = of_copies
        self._watch = watch

    @property
    def arrays(self) -> Weights:
        """Those of the first copy."""
        return self.of_copies[0]

    @property
    def dtype(self) -> Any:
        """In which programs compute."""
        return self.arrays["norm"]["weight"].dtype

    def sees_change(self, model: PreTrainedModel) -> bool:
        """Whether the model is another than it was when this last looked."""
        return self._watch.sees_change(model)

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the model is one for `follow`, and not for other programs."""
        return is_stored(model) or self._is_of_skeleton(model)

    def _is_of_skeleton(self, model: PreTrainedModel) -> bool:
        own, traced = (
            (one.config.num_hidden_layers, windows_of(one), final_cap(one), _shapes(one))
            for one in (model, self._skeleton)
        )
        return own == traced

    def follow(self, model: PreTrainedModel) -> None:
        """Take the weights again, unless torch wrote them where jax reads them.

        Raises:
          UnsupportedModelError: see `weights_of`; and a model whose weights came from its
            checkpoint has other modules, parameters or sizes than then.
        """
        if is_stored(model):
            if self._watch.sees_other_memory(model) or not self._is_of_skeleton(model):
                raise UnsupportedModelError(
                    "a module, hook, parameter or size of the model was changed, whose weights "
                    "went from the checkpoint to the chips of its mesh; undo that, change the "
                    "checkpoint and load it again, or load it without mesh"
                )
            self._watch = WeightWatch(model)
        elif self._is_shared and not self._watch.sees_other_memory(model):
            self._watch = WeightWatch(model)
        else:
            self._take(model)
        self.generation += 1


def put_weights(weights: Weights, chips: ChipGroup, cuts: Cuts) -> Weights:
    """Weights that are on one device, on the chips of a copy: of each chip its part."""
    if len(chips) == 1:
        places = {place for array in jax.tree.leaves(weights) for place in array.devices()}
        if places == {chips.first}:  # as those of a model on torchax: no second array of them
            return weights
        moved: Weights = jax.device_put(weights, chips.first)
        return moved
    return {
        group: {
            name: put_parts(np.asarray(array), chips, cuts.of(group, name), lead_of(group))
            for name, array in named.items()
        }
        for group, named in weights.items()
    }


def put_parts(array: npt.NDArray[Any], chips: ChipGroup, cut: Cut, lead: int) -> jax.Array:
    """An array of the host as one that the chips have in parts."""
    shape, parts = cut.local(array.shape, lead), []
    for chip, device in enumerate(chips.devices):
        part = array
        if cut.axis is not None:
            at = lead + cut.axis
            part = array[(*[slice(None)] * at, cut.part(array.shape[at], chip))]
            # behind the last row of an uneven cut there are zeros
            part = np.pad(part, [(0, n - have) for n, have in zip(shape, part.shape, strict=True)])
        parts.append(jax.device_put(part, device))
    sharding = chips.sharding(cut.spec(lead))
    whole = cut.whole(array.shape, lead)
    return jax.make_array_from_single_device_arrays(whole, sharding, parts)


def weights_of(model: PreTrainedModel, skeleton: PreTrainedModel) -> Weights:
    """The weights of a model as jax arrays, in the memory that torch keeps using.

    Raises:
      UnsupportedModelError: its modules are not those of the skeleton (an adapter or a quantised
        layer in place), or its weights are of another dtype or not on the CPU.
    """
    _check_same_modules(model, skeleton)
    whole: Any = model
    decoder, head = whole.get_decoder(), output_head(model)
    weights: Weights = {
        "layers": stacks_of(decoder.layers),
        "rotary": {name: to_jax(b) for name, b in decoder.rotary_emb.named_buffers()},
        "norm": {name: to_jax(p) for name, p in decoder.norm.named_parameters()},
        "embed_tokens": {name: to_jax(x) for name, x in _tensors(decoder.embed_tokens)},
    }
    if head.weight is not decoder.embed_tokens.weight:  # a tied one is there already
        weights["head"] = {"weight": to_jax(head.weight)}
    return weights


def weight_shapes(skeleton: PreTrainedModel, dtype: Any, cuts: Cuts) -> Weights:
    """What `put_weights` returns for such a model, as shapes alone."""
    whole: Any = skeleton
    decoder, head = whole.get_decoder(), output_head(skeleton)
    num_layers = len(decoder.layers)

    def shapes(named: Iterator[tuple[str, torch.Tensor]], *lead: int) -> dict[str, Any]:
        return {name: shape_of((*lead, *x.shape), dtype) for name, x in named}

    found: Weights = {
        "layers": shapes(decoder.layers[0].named_parameters(), num_layers),
        "norm": shapes(decoder.norm.named_parameters()),
        "embed_tokens": {
            **shapes(decoder.embed_tokens.named_parameters()),
            **{name: shape_of((), jnp.float32) for name, _ in decoder.embed_tokens.named_buffers()},
        },
        "rotary": {
            name: shape_of(tuple(x.shape), jnp.float32)
            for name, x in decoder.rotary_emb.named_buffers()
        },
    }
    if is_classifier(skeleton) or not skeleton.config.tie_word_embeddings:
        found["head"] = shapes(head.named_parameters())
    return {
        group: {
            name: shape_of(cuts.of(group, name).whole(x.shape, lead_of(group)), x.dtype)
            for name, x in named.items()
        }
        for group, named in found.items()
    }


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    # with a head that is tied to the embedding: moved to torchax, it is tied no more
    head = getattr(output_head(model), "weight", None)
    named = model.named_parameters(remove_duplicate=False)
    of_head = {name: parameter.shape for name, parameter in named if parameter is head}
    return {name: parameter.shape for name, parameter in model.named_parameters()} | of_head


def _check_same_modules(model: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    own, expected = _shapes(model), _shapes(skeleton)
    if own != expected:
        odd = sorted(set(own) ^ set(expected)) or [n for n in own if own[n] != expected[n]]
        raise UnsupportedModelError(
            f"parameter {odd[0]!r} is not one of a plain {type(model).__name__}; merge "
            "adapters (merge_and_unload()) and load weights unquantised"
        )
    numbers, expected_numbers = values_of(model), values_of(skeleton)
    for name, number in expected_numbers.items():
        if numbers.get(name) != number:
            raise UnsupportedModelError(
                f"{name} is {numbers.get(name)} and by the model's configuration {number}, which "
                "programs compute with; set it in the configuration, and patch the model anew"
            )
    place = "jax" if is_on_torchax(model) else "meta" if is_stored(model) else "cpu"
    for name, parameter in model.named_parameters():
        if parameter.device.type != place:
            raise UnsupportedModelError(
                f"parameter {name!r} is on {parameter.device}; load the model on the CPU, "
                "without device_map, or move all of it to torchax"
            )
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedModelError(
                f"parameter {name!r} is {parameter.dtype}; programs compute in bfloat16 or "
                "float32: load the model with dtype='bfloat16'"
            )


def stacks_of(layers: nn.ModuleList) -> dict[str, jax.Array]:
    """The stacked weights of equal layers, which the layers' own tensors are parts of from now on.

    Returns:
      {name inside a layer: [num_layers, ...]}.
    """
    if is_on_torchax(layers):
        from packscore.programs.stacked_rows import stack_rows

        return stack_rows(layers)
    return {name: to_jax(stack) for name, stack in stack_layers(layers).items()}


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
    if tensor.device.type == "jax":  # torchax's, around a jax array
        of_torchax: Any = tensor
        array: jax.Array = of_torchax.jax()
        return array
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
