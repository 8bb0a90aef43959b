"""Whether hooks inside the decoder only look, or change what they see."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from packscore.interfaces import hooks_of


def hooked(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those of the modules that have forward hooks or forward pre-hooks."""
    return [module for module in modules if hooks_of(module)]


@contextmanager
def changes_by_hooks(modules: Iterable[nn.Module]) -> Iterator[list[str]]:
    """Within the block, forwards of this thread are watched for what hooks change in them.

    What goes into the modules' hooks is compared with what comes out of them, values and all: a
    hook may also write in place.

    Yields:
      Names of the modules' classes where something changed, once it has.
    """
    changed: list[str] = []
    with ExitStack() as stack:
        for module in modules:
            for handle in _watch(module, changed):
                stack.callback(handle.remove)
        yield changed


def _watch(module: nn.Module, changed: list[str]) -> Iterator[Any]:
    """Hooks before and behind all others of a module, and so around them."""
    thread = threading.get_ident()
    before: list[list[torch.Tensor]] = []

    def keep(*seen: Any) -> None:
        if threading.get_ident() == thread:
            before.append([tensor.clone() for tensor in _tensors(seen[1:])])

    def compare(*seen: Any) -> None:
        if threading.get_ident() == thread and not _equal(before.pop(), _tensors(seen[1:])):
            changed.append(type(module).__name__)

    yield module.register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
    yield module.register_forward_pre_hook(compare, with_kwargs=True)
    yield module.register_forward_hook(keep, prepend=True, with_kwargs=True)
    yield module.register_forward_hook(compare, with_kwargs=True)


def _equal(before: list[torch.Tensor], after: Iterable[torch.Tensor]) -> bool:
    now = list(after)
    return len(now) == len(before) and all(map(_same, before, now))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
