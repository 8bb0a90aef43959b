"""What the benchmarks run: the reference request, Qwen3's sizes, and models of its shape.

torch and transformers are imported inside: the TPU compiler's environment comes before them.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM


class Request(NamedTuple):
    """One query and its items, in tokens."""

    prefix_len: int
    num_items: int
    item_len: int

    @property
    def item_lens(self) -> tuple[int, ...]:
        """Of each item."""
        return (self.item_len,) * self.num_items


REFERENCE = Request(prefix_len=2000, num_items=500, item_len=20)

MODELS = {
    "0.6B": {"hidden": 1024, "intermediate": 3072, "layers": 28, "heads": 16, "tied": True},
    "1.7B": {"hidden": 2048, "intermediate": 6144, "layers": 28, "heads": 16, "tied": True},
    "4B": {"hidden": 2560, "intermediate": 9728, "layers": 36, "heads": 32, "tied": True},
    "8B": {"hidden": 4096, "intermediate": 12288, "layers": 36, "heads": 32, "tied": False},
    "14B": {"hidden": 5120, "intermediate": 17408, "layers": 40, "heads": 40, "tied": False},
    "32B": {"hidden": 5120, "intermediate": 25600, "layers": 64, "heads": 64, "tied": False},
}
KV_HEADS, HEAD_DIM, VOCAB_SIZE = 8, 128, 151_936
PEERS_VOCAB_SIZE = 4096  # of a model of which only labels are read


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for the sizes of a request; the reference's are the default."""
    parser.add_argument("--prefix", type=int, default=REFERENCE.prefix_len)
    parser.add_argument("--items", type=int, default=REFERENCE.num_items)
    parser.add_argument("--item-len", type=int, default=REFERENCE.item_len)


def config_of(model: str) -> Qwen3Config:
    """The configuration of one of the models."""
    return _config(
        model,
        vocab_size=VOCAB_SIZE,
        num_hidden_layers=MODELS[model]["layers"],
        max_position_embeddings=40_960,
        tie_word_embeddings=MODELS[model]["tied"],
        dtype="bfloat16",
    )


def _config(model: str, **options: Any) -> Qwen3Config:
    """A configuration of layers of the model's shape."""
    from transformers import Qwen3Config

    shape = MODELS[model]
    return Qwen3Config(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        **options,
    )


def slice_of(
    num_layers: int, vocab_size: int, dtype: torch.dtype, **options: Any
) -> Qwen3ForCausalLM:
    """Some layers of Qwen3-0.6B's shape, with random weights that are always the same."""
    import torch
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    config = _config("0.6B", vocab_size=vocab_size, num_hidden_layers=num_layers, **options)
    return Qwen3ForCausalLM(config).to(dtype).eval()


def make_model(dtype: torch.dtype) -> Qwen3ForCausalLM:
    """What is compared with its peers: four layers."""
    return slice_of(4, PEERS_VOCAB_SIZE, dtype, initializer_range=0.03)
