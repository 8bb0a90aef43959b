"""The model as one traced function of its weights.

The user's model stays what it is. A skeleton on the meta device is traced through torchax; its
weights come in as an argument, so that nothing is baked into the program, and the decoder layers'
weights are stacked, so that one layer is compiled and scanned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedConfig, PreTrainedModel

from packscore.errors import UnsupportedModelError
from packscore.interfaces import (
    ATTENTION_REGISTRY,
    EXPERTS_REGISTRY,
    MODEL_OF_CONFIG,
    check_parts,
    set_attention_name,
    set_experts_name,
)
from packscore.model.family import TRACED_MODEL_TYPES
from packscore.model.masks import MaskKind, final_cap, windows_of
from packscore.programs.fused_layer import can_fuse, can_skip_tiles, fused_layer
from packscore.programs.head import by_rows, head_weight, label_head
from packscore.programs.interfaces import check_programs
from packscore.programs.launch_inputs import LaunchInputs
from packscore.programs.traced_ops import (
    NAME,
    KernelImplementation,
    LayerAttention,
    program_attention,
    program_experts,
    round_once,
    torch_alone,
    torchax_environment,
)
from packscore.programs.weights import Weights
from packscore_kernels import LiveTokens


def _check_equal_layers(model: Any) -> None:
    """Refuse layers of several kinds: one is traced and scanned for all.

    Raises:
      UnsupportedModelError: some layers have other weights than the first.
    """
    kinds = [
        {name: p.shape for name, p in layer.named_parameters()}
        for layer in model.get_decoder().layers
    ]
    odd = [i for i, kind in enumerate(kinds) if kind != kinds[0]]
    if odd:
        raise UnsupportedModelError(
            f"layer {odd[0]} has other weights than layer 0 (mlp_only_layers, decoder_sparse_step),"
            " and programs scan layers that are equal; patch the model without device=..."
        )


class TracedModel:
    """A Hugging Face decoder and its head as one function of (weights, tokens, layout, labels).

    Args:
      model_class: for instance `Qwen3ForCausalLM`.
      config: its configuration, which is copied.

    Raises:
      UnsupportedModelError: the family cannot be traced.
      UnsupportedVersionError: jax, torchax, torch or transformers has not what tracing reads.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        if config.model_type not in TRACED_MODEL_TYPES:
            raise UnsupportedModelError(
                f"model_type={config.model_type!r} is not held by programs, which scan layers that "
                "are equal; patch the model without device=..., to score in torch"
            )
        self._env = torchax_environment()
        check_programs()
        ATTENTION_REGISTRY()(NAME, program_attention)
        EXPERTS_REGISTRY()(NAME, program_experts)
        config = copy.deepcopy(config)
        set_attention_name(config, NAME)
        set_experts_name(config, "eager")  # old versions refuse other names here
        with torch_alone(), torch.device("meta"):
            build: Any = getattr(model_class, MODEL_OF_CONFIG.name)
            # the model without its weights
            self.skeleton: Any = build(config).eval()
        set_attention_name(self.skeleton.config, NAME)
        set_experts_name(self.skeleton.config, NAME)
        for module in self.skeleton.modules():
            if isinstance(activation := getattr(module, "act_fn", None), nn.Module):
                round_once(activation)
        check_parts(self.skeleton.get_decoder())
        _check_equal_layers(self.skeleton)

    def _call(
        self, module: nn.Module, weights: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        env = self._env
        with env:
            state = {name: env.j2t_iso(array) for name, array in weights.items()}
            out = functional_call(module, state, env.j2t_iso(args), env.j2t_iso(kwargs))
            return env.t2j_iso(out)

    def can_skip_tiles(self, implementation: KernelImplementation, itemsize: int) -> bool:
        """Whether the number of token tiles can be data, on the chip that is traced for."""
        return can_skip_tiles(self.skeleton.get_decoder().layers[0], implementation, itemsize)

    def _residual(
        self,
        weights: Weights,
        kv_pages: jax.Array | None,  # as `pool_struct` has it; None where nothing is cached
        inputs: LaunchInputs,
        implementation: KernelImplementation,
        mask_impl: MaskKind,
        tile: int,
    ) -> tuple[jax.Array, jax.Array | None]:
        """From token ids to the residual stream behind the last layer; see `hidden_rows`.

        Returns:
          [num_tokens, hidden_size], of which with `tile` the rows of tokens alone may be read, and
          the pages with what was written to them.
        """
        decoder = self.skeleton.get_decoder()
        tokens = inputs.token_ids[None]
        hidden = self._call(decoder.embed_tokens, weights["embed_tokens"], tokens)
        positions = inputs.position_ids[None]
        rotary = self._call(decoder.rotary_emb, weights["rotary"], hidden, positions)
        num_layers, first = len(decoder.layers), decoder.layers[0]
        fuses = can_fuse(first, implementation, hidden.dtype.itemsize)

        def fused(_: None, index: jax.Array, hidden: jax.Array, attend: LayerAttention) -> Any:
            layers = weights["layers"]
            return fused_layer(self._call, first, layers, index, hidden, rotary, attend)

        def traced(own: Any, _: jax.Array, hidden: jax.Array, attend: LayerAttention) -> Any:
            state = {f"module.{name}": array for name, array in own.items()}
            keywords = {"position_embeddings": rotary, "position_ids": positions}
            return self._call(_Bound(first, layer_attention=attend), state, hidden, **keywords)

        layer = fused if fuses else traced
        windows = _windows(self.skeleton) if mask_impl == "dense" else None
        live = LiveTokens(inputs.schedule.counts[0], tile) if tile else None

        def step(carry: Any, scanned: tuple[Any, jax.Array]) -> tuple[Any, None]:
            hidden, kv_pages = carry
            own_weights, index = scanned
            attend = _attention_of(index, num_layers, kv_pages, inputs, implementation)
            attend.mask_impl = mask_impl
            attend.live = live
            attend.window = None if windows is None else windows[index]
            hidden = layer(own_weights, index, hidden, attend)
            return (hidden, attend.kv_pages), None

        scanned = None if fuses else weights["layers"], jnp.arange(num_layers)
        (hidden, kv_pages), _ = jax.lax.scan(step, (hidden, kv_pages), scanned)
        return hidden[0], kv_pages

    def hidden_rows(
        self,
        weights: Weights,
        kv_pages: jax.Array | None,
        inputs: LaunchInputs,
        implementation: KernelImplementation,
        mask_impl: MaskKind = "segment",
        tile: int = 0,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """From token ids to the hidden states that the head reads, at some tokens.

        Args:
          weights: from `weights_of`.
          kv_pages: the pool of all layers.
          inputs: the packed tokens, who sees whom, and at which rows to read.
          implementation: of the kernels.
          mask_impl: how items are kept apart; only under a dense mask do windows have a place.
          tile: most rows of a tile, where only those that hold tokens are computed; 0: all are.

        Returns:
          [num_rows, hidden_size] after the final norm, in the model's dtype and in the parts that
          `by_rows` makes, and the pages with what was written to them.
        """
        given = weights, kv_pages, inputs, implementation, mask_impl, tile
        hidden, kv_pages = self._residual(*given)
        return by_rows(self._reader(weights, hidden), inputs.rows, inputs.num_rows), kv_pages

    def label_logits(
        self,
        weights: Weights,
        kv_pages: jax.Array | None,
        inputs: LaunchInputs,
        implementation: KernelImplementation,
        mask_impl: MaskKind = "segment",
        tile: int = 0,
    ) -> tuple[tuple[tuple[jax.Array, jax.Array, jax.Array], ...], jax.Array | None]:
        """From token ids to the logits of the labels at the scored rows; see `hidden_rows`.

        Returns:
          ((float32[num_rows, num_labels], float32[num_rows], float32[num_rows]) in parts, pages):
          logits, and where they are wanted the vocabulary's log-sum-exp and largest.
        """
        given = weights, kv_pages, inputs, implementation, mask_impl, tile
        hidden, kv_pages = self._residual(*given)
        normed, cap = self._reader(weights, hidden), final_cap(self.skeleton)

        def read(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            head, labels = head_weight(weights), inputs.label_ids
            return label_head(normed(rows), head, labels, inputs.over_vocabulary, cap)

        return by_rows(read, inputs.rows, inputs.num_rows), kv_pages

    def _reader(self, weights: Weights, hidden: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """Rows to what the head reads there."""
        norm = self.skeleton.get_decoder().norm
        return lambda rows: self._call(norm, weights["norm"], hidden[rows])


def _windows(model: PreTrainedModel) -> jax.Array | None:
    """i32[num_layers]: how far back each layer sees; None where all see everything."""
    windows = windows_of(model)
    if not any(windows):
        return None
    everything = np.iinfo(np.int32).max // 2  # positions are subtracted from it
    return jnp.asarray([window or everything for window in windows], jnp.int32)


def _attention_of(
    layer: jax.Array,  # i32[]
    num_layers: int,
    kv_pages: jax.Array | None,
    inputs: LaunchInputs,
    implementation: KernelImplementation,
) -> LayerAttention:
    """The attention of one layer, whose pages follow those of the layers before it."""
    schedule, writes = inputs.schedule, inputs.page_writes
    if kv_pages is None or writes is None:
        return LayerAttention(schedule, implementation)
    first_page = layer * (kv_pages.shape[0] // num_layers)
    moved = replace(schedule, page_indices=schedule.page_indices + first_page)
    return LayerAttention(moved, implementation, kv_pages, writes.moved(first_page))


class _Bound(nn.Module):
    """A layer with the keywords that are jax values, and no torch ones, put in by hand."""

    def __init__(self, module: nn.Module, **keywords: Any) -> None:
        super().__init__()
        self.module = module
        self._keywords = keywords

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        return self.module(*args, attention_mask=None, **kwargs, **self._keywords)
