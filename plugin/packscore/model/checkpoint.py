"""Which tensors of a checkpoint's files are which weights of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from packscore.interfaces import INITIALIZE
from packscore.model.stored import Piece, Stored, refuse_state, stored

# Kinds of numbers that are weights as they are; others need scales to become some.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A mixture's weights, and what of each expert a checkpoint may have in the place of one for all.
# Source: transformers, conversion_mapping.py, "qwen2_moe"
EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Rows of two weights that are compared at a time.
COMPARED_ROWS = 2**14


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a file."""

    file: Path
    shape: tuple[int, ...]
    kind: str  # of numbers, as safetensors calls it

    @classmethod
    def all_of(cls, files: Iterable[Path]) -> dict[str, FileTensor]:
        """All tensors of files of safetensors, of which only the beginning is read."""
        found = {}
        for path in files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - no dictionary
                    part = file.get_slice(name)
                    found[name] = cls(path, tuple(part.get_shape()), part.get_dtype())
        return found


@dataclass
class Misfits:
    """What of a checkpoint is not as a model needs it, by name."""

    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    quantised: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str | None:
        """Why the model cannot be loaded, with the first names; None: it can."""
        again = "so they would be random; download or save it again, or name the model that was"
        other = "name the model that was"
        for told, names in (
            (f"no {{}}, {again} meant", self.missing),
            (f"{{}} of another shape than the configuration, {again} meant", self.mismatched),
            (f"{{}}, which are quantised; {other} not", self.quantised),
            (f"{{}}, which the model of its configuration has not; {other} meant", self.unexpected),
            (
                f"{{}} of different values, which its configuration ties; {other} meant",
                self.differing,
            ),
        ):
            if names:
                more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
                return f"the checkpoint has {told.format(', '.join(sorted(names)[:3]) + more)}"
        return None


def store_weights(model: PreTrainedModel, tensors: Mapping[str, FileTensor]) -> Misfits:
    """Give a model on the meta device tensors that know where their values are, in place.

    Args:
      model: none of whose tensors has values.
      tensors: of its checkpoint.

    Returns:
      What does not fit; the model is of use where there is nothing.
    """
    _store_buffers(model)
    module: Any  # whose hooks are untyped
    for module in model.modules():
        module.register_load_state_dict_pre_hook(refuse_state)
    misfits, taken = Misfits(), set[str]()
    names_of: dict[nn.Parameter, list[str]] = {}
    tied: list[tuple[list[str], list[Stored]]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)  # several, of a head that is tied
    for parameter, names in names_of.items():
        found = [_Named(model, tensors, name, parameter) for name in names]
        present = [one for one in found if one.is_there] or found[:1]
        weights = [stored(parameter, one.pieces(misfits)) for one in present]
        taken |= {piece.name for weight in weights for piece in weight.pieces}
        if len(weights) > 1:
            tied.append((names, weights))
        for name in names:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, weights[0])
    if not (misfits.missing or misfits.mismatched or misfits.quantised):
        for names, weights in tied:
            misfits.differing += [] if _are_equal(*weights) else names
    misfits.unexpected = sorted(n for n in tensors.keys() - taken if _is_of(model, n))
    return misfits


def _store_buffers(model: PreTrainedModel) -> None:
    """Have transformers compute what no checkpoint has, as it does when it loads one."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty_like(buffer, device="cpu"), persistent=False)
        getattr(model, INITIALIZE.name)(module)
        for name, value in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, stored(value, value=value), persistent=False)


class _Named:
    """A weight by one of its names, and where a checkpoint has it."""

    def __init__(
        self,
        model: PreTrainedModel,
        tensors: Mapping[str, FileTensor],
        name: str,
        parameter: torch.Tensor,
    ) -> None:
        self._tensors = tensors
        self._prefix = f"{model.base_model_prefix}."
        shape = tuple(parameter.shape)
        self._parts = [(name, (0,) * len(shape), shape)]
        self._lead = 0  # axes of a part that its tensor has not
        owner, _, last = name.rpartition(".")
        if last in EXPERTS and self._found(name) is None:
            self._lead = 1
            kinds, rows = EXPERTS[last], shape[1] // len(EXPERTS[last])
            self._parts = [
                (f"{owner}.{expert}.{kind}.weight", (expert, i * rows, 0), (1, rows, *shape[2:]))
                for expert in range(shape[0])
                for i, kind in enumerate(kinds)
            ]

    def _found(self, name: str) -> str | None:
        """What the checkpoint calls it: those of a decoder alone lack its name in the model."""
        names = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((one for one in names if one in self._tensors), None)

    @property
    def is_there(self) -> bool:
        """Whether the checkpoint has any of it."""
        return any(self._found(name) for name, *_ in self._parts)

    def pieces(self, misfits: Misfits) -> tuple[Piece, ...]:
        """What it consists of; what is not right goes to the misfits."""
        pieces = []
        for name, start, shape in self._parts:
            found = self._found(name)
            if found is None:
                misfits.missing.append(name)
                continue
            tensor = self._tensors[found]
            pieces.append(Piece(tensor.file, found, start, shape))
            if tensor.shape != shape[self._lead :]:
                misfits.mismatched.append(found)
            if tensor.kind not in FLOATS:
                misfits.quantised.append(f"{found} ({tensor.kind})")
        return tuple(pieces)


def _are_equal(weight: Stored, other: Stored) -> bool:
    """Whether two weights have the same values."""
    for first in range(0, len(weight), COMPARED_ROWS):
        rows = slice(first, min(first + COMPARED_ROWS, len(weight)))
        if not torch.equal(weight.read(0, rows), other.read(0, rows)):
            return False
    return True


def _is_of(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor belongs to a module of the model, whatever that computes with it.

    Old checkpoints have the angles of rotary embeddings, which are computed.
    """
    decoder: Any = model.base_model
    parts = {model.base_model_prefix, *dict(model.named_children())}
    parts |= dict(decoder.named_children()).keys()
    return name.partition(".")[0] in parts and "rotary_emb." not in name
