"""Copies of a model on other devices of torch, which follow it, and the engines that run them."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from packscore.errors import UnsupportedModelError
from packscore.flows.engine import Engine, RowValues
from packscore.interfaces import hooks_of
from packscore.model.family import base_model
from packscore.model.label_head import LinearHead
from packscore.model.masks import MaskKind
from packscore.model.plain import foreign_part, theirs
from packscore.model.weight_watch import WeightWatch
from packscore.torch_engine.dense import DenseEngine
from packscore.torch_engine.engine import TorchEngine
from packscore.torch_engine.forward import ScoredRows

REMEDY = "patch the model without a list of devices"


class Replicas:
    """Copies of a model, made anew as a whole when it is seen to have changed.

    Args:
      model: held weakly.
      devices: of the copies beside it.
      has_own: the model itself is one more, where it is.

    Raises:
      UnsupportedModelError: a copy would not compute what the model does.
    """

    def __init__(
        self, model: PreTrainedModel, devices: Sequence[torch.device], *, has_own: bool
    ) -> None:
        self._model = weakref.ref(model)
        self.devices, self.has_own = tuple(devices), has_own
        self._lock = threading.Lock()
        self._watch: WeightWatch | None = None
        self._copies: list[PreTrainedModel | None] = [None] * len(devices)
        check_copied(model)

    @property
    def num_copies(self) -> int:
        """How many there are, the model itself included where it is one."""
        return len(self.devices) + int(self.has_own)

    @property
    def model(self) -> PreTrainedModel:
        """What they are copies of."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of these copies is gone; keep the model")
        return model

    def follow(self, number: int, *, force: bool = False) -> PreTrainedModel:
        """One of the copies, as the model is now.

        The first looks at the model for all, so that a run, which asks for the first one first,
        looks once.

        Raises:
          UnsupportedModelError: the model has something now that a copy would not follow.
        """
        with self._lock:
            if not number and (force or not self._watch or self._watch.sees_change(self.model)):
                # first: what changes from here on is seen the next time
                watch = WeightWatch(self.model)
                check_copied(self.model)
                self._watch, self._copies = watch, [None] * len(self.devices)
            found = self._copies[number]
            if found is None:
                found = copied(self.model, self.devices[number])
                self._copies[number] = found
            return found


# The copies of models patched with a list of devices, for as long as the models live.
_replicas: WeakKeyDictionary[PreTrainedModel, Replicas] = WeakKeyDictionary()


def replicas_of(model: nn.Module) -> Replicas | None:
    """The copies of a model that was patched with a list of devices."""
    return _replicas.get(base_model(model))


def replicate(model: nn.Module, devices: Sequence[torch.device]) -> None:
    """Let scorers of a model run on these devices, on one of them the model itself if it is there.

    Raises:
      UnsupportedModelError: a copy would not compute what the model does.
    """
    base, others = base_model(model), list(devices)
    has_own = base.device in others
    if has_own:
        others.remove(base.device)
    known = _replicas.get(base)
    if others and known and (known.devices, known.has_own) == (tuple(others), has_own):
        return
    drop_replicas(base)
    if others:
        _replicas[base] = Replicas(base, others, has_own=has_own)


def drop_replicas(model: nn.Module) -> None:
    """Undo `replicate`."""
    _replicas.pop(base_model(model), None)


def check_copied(model: PreTrainedModel) -> None:
    """Refuse, by name, what a copy on another device would not compute as the model does.

    Raises:
      UnsupportedModelError: there is some.
    """
    found = foreign_part(model) or _bound_part(model)
    if found:
        raise UnsupportedModelError(
            f"the model has {found}, which copies on several devices would not follow; take it "
            f"away, or {REMEDY}"
        )


