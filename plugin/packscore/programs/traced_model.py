"""The model as one traced function of its weights.

The user's model stays what it is. A skeleton on the meta device is traced through torchax; its
weights come in as an argument, so that nothing is baked into the program, and the decoder layers'
weights are stacked, so that one layer is compiled and scanned.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from packscore.model.family import TRACED_MODEL_TYPES, class_count
from packscore.model.masks import MaskKind, final_cap, windows_of
from packscore.model.sizes import ModelSizes
from packscore.programs.fused_layer import (
    Call,
    Layer,
    Stacks,
    can_fuse,
    can_skip_tiles,
    fused_layer,
    fused_rows,
)
from packscore.programs.head import (
    HEAD_STEP,
    by_rows,
    head_part,
    in_steps,
    label_head,
    whole_head,
)
from packscore.programs.interfaces import check_programs
from packscore.programs.launch_inputs import LaunchInputs
from packscore.programs.mesh.axis import ONE_CHIP, ModelAxis
from packscore.programs.mesh.cuts import Cuts, check_cut
from packscore.programs.traced_ops import (
    NAME,
    AtRows,
    Bound,
    KernelImplementation,
    KeysValuesOf,
    LayerAttention,
    program_attention,
    program_experts,
    round_once,
    sum_over,
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
      axis: the chips that it is traced for, each of which has its part of the weights.

    Raises:
      UnsupportedModelError: the family cannot be traced.
      UnsupportedVersionError: jax, torchax, torch or transformers has not what tracing reads.
    """

    def __init__(
        self,
        model_class: type[PreTrainedModel],
        config: PreTrainedConfig,
        axis: ModelAxis = ONE_CHIP,
    ) -> None:
        if config.model_type not in TRACED_MODEL_TYPES:
            raise UnsupportedModelError(
                f"model_type={config.model_type!r} is not held by programs, which scan layers that "
                "are equal; patch the model without device=..., to score in torch"
            )
        self.lock = threading.Lock()  # of who traces: modules have their weights put in meanwhile
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
        sizes, classes = ModelSizes.of(config), class_count(self.skeleton)
        check_cut(sizes, axis.chips)
        self.axis, self.cuts = axis, Cuts(sizes, axis.chips, classes)
        self.sizes = sizes.cut(axis.chips)  # of what each chip has
        _share(self.skeleton.get_decoder().layers[0], axis)

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
        layer = self.skeleton.get_decoder().layers[0]
        return can_skip_tiles(layer, implementation, itemsize, self.axis.chips)

    def _embedded(self, weights: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
        """[1, num_tokens, hidden_size] of i32[1, num_tokens], of which a chip may have no row."""
        embed, axis = self.skeleton.get_decoder().embed_tokens, self.axis
        if axis.chips == 1:
            whole: jax.Array = self._call(embed, weights, tokens)
            return whole
        is_own, at = axis.own(tokens, len(weights["weight"]))
        # which row has no gradient: torch asks whether it is among a chip's, which it need not be
        padding_idx, embed.padding_idx = embed.padding_idx, None
        try:
            found = self._call(embed, weights, at)
        finally:
            embed.padding_idx = padding_idx
        return axis.sum(jnp.where(is_own[..., None], found, 0))

    def _reader(
        self,
        weights: Weights,
        kv_pages: jax.Array | None,  # as `pool_struct` has it; None where nothing is cached
        inputs: LaunchInputs,
        implementation: KernelImplementation,
        mask_impl: MaskKind,
        tile: int,
        *,
        whole: bool,
    ) -> tuple[Callable[[jax.Array], jax.Array], jax.Array | None]:
        """From token ids to what the head reads at rows; see `hidden_rows`.

        Args:
          whole: whether the last layer runs for all tokens; else it does for the rows that are
            read, and of the others it needs keys and values alone.

        Returns:
          i32[num_rows] to [num_rows, hidden_size] behind the final norm, for rows of tokens, and
          the pages with what was written to them.
        """
        decoder = self.skeleton.get_decoder()
        tokens = inputs.token_ids[None]
        hidden = self._embedded(weights["embed_tokens"], tokens)
        positions = inputs.position_ids[None]
        rotary = self._call(decoder.rotary_emb, weights["rotary"], hidden, positions)
        num_layers = len(decoder.layers)
        layer = _Layer(self._call, decoder.layers[0], weights["layers"], rotary, positions)
        layer.fuses = can_fuse(
            decoder.layers[0], implementation, hidden.dtype.itemsize, self.axis.chips
        )
        windows = _windows(self.skeleton) if mask_impl == "dense" else None
        live = LiveTokens(inputs.schedule.counts[0], tile) if tile else None

        def attention_of(index: Layer, kv_pages: jax.Array | None) -> LayerAttention:
            attend = _attention_of(index, num_layers, kv_pages, inputs, implementation)
            attend.mask_impl = mask_impl
            attend.live, attend.axis = live, self.axis
            attend.window = None if windows is None else windows[index]
            return attend

        def step(carry: Any, index: jax.Array) -> tuple[Any, None]:
            hidden, kv_pages = carry
            attend = attention_of(index, kv_pages)
            hidden = layer.whole(index, hidden, attend)
            return (hidden, attend.kv_pages), None

        scanned = jnp.arange(num_layers if whole else num_layers - 1)
        (hidden, kv_pages), _ = jax.lax.scan(step, (hidden, kv_pages), scanned)
        behind: Callable[[jax.Array], jax.Array] = lambda rows: hidden[0, rows]  # noqa: E731
        if not whole:
            attend = attention_of(num_layers - 1, kv_pages)
            behind = layer.at_rows(num_layers - 1, hidden, attend)
            kv_pages = attend.kv_pages
        return lambda rows: self._call(decoder.norm, weights["norm"], behind(rows)), kv_pages

    def hidden_rows(
        self,
        weights: Weights,
        kv_pages: jax.Array | None,
        inputs: LaunchInputs,
        implementation: KernelImplementation,
        mask_impl: MaskKind = "segment",
        tile: int = 0,
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """From token ids to the hidden states behind the final norm, at most or all tokens.

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
        read, kv_pages = self._reader(*given, whole=True)
        return by_rows(lambda rows, _: read(rows), inputs.rows, inputs.num_rows), kv_pages

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
        hidden, kv_pages = self._reader(*given, whole=False)

        def logits(rows: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return self.label_rows(weights, rows, inputs.label_ids, inputs.over_vocabulary)

        def read(rows: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            found: tuple[jax.Array, jax.Array, jax.Array] = in_steps(
                logits, hidden(rows), count, HEAD_STEP
            )
            return found

        return by_rows(read, inputs.rows, inputs.num_rows), kv_pages

    def label_rows(
        self,
        weights: Weights,
        rows: jax.Array,  # [num_rows, hidden_size]
        label_ids: jax.Array,  # i32[num_labels]
        over_vocabulary: jax.Array,  # i32[]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`label_head` at hidden states, also at those that another program gave."""
        part = head_part(weights, self.skeleton, self.axis)
        return label_head(rows, part, label_ids, over_vocabulary, final_cap(self.skeleton))

    def whole_head(self, weights: Weights, rows: jax.Array) -> jax.Array:
        """`whole_head` at hidden states: of every chip the logits of its rows of the head."""
        part = head_part(weights, self.skeleton, self.axis)
        return whole_head(rows, part, final_cap(self.skeleton))


def _share(layer: Any, axis: ModelAxis) -> None:
    """Let the chips that have parts of a layer sum what its two halves give."""
    mlp = layer.mlp
    if hasattr(mlp, "experts"):
        mlp.experts.model_axis = axis
    if axis.chips > 1:
        sum_over(axis, layer.self_attn.o_proj)
        if hasattr(mlp, "down_proj"):
            sum_over(axis, mlp.down_proj)


@dataclass
class _Layer:
    """One of the equal layers: its modules, or kernels in their place, with the stacked weights."""

    call: Call
    module: nn.Module
    weights: Stacks
    rotary: tuple[jax.Array, jax.Array]  # [1, num_tokens, head_dim]
    positions: jax.Array  # i32[1, num_tokens]
    fuses: bool = False

    def _own(self, index: Layer) -> dict[str, jax.Array]:
        return {f"module.{name}": stack[index] for name, stack in self.weights.items()}

    def whole(self, index: Layer, hidden: jax.Array, attend: LayerAttention) -> jax.Array:
        """[1, num_tokens, hidden_size] behind the layer."""
        if self.fuses:
            given = self.weights, index, hidden, self.rotary, attend
            return fused_layer(self.call, self.module, *given)
        keywords = {"position_embeddings": self.rotary, "position_ids": self.positions}
        bound = Bound(self.module, layer_attention=attend)
        return self.call(bound, self._own(index), hidden, **keywords)

    def at_rows(
        self, index: Layer, hidden: jax.Array, attend: LayerAttention
    ) -> Callable[[jax.Array], jax.Array]:
        """Put the keys and values of all tokens into the layer's pages.

        Returns:
          i32[num_rows] to [num_rows, hidden_size] behind the layer at those rows.
        """
        if self.fuses:
            given = self.call, self.module, self.weights, index, hidden, self.rotary, attend
            return fused_rows(*given)
        own = self._own(index)
        found = self.call(KeysValuesOf(self.module), own, hidden, self.rotary)
        k, v = (x[0] for x in found)
        attend.keep(k, v)
        keywords = {"position_embeddings": self.rotary, "position_ids": self.positions}

        def at(rows: jax.Array) -> jax.Array:
            def attention(q: jax.Array, *_: jax.Array, **options: Any) -> jax.Array:
                return attend.at_rows(q, k, v, rows, **options)

            bound = AtRows(self.module, layer_attention=attention)
            return self.call(bound, own, rows, found, hidden, **keywords)[0]

        return at


def _windows(model: PreTrainedModel) -> jax.Array | None:
    """i32[num_layers]: how far back each layer sees; None where all see everything."""
    windows = windows_of(model)
    if not any(windows):
        return None
    everything = np.iinfo(np.int32).max // 2  # positions are subtracted from it
    return jnp.asarray([window or everything for window in windows], jnp.int32)


def _attention_of(
    layer: Layer,
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
