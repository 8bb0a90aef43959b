"""The model as one traced function of its weights.

The user's model stays what it is. A skeleton on the meta device is traced through torchax; its
weights come in as an argument, so that nothing is baked into the program, and the decoder layers'
weights are stacked, so that one layer is compiled and scanned.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import nn
from torch.func import functional_call
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from packscore.errors import UnsupportedModelError
from packscore.model.family import is_classifier, output_head
from packscore.programs.fused_layer import can_fuse, fused_layer
from packscore.programs.head import head_weight, label_head
from packscore.programs.traced_ops import (
    NAME,
    LayerPages,
    program_attention,
    program_experts,
    torchax_environment,
)
from packscore.programs.weights import Weights, stack_layers, to_jax
from packscore_kernels import SegmentSchedule
from packscore_kernels.hardware import shape_of


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
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        self._env = torchax_environment()
        AttentionInterface.register(NAME, program_attention)
        ExpertsInterface.register(NAME, program_experts)
        config = copy.deepcopy(config)
        config._attn_implementation_internal = NAME
        config._experts_implementation_internal = NAME
        with torch.device("meta"):
            build: Any = model_class._from_config
            self._skeleton: Any = build(config).eval()
        self._skeleton.config._attn_implementation_internal = NAME
        self._skeleton.config._experts_implementation_internal = NAME
        _check_equal_layers(self._skeleton)

    def weight_shapes(self, dtype: Any) -> Weights:
        """What `weights_of` returns, as shapes alone."""
        decoder, head = self._skeleton.get_decoder(), output_head(self._skeleton)
        num_layers = len(decoder.layers)

        def shapes(named: Iterator[tuple[str, torch.Tensor]], *lead: int) -> dict[str, Any]:
            return {name: shape_of((*lead, *x.shape), dtype) for name, x in named}

        found: Weights = {
            "layers": shapes(decoder.layers[0].named_parameters(), num_layers),
            "norm": shapes(decoder.norm.named_parameters()),
            "embed_tokens": shapes(decoder.embed_tokens.named_parameters()),
            "rotary": {
                name: shape_of(tuple(x.shape), jnp.float32)
                for name, x in decoder.rotary_emb.named_buffers()
            },
        }
        if is_classifier(self._skeleton) or not self._skeleton.config.tie_word_embeddings:
            found["head"] = shapes(head.named_parameters())
        return found

    def _check_same_modules(self, model: PreTrainedModel) -> None:
        own = {name: p.shape for name, p in model.named_parameters()}
        expected = {name: p.shape for name, p in self._skeleton.named_parameters()}
        if own != expected:
            odd = sorted(set(own) ^ set(expected)) or [n for n in own if own[n] != expected[n]]
            raise UnsupportedModelError(
                f"parameter {odd[0]!r} is not one of a plain {type(model).__name__}; merge "
                "adapters (merge_and_unload()) and load weights unquantised"
            )
        for name, parameter in model.named_parameters():
            if parameter.device.type != "cpu":
                raise UnsupportedModelError(
                    f"parameter {name!r} is on {parameter.device}; load the model on the CPU, "
                    "without device_map"
                )
            if parameter.dtype not in (torch.float32, torch.bfloat16):
                raise UnsupportedModelError(
                    f"parameter {name!r} is {parameter.dtype}; programs compute in bfloat16 or "
                    "float32: load the model with dtype='bfloat16'"
                )

    def weights_of(self, model: PreTrainedModel) -> Weights:
        """The weights of a model as jax arrays, in the memory that torch keeps using.

        Raises:
          UnsupportedModelError: its modules are not those of its configuration (an adapter or a
            quantised layer in place), or its weights are of another dtype or not on the CPU.
        """
        self._check_same_modules(model)
        whole: Any = model
        decoder, head = whole.get_decoder(), output_head(model)
        stacks = stack_layers(decoder.layers)
        weights: Weights = {
            "layers": {name: to_jax(stack) for name, stack in stacks.items()},
            "rotary": {name: to_jax(b) for name, b in decoder.rotary_emb.named_buffers()},
            "norm": {name: to_jax(p) for name, p in decoder.norm.named_parameters()},
            "embed_tokens": {"weight": to_jax(decoder.embed_tokens.weight)},
        }
        if head.weight is not decoder.embed_tokens.weight:  # a tied one is there already
            weights["head"] = {"weight": to_jax(head.weight)}
        return weights

    def _call(
        self, module: nn.Module, weights: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        env = self._env
        with env:
            state = {name: env.j2t_iso(array) for name, array in weights.items()}
            out = functional_call(module, state, env.j2t_iso(args), env.j2t_iso(kwargs))
            return env.t2j_iso(out)

    def hidden_rows(
        self,
        weights: Weights,
        token_ids: jax.Array,  # i32[num_tokens]
        position_ids: jax.Array,  # i32[num_tokens]
        schedule: SegmentSchedule,
        rows: jax.Array,  # i32[num_rows]
        *,
        pages: LayerPages | None = None,
        implementation: Any = None,
    ) -> jax.Array:
        """From token ids to the hidden states that the head reads, at some tokens.

        Args:
          weights: from `weights_of`.
          token_ids: of the packed tokens.
          position_ids: rotary positions.
          schedule: who sees whom.
          rows: indices into the packed tokens.
          pages: the pool and what is written to it, changed in place; None where nothing is cached.
          implementation: of the attention, as `segment_paged_attention` names them.

        Returns:
          [num_rows, hidden_size] after the final norm, in the model's dtype.
        """
        decoder = self._skeleton.get_decoder()
        hidden = self._call(decoder.embed_tokens, weights["embed_tokens"], token_ids[None])
        positions = position_ids[None]
        rotary = self._call(decoder.rotary_emb, weights["rotary"], hidden, positions)
        num_layers, first = len(decoder.layers), decoder.layers[0]
        fused = can_fuse(first, implementation, hidden.dtype.itemsize)

        def layer(carry: Any, scanned: tuple[Any, jax.Array]) -> Any:
            hidden, kv_pages = carry
            own_weights, index = scanned
            own = None if pages is None else LayerPages(kv_pages, pages.writes)
            at = schedule
            if own is not None:
                first_page = index * (kv_pages.shape[0] // num_layers)
                at = dataclasses.replace(schedule, page_indices=schedule.page_indices + first_page)
                own.writes = own.writes.moved(first_page)
            if fused:
                out = fused_layer(
                    self._call,
                    first,
                    weights["layers"],
                    index,
                    hidden,
                    rotary,
                    at,
                    own,
                    implementation,
                )
                return (out, None if own is None else own.kv_pages), None
            out = self._call(
                _Bound(
                    first,
                    segment_schedule=at,
                    implementation=implementation,
                    pages=own,
                ),
                {f"module.{name}": array for name, array in own_weights.items()},
                hidden,
                position_embeddings=rotary,
                position_ids=positions,
            )
            return (out, None if own is None else own.kv_pages), None

        start = hidden, None if pages is None else pages.kv_pages
        scanned = None if fused else weights["layers"], jnp.arange(num_layers)
        (hidden, written), _ = jax.lax.scan(layer, start, scanned)
        if pages is not None:
            pages.kv_pages = written
        found: jax.Array = self._call(decoder.norm, weights["norm"], hidden[0, rows])
        return found

    def label_logits(
        self,
        weights: Weights,
        token_ids: jax.Array,  # i32[num_tokens]
        position_ids: jax.Array,  # i32[num_tokens]
        schedule: SegmentSchedule,
        scored_rows: jax.Array,  # i32[num_items]
        label_ids: jax.Array,  # i32[num_labels]
        *,
        over_vocabulary: bool,
        pages: LayerPages | None = None,
        implementation: Any = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """From token ids to the logits of the labels at the scored rows.

        Returns:
          (float32[num_items, num_labels], float32[num_items] or None): logits, and with
          `over_vocabulary` their log-sum-exp over the vocabulary.
        """
        rows = self.hidden_rows(
            weights,
            token_ids,
            position_ids,
            schedule,
            scored_rows,
            pages=pages,
            implementation=implementation,
        )
        return label_head(rows, head_weight(weights), label_ids, over_vocabulary)


class _Bound(nn.Module):
    """A layer with the keywords that are jax values, and no torch ones, put in by hand."""

    def __init__(self, module: nn.Module, **keywords: Any) -> None:
        super().__init__()
        self.module = module
        self._keywords = keywords

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        return self.module(*args, attention_mask=None, **kwargs, **self._keywords)