def _bound_part(model: PreTrainedModel) -> str | None:
    """What ties a model to where it is."""
    for name, module in model.named_modules(remove_duplicate=False):
        if hooks_of(module) or theirs(module.__dict__.get("forward")) is not None:
            return f"a hook or a forward put on {type(module).__name__} {name!r}"
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if type(tensor) not in (torch.Tensor, nn.Parameter):
            return f"a {type(tensor).__name__} as its tensor {name!r}"
    places = sorted({str(tensor.device) for _, tensor in tensors})
    if len(places) > 1 or places == ["meta"]:
        return f"tensors on {', '.join(places)}"
    return None


@torch.no_grad()
def copied(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A copy of a model on a device, in eval mode; nothing of it is made anywhere else."""
    found: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        moved = tensor.detach().to(device, copy=True)
        is_parameter = isinstance(tensor, nn.Parameter)
        found[id(tensor)] = nn.Parameter(moved, requires_grad=False) if is_parameter else moved
    made: Any = copy.deepcopy(model, found)
    made.eval()
    return cast("PreTrainedModel", made)


class _Follows:
    """What both kinds of engine do for a copy: it is `_model`, and rows come to its source."""

    _replicas: Replicas
    _number: int
    _given: nn.Module
    _model: PreTrainedModel
    _head: LinearHead

    def _has_changed(self, *, force: bool) -> bool:
        """Take the copy of now; whether it is another than before."""
        model = self._replicas.follow(self._number, force=force)
        if model is self._given:
            return False
        self._given = self._model = model
        self._head = LinearHead(model)
        return True

    def _at_home(self, found: RowValues) -> RowValues:
        device = self._replicas.model.device
        moved = {name: None if x is None else x.to(device) for name, x in vars(found).items()}
        return replace(found, **moved)  # type: ignore[arg-type]  # its logits are always there


class TorchCopy(_Follows, TorchEngine):
    """`TorchEngine` on a copy.

    Args:
      replicas: of the model.
      number: which of them.
      cache_bytes: what the pages of prefixes may take.
    """

    def __init__(self, replicas: Replicas, number: int, cache_bytes: int) -> None:
        self._replicas, self._number = replicas, number
        model = replicas.follow(number)
        super().__init__(model, LinearHead(model), cache_bytes)

    def refresh(self, *, force: bool = False) -> None:
        """Look how much memory is free, and follow the model where it changed."""
        self._fitting_tokens = self._fitting()
        with self._lock:  # nobody else changes a copy
            if self._has_changed(force=force):
                self._renew()

    def read(self, launched: Sequence[ScoredRows]) -> RowValues:
        """What is read at all rows, where the model itself is."""
        return self._at_home(super().read(launched))


class DenseCopy(_Follows, DenseEngine):
    """`DenseEngine` on a copy.

    Args:
      replicas: of the model.
      number: which of them.
    """

    def __init__(self, replicas: Replicas, number: int) -> None:
        self._replicas, self._number = replicas, number
        model = replicas.follow(number)
        super().__init__(model, LinearHead(model))

    def refresh(self, *, force: bool = False) -> None:
        """Follow the model where it changed; nothing is kept."""
        self._has_changed(force=force)
        super().refresh(force=force)

    def read(self, launched: Sequence[ScoredRows]) -> RowValues:
        """What is read at all rows, where the model itself is."""
        return self._at_home(super().read(launched))


def torch_engines(
    model: nn.Module, head: LinearHead, cache_bytes: int, mask_impl: MaskKind
) -> list[Engine]:
    """An engine for a model, or for each of its copies.

    Args:
      model: as it was given.
      head: reads the labels.
      cache_bytes: what the pages of each may take.
      mask_impl: how items are kept apart.
    """
    replicas, is_dense = replicas_of(model), mask_impl == "dense"
    engines: list[Engine] = []
    if replicas is None or replicas.has_own:
        own: Engine = (
            DenseEngine(model, head) if is_dense else TorchEngine(model, head, cache_bytes)
        )
        engines.append(own)
    if replicas is not None:
        numbers = range(len(replicas.devices))
        engines += [
            DenseCopy(replicas, n) if is_dense else TorchCopy(replicas, n, cache_bytes)
            for n in numbers
        ]
    return engines
