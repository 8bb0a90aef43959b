"""LoRA adapters as models: each a twin of its base over the same tensors, with its own pages."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from os import PathLike

import torch
from torch import nn

from packscore.calls import program_of
from packscore.errors import UnsupportedModelError
from packscore.loading import add_adapter
from packscore.model.family import base_model
from packscore.scoring import MultiItemScorer


def with_adapter(scorer: MultiItemScorer, name_or_path: str | PathLike[str]) -> MultiItemScorer:
    """A scorer of a model with an adapter, beside the scorer of that model without it.

    The two share every tensor of the model; pages, and the queue, are each one's own.

    Args:
      scorer: of the model, in torch; it is not changed.
      name_or_path: of the adapter.

    Raises:
      UnsupportedModelError: the model runs in compiled programs, which hold weights of their own.
      LoadError: the adapter cannot be read, or is not one of this model.
    """
    if program_of(base_model(scorer.model)) is not None:
        raise UnsupportedModelError(
            f"adapter {name_or_path}: the model runs in compiled programs, which share no weights "
            "with those of another; serve it with --device cpu or cuda, or merge it into a "
            "checkpoint and serve that with --model"
        )
    tensors = list(_tensors(scorer.model))
    trained = [tensor.requires_grad for tensor in tensors]
    twin = copy.deepcopy(scorer, {id(tensor): tensor for tensor in tensors})
    try:
        add_adapter(base_model(twin.model), name_or_path)
    finally:
        # peft freezes what it adds to, and these tensors are the base's
        for tensor, is_trained in zip(tensors, trained, strict=True):
            tensor.requires_grad_(is_trained)
    twin.model.eval()
    return twin


def bytes_of(model: nn.Module, *, beside: nn.Module | None = None) -> int:
    """Bytes of a model's tensors, each storage once; those that another one has apart."""
    known = {} if beside is None else _storages(beside)
    return sum(size for start, size in _storages(model).items() if start not in known)


def _storages(model: nn.Module) -> dict[int, int]:
    storages = (tensor.untyped_storage() for tensor in _tensors(model))
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(model.parameters(), model.buffers())
