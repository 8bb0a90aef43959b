"""Layers as modules that torchax calls: with jax values as keywords, or of some rows alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from packscore.model.last_layer import KeysValues, at_rows, keys_values


class KeysValuesOf(nn.Module):
    """A layer as what makes its keys and values."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden: torch.Tensor, rotary: KeysValues) -> KeysValues:
        """Of all tokens."""
        return keys_values(self.module, hidden, rotary)


class Bound(nn.Module):
    """A layer with the keywords that are jax values, and no torch ones, put in by hand."""

    def __init__(self, module: nn.Module, **keywords: Any) -> None:
        super().__init__()
        self.module = module
        self._keywords = keywords

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        return self.module(*args, attention_mask=None, **kwargs, **self._keywords)


class AtRows(Bound):
    """The same of some rows, between the keys and values of all tokens."""

    def forward(self, rows: Any, found: Any, hidden: Any, **kwargs: Any) -> Any:
        """Call `at_rows`."""
        return at_rows(self.module, rows, found, hidden, **kwargs, **self._keywords)
