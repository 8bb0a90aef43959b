"""Whether a model still computes what it did: its weights, modules, adapters and modes."""

from __future__ import annotations

import functools
import operator
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from packscore.interfaces import (
    BUFFERS,
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    MODULES,
    OPTIMIZER_STEPS,
    PARAMETERS,
    TENSOR_VERSION,
    TORCHAX_ARRAY,
    global_hooks,
)
from packscore.model.plain import theirs

# What decides which adapters of a PEFT layer are in effect, and how strongly.
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
# Values of this kind on a module are what it computes with beside its weights. Some are seen
# otherwise: sizes by the tensors, train mode by forwards, and a layer's place by where it is.
VALUES = (bool, int, float, str, type(None))
SEEN_OTHERWISE = frozenset(
    {
        *("training", "layer_idx", "name_or_path"),
        *("vocab_size", "num_embeddings", "in_features", "out_features"),
    }
)
# Values of every tensor that are compared: all of a model or a tensor that is no larger, of others
# so many, spread over the tensor.
WHOLE_MODEL = 2**19
WHOLE_TENSOR = 1024
SAMPLE = 32
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Signs:
    """Changes that tell of themselves: optimizer steps, and forwards in train mode."""

    def __init__(self) -> None:
        self.count = 0
        self._steps: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._trained: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        # by id: tensors compare by their values
        self._learned: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
        self._lock = threading.Lock()

    def stepped(self, optimizer: Optimizer, *_: Any) -> None:
        """torch calls it behind every step of every optimizer."""
        with self._lock:
            self.count += 1
            self._steps[optimizer] = self.count
            for p in _parameters_of(optimizer):
                if p.grad is not None and id(p) not in self._learned:
                    self._learned[id(p)] = p

    def has_learned(self, parameter: torch.Tensor) -> bool:
        """Whether an optimizer stepped with a gradient of it since `listen`."""
        return self._learned.get(id(parameter)) is parameter

    def trained(self, module: nn.Module) -> None:
        """The patched attention calls it in train mode."""
        with self._lock:
            self.count += 1
            self._trained[module] = self.count

    def since(self, count: int) -> tuple[list[Optimizer], list[nn.Module]]:
        """What stepped and what trained behind so many signs."""
        with self._lock:
            steps = [optimizer for optimizer, at in self._steps.items() if at > count]
            return steps, [module for module, at in self._trained.items() if at > count]


