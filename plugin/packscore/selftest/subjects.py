"""What a selftest scores: the shipped model, Qwen3-0.6B or some layers of it, random requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from packscore.errors import InputError
from packscore.loading import load_model
from packscore.shipped import shipped_model_path

Ids = list[int]
# Of Qwen3-0.6B; with fewer layers and a smaller vocabulary where a CPU is to be done in seconds.
WHOLE, FEW = {"layers": 28, "vocab_size": 151_936}, {"layers": 2, "vocab_size": 4096}


@dataclass(frozen=True)
class Request:
    """The sizes of one request, in tokens.

    Args:
      query_len: of the query.
      num_items, item_len: of its items.
    """

    query_len: int
    num_items: int
    item_len: int

    @classmethod
    def of(cls, query_len: int, items: str) -> Request:
        """From `--query 95 --items 40x70`.

        Raises:
          InputError: it is no such text.
        """
        number, _, length = items.partition("x")
        if not (number.isdecimal() and length.isdecimal() and int(number) and int(length)):
            raise InputError(
                f"--items={items!r} must be a number of items and their tokens: --items 500x20"
            )
        return cls(query_len, int(number), int(length))

    def drawn(self, seed: int, vocab_size: int) -> tuple[Ids, list[Ids]]:
        """A query and its items, all different from those of another seed."""
        rng = np.random.default_rng(seed)
        query = rng.integers(1, vocab_size, self.query_len).tolist()
        items = rng.integers(1, vocab_size, (self.num_items, self.item_len)).tolist()
        return query, items

    def __str__(self) -> str:
        return f"query {self.query_len:,}, {self.num_items:,} items x {self.item_len:,}"


REFERENCE, SMALL = Request(2000, 500, 20), Request(120, 24, 20)
# Odd sizes, an empty item among them.
CHECKED_QUERY, CHECKED_ITEMS = 67, (5, 1, 30, 0, 17, 5)


@dataclass(frozen=True)
class Subject:
    """A model by the name that a report has for it."""

    name: str
    model: PreTrainedModel


def shipped(dtype: torch.dtype) -> Subject:
    """The reranker inside the package."""
    return Subject("shipped reranker", load_model(shipped_model_path(), dtype=dtype))


def reference(name: str | None, dtype: torch.dtype, *, is_small: bool) -> Subject:
    """The model that is timed.

    Args:
      name: hub name or folder; None: Qwen3-0.6B's shape with random weights.
      dtype: of its weights.
      is_small: two of its layers, a small vocabulary.
    """
    if name is not None:
        return Subject(name, load_model(name, dtype=dtype))
    sizes = FEW if is_small else WHOLE
    config = Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    # Any: `to` and `eval` are untyped in transformers
    random: Any = Qwen3ForCausalLM(config)
    layers = f"{sizes['layers']} layers of " if is_small else ""
    return Subject(f"{layers}Qwen3-0.6B's shape, random weights", random.to(dtype).eval())


def checked_request(vocab_size: int) -> tuple[Ids, list[Ids]]:
    """A small request of odd sizes."""
    rng = np.random.default_rng(0)
    query = rng.integers(1, vocab_size, CHECKED_QUERY).tolist()
    return query, [rng.integers(1, vocab_size, n).tolist() for n in CHECKED_ITEMS]
