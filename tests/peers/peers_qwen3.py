"""What pytest loads into the tests of transformers: every Qwen3 that they make is patched.

A process that a test starts patches its models too. What `patch_model` refuses stays as it is.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing.process
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peers_outcomes import outcomes
from transformers.models.qwen3 import modeling_qwen3

import packscore
from packscore import patching

MAKERS = ("from_pretrained", "_from_config")
making = threading.local()
# of the test that runs: calls of the patched attention, models patched, and why others were not
counts: dict[str, Any] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Add to the outcome of a test what was patched in it."""
    counts.update(calls=0, models=0, refusals=[])
    found = yield
    if item.nodeid in outcomes:
        outcomes[item.nodeid].update(counts, refusals=sorted(set(counts["refusals"])))
    return found


def _patch(model: Any) -> None:
    try:
        packscore.patch_model(model)
        counts["models"] = counts.get("models", 0) + 1
    except packscore.UnsupportedModelError as refusal:
        counts.setdefault("refusals", []).append(str(refusal))


def _with_patch(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, whose model is patched when it is whole: behind the outermost of nested makers."""

    @functools.wraps(make)
    def run(owner: Any, *args: Any, **kwargs: Any) -> Any:
        is_outermost = not getattr(making, "depth", 0)
        making.depth = getattr(making, "depth", 0) + 1
        try:
            made = make(owner, *args, **kwargs)
        finally:
            making.depth -= 1
        if is_outermost:
            whole = owner if made is None else made[0] if isinstance(made, tuple) else made
            _patch(whole)
        return made

    return run


def _counted(attention: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(attention)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # which would trace again for every number
            counts["calls"] = counts.get("calls", 0) + 1
        return attention(*args, **kwargs)

    return run


def _taking_along(begin: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(begin)
    def run(process: Any, *args: Any, **kwargs: Any) -> None:
        begin(process, *args, **kwargs)
        process.taken_along = _patch  # a child that unpickles it imports this module

    return run


def _put_in_place() -> None:
    patching.packed_attention = _counted(patching.packed_attention)
    base: Any = modeling_qwen3.Qwen3PreTrainedModel
    for name in MAKERS:
        setattr(base, name, classmethod(_with_patch(getattr(base, name).__func__)))
    for _, kind in inspect.getmembers(modeling_qwen3, inspect.isclass):
        if issubclass(kind, base) and kind is not base:
            kind.__init__ = _with_patch(kind.__init__)
    process: Any = multiprocessing.process.BaseProcess
    process.__init__ = _taking_along(process.__init__)


if "PEERS_WITHOUT" not in os.environ:
    _put_in_place()