def _parameters_of(optimizer: Optimizer) -> Iterable[torch.Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


SIGNS = _Signs()


@functools.cache
def listen() -> None:
    """Have torch tell of optimizer steps; fused ones change weights and count no version."""
    OPTIMIZER_STEPS()(SIGNS.stepped)


class WeightWatch:
    """A model at one time, to be compared with later ones.

    It sees modules, parameters and buffers that were added, replaced, moved or cast; hooks and
    forwards put in their place; adapters that were switched; autocast. Of values that changed in
    place it sees what torch counts, steps of optimizers that hold them, forwards in train mode, and
    a sample of their bits: all of a small model, some of every tensor of a large one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._signs = SIGNS.count
        modules, self._objects, self._tensors = _walk(model)
        # torchax's, which a write gives another jax array
        self._on_torchax = [t for t in self._tensors if TORCHAX_ARRAY in t.__dict__]
        self._arrays = self._held()
        self._memory, self._state = self._places(), self._now(modules)
        self._sample = _Sample(self._tensors)

    def sees_change(self, model: nn.Module) -> bool:
        """Whether something is not what it was."""
        modules, objects, _ = _walk(model)
        if self._are_others(objects) or self._now(modules) != self._state:
            return True
        return self._was_trained(modules) or self._sample.differs()

    def sees_other_memory(self, model: nn.Module) -> bool:
        """Whether modules are others, or tensors lie elsewhere, whatever their values are."""
        _, objects, _ = _walk(model)
        return self._are_others(objects)

    def _are_others(self, objects: list[Any]) -> bool:
        is_same = len(objects) == len(self._objects)
        return (
            not is_same
            or not all(map(operator.is_, objects, self._objects))
            or not all(map(operator.is_, self._held(), self._arrays))
            or self._places() != self._memory
        )

    def _places(self) -> list[Any]:
        return [*(t.data_ptr() for t in self._tensors), *(t.dtype for t in self._tensors)]

    def _held(self) -> list[Any]:
        return [_weak(tensor.__dict__[TORCHAX_ARRAY]) for tensor in self._on_torchax]

    def _now(self, modules: Iterable[nn.Module]) -> list[Any]:
        versions = map(_version, self._tensors)
        return [*versions, *_adapters(modules), *_autocast(), *_configurations(modules)]

    def _was_trained(self, modules: Iterable[nn.Module]) -> bool:
        count = SIGNS.count
        if count == self._signs:
            return False
        optimizers, trained = SIGNS.since(self._signs)
        own = {id(module) for module in modules}
        if any(id(module) in own for module in trained) or self._are_held_by(optimizers):
            return True
        self._signs = count
        return False

    def _are_held_by(self, optimizers: Iterable[Optimizer]) -> bool:
        own = {t.untyped_storage().data_ptr() for t in self._tensors if t.data_ptr()}
        held = (p for one in optimizers for p in _parameters_of(one))
        return any(p.untyped_storage().data_ptr() in own for p in held)


class _Sample:
    """Bits of some values of tensors, as views that go with their memory, and what they were."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        whole = sum(t.numel() for t in tensors) <= WHOLE_MODEL
        # apart, because runs of memory are joined many times faster than others
        self._views: dict[tuple[torch.device, int, bool], list[torch.Tensor]] = {}
        for tensor in tensors:
            view = None if tensor.is_meta else _bits(tensor, whole)
            if view is not None:
                kind = view.device, view.element_size(), view.is_contiguous()
                self._views.setdefault(kind, []).append(view)
        self._bits = self._read()

    def differs(self) -> bool:
        """Whether a value changed."""
        return not all(map(torch.equal, self._read(), self._bits))

    @torch.inference_mode()
    def _read(self) -> list[torch.Tensor]:
        return [torch.cat(views) for views in self._views.values()]


@torch.inference_mode()
def _bits(tensor: torch.Tensor, whole: bool) -> torch.Tensor | None:
    """i*[num_values], a view of the tensor's memory; None where it has none of its own."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return None
    if not tensor.numel() or tensor.element_size() not in BITS:
        return None
    flat = tensor.data  # of a tensor of inference mode, detach() would count versions
    flat = flat.view(-1) if flat.is_contiguous() else _diagonal(flat)
    if not whole and flat.numel() > WHOLE_TENSOR:
        flat = flat[:: flat.numel() // SAMPLE]
    return flat.view(BITS[flat.element_size()])


def _diagonal(tensor: torch.Tensor) -> torch.Tensor:
    """Values that lie on the diagonal of a tensor that is no run of memory."""
    step = sum(tensor.stride())
    return tensor.as_strided((min(tensor.shape),), (step,), tensor.storage_offset())


def _walk(model: nn.Module) -> tuple[list[nn.Module], list[Any], list[torch.Tensor]]:
    """Modules, what identifies what they compute, and their tensors; it runs every request.

    Of modules and what hangs on them it gives weak references, one for each object as long as it
    lives: a watch keeps no model alive, and takes no new object for one that is gone.
    """
    modules: list[nn.Module] = []
    objects: list[Any] = []
    tensors: list[Any] = []
    stack: list[Any] = [model]
    hooks, pre_hooks = FORWARD_HOOKS.name, FORWARD_PRE_HOOKS.name
    parameters, buffers, children = PARAMETERS.name, BUFFERS.name, MODULES.name
    objects += global_hooks()
    while stack:
        module = stack.pop()
        if module is None:
            continue
        own = module.__dict__
        modules.append(module)
        kind = type(module)
        names = _NAMES.get(kind) or _names_of(kind, own)
        objects += (weakref.ref(module), kind.forward, *map(own.get, names))
        if "forward" in own and (forward := theirs(own["forward"])) is not None:
            objects.append(_weak(forward))
        if own[hooks]:
            objects += map(_weak, own[hooks].values())
        if own[pre_hooks]:
            objects += map(_weak, own[pre_hooks].values())
        tensors += own[parameters].values()
        tensors += own[buffers].values()
        stack += own[children].values()
    tensors = [tensor for tensor in tensors if tensor is not None]
    return modules, objects + tensors, tensors


# Of every class the names of its values, as its first instance had them.
_NAMES: dict[type[nn.Module], tuple[str, ...]] = {}


def _names_of(kind: type[nn.Module], own: dict[str, Any]) -> tuple[str, ...]:
    names = [n for n, x in own.items() if isinstance(x, VALUES) and not n.startswith("_")]
    # one at least, so that a class without any is known too
    _NAMES[kind] = tuple(n for n in names if n not in SEEN_OTHERWISE) or ("is_causal",)
    return _NAMES[kind]


def _weak(thing: Any) -> Any:
    try:
        return weakref.ref(thing)
    except TypeError:  # what knows no weak references
        return thing


_counted: Callable[[torch.Tensor], int] = operator.attrgetter(TENSOR_VERSION.name)


def _version(tensor: torch.Tensor) -> int:
    try:
        return _counted(tensor)
    except RuntimeError:  # tensors of inference mode do not count
        return 0


def values_of(model: nn.Module) -> dict[str, Any]:
    """What modules compute with beside their weights, by its name in the model."""
    return {
        f"{name}.{key}": module.__dict__[key]
        for name, module in model.named_modules(remove_duplicate=False)
        for key in _names_of(type(module), module.__dict__)
        if key in module.__dict__
    }


def _adapters(modules: Iterable[nn.Module]) -> list[str]:
    """What is in effect of every adapter's layer."""
    layers = [module for module in modules if _is_adapter(type(module))]
    return [repr([getattr(layer, name, None) for name in ADAPTER_STATE]) for layer in layers]


def _is_adapter(module_class: Any, known: dict[Any, bool] = {}) -> bool:  # noqa: B006
    if module_class not in known:
        known[module_class] = hasattr(module_class, "merged_adapters")
    return known[module_class]


def _configurations(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """What is set in the model's configuration, and in a wrapped one's."""
    owners = (module.__dict__.get("config") for module in modules if getattr(module, MODULES.name))
    found = {id(config): config for config in owners if isinstance(config, PreTrainedConfig)}
    return [
        {name: x for name, x in config.__dict__.items() if name[0] != "_"}
        for config in found.values()
    ]


def _autocast() -> tuple[Any, ...]:
    """What products are computed in, in this thread."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in kinds)
