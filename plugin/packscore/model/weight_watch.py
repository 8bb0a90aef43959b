"""Whether a model's weights are still those that something was computed with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# What decides which adapters of a PEFT layer are in effect.
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


class WeightWatch:
    """The parameters of a model at one time, to be compared with later ones.

    It sees parameters that were added, replaced, moved or cast, and adapters that were switched.
    Values that changed in place are seen where torch counts them: not those written through
    `.data`, and not in inference mode.

    Args:
      model: the model.
      is_copied: something was computed of its weights, so that values that change in place matter.
    """

    def __init__(self, model: nn.Module, *, is_copied: bool) -> None:
        self._is_copied = is_copied
        # the parameters themselves: an id alone could be that of another one by now
        self._seen = [(p, *self._state(p)) for p in _parameters(model)]
        self._adapters = _adapters(model)

    def sees_change(self, model: nn.Module) -> bool:
        """Whether a parameter is not what it was."""
        seen = iter(self._seen)
        for parameter in _parameters(model):
            expected = next(seen, None)
            if expected is None or parameter is not expected[0]:
                return True
            if self._state(parameter) != expected[1:]:
                return True
        return next(seen, None) is not None or _adapters(model) != self._adapters

    def _state(self, parameter: torch.Tensor) -> tuple[int, int]:
        counts = self._is_copied and not parameter.is_inference()
        return parameter.data_ptr(), parameter._version if counts else 0


def _parameters(model: nn.Module) -> Iterator[torch.Tensor]:
    """All parameters; several times faster than `model.parameters()`, for it runs every request."""
    for module in _modules(model):
        yield from (p for p in module._parameters.values() if p is not None)


def _adapters(model: nn.Module) -> list[str]:
    found = []
    layer: Any
    for layer in _modules(model):
        if hasattr(type(layer), "merged_adapters"):
            found.append(repr([getattr(layer, name, None) for name in ADAPTER_STATE]))
    return found


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None:
            yield module
            modules.extend(module._modules.values())
