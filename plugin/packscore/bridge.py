"""Every line that touches torchax and jax arrays: the model as one traced function of its weights.

The user's model stays what it is. A skeleton on the meta device is traced through torchax; its
weights come in as an argument, so that nothing is baked into the program, and the decoder layers'
weights are stacked, so that one layer is compiled and scanned.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from packscore.errors import UnsupportedModelError
from packscore_kernels import SegmentSchedule, segment_paged_attention
from packscore_kernels.hardware import shape_of

ATTENTION_NAME = "packscore_program"
UNTRACEABLE_MODEL_TYPES = ("qwen3_moe",)
# Vocabulary rows of one step of the log-sum-exp: bounds the logits in memory.
VOCAB_CHUNK = 8192

# "embed_tokens", "rotary", "norm", "layers" (stacked), and "head" where it is not tied
Weights = dict[str, dict[str, Any]]

_lock = threading.Lock()


def torchax_environment() -> Any:
    """torchax's default environment, imported so that torch stays as it was in this process.

    Importing torchax registers an accelerator that is none: without this, `torch.compile` and
    `pin_memory` would believe in it.
    """
    with _lock:
        fast_path = torch.backends.mha.get_fastpath_enabled()
        import torchax

        torchax.device_module.is_available = lambda: False
        torchax.device_module.device_count = lambda: 0
        torch.backends.mha.set_fastpath_enabled(fast_path)
        return torchax.default_env()


def program_attention(
    module: nn.Module,
    query: torch.Tensor,  # [1, num_q_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [1, num_kv_heads, num_tokens, head_dim]
    attention_mask: torch.Tensor | None,
    scaling: float,
    segment_schedule: SegmentSchedule,
    implementation: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention that the skeleton's layers call while they are traced."""
    env = torchax_environment()
    q, k, v = (env.t2j_iso(x)[0] for x in (query, key, value))
    out = segment_paged_attention(
        q, k, v, None, segment_schedule, sm_scale=scaling, implementation=implementation
    )
    result: torch.Tensor = env.j2t_iso(jnp.transpose(out, (1, 0, 2))[None])
    return result, None


def stack_layers(layers: nn.ModuleList) -> dict[str, torch.Tensor]:
    """Stack the weights of equal layers and make the layers' own parameters views of the stacks.

    One copy of one weight at a time exists beside the model's, and none afterwards: torch and jax
    read the same memory.

    Returns:
      {name inside a layer: [num_layers, ...]}.
    """
    stacks = {}
    owners = [dict(layer.named_parameters()) for layer in layers]
    for name, first in owners[0].items():
        stack = torch.empty((len(owners), *first.shape), dtype=first.dtype)
        for row, owner in zip(stack, owners, strict=True):
            row.copy_(owner[name].detach())
            owner[name].data = row
        stacks[name] = stack
    return stacks


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """The same memory as a jax array, where its alignment allows."""
    return jnp.from_dlpack(tensor.detach().contiguous())


class TracedModel:
    """A Hugging Face decoder and its head as one function of (weights, tokens, layout, labels).

    Args:
      model_class: for instance `Qwen3ForCausalLM`.
      config: its configuration, which is copied.

    Raises:
      UnsupportedModelError: the family cannot be traced.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
        if config.model_type in UNTRACEABLE_MODEL_TYPES:
            raise UnsupportedModelError(
                f"model_type={config.model_type!r} routes tokens to experts in a way that torchax "
                "cannot trace; patch the model without device=..."
            )
        self._env = torchax_environment()
        AttentionInterface.register(ATTENTION_NAME, program_attention)
        config = copy.deepcopy(config)
        config._attn_implementation_internal = ATTENTION_NAME
        with torch.device("meta"):
            build: Any = model_class._from_config
            self._skeleton: Any = build(config).eval()
        self._skeleton.config._attn_implementation_internal = ATTENTION_NAME

    def weight_shapes(self, dtype: Any) -> Weights:
        """What `weights_of` returns, as shapes alone."""
        decoder, head = self._skeleton.get_decoder(), self._skeleton.get_output_embeddings()
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
        if not self._skeleton.config.tie_word_embeddings:
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

    def weights_of(self, model: PreTrainedModel) -> Weights:
        """The weights of a model as jax arrays, in the memory that torch keeps using.

        Raises:
          UnsupportedModelError: its modules are not those of its configuration (an adapter or a
            quantised layer in place), or its weights are not on the CPU.
        """
        self._check_same_modules(model)
        whole: Any = model
        decoder, head = whole.get_decoder(), whole.get_output_embeddings()
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
        implementation: Any = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """From token ids to the logits of the labels at the scored rows.

        Returns:
          (float32[num_items, num_labels], float32[num_items] or None): logits, and with
          `over_vocabulary` their log-sum-exp over the vocabulary.
        """
        decoder = self._skeleton.get_decoder()
        hidden = self._call(decoder.embed_tokens, weights["embed_tokens"], token_ids[None])
        positions = position_ids[None]
        rotary = self._call(decoder.rotary_emb, weights["rotary"], hidden, positions)

        def layer(hidden: jax.Array, stacked: Mapping[str, jax.Array]) -> tuple[jax.Array, None]:
            out = self._call(
                _Bound(decoder.layers[0], segment_schedule=schedule, implementation=implementation),
                {f"module.{name}": array for name, array in stacked.items()},
                hidden,
                position_embeddings=rotary,
                position_ids=positions,
            )
            return out, None

        hidden, _ = jax.lax.scan(layer, hidden, weights["layers"])
        rows = self._call(decoder.norm, weights["norm"], hidden[0, scored_rows])
        head = weights.get("head", weights["embed_tokens"])["weight"]
        return label_head(rows, head, label_ids, over_vocabulary)


class _Bound(nn.Module):
    """A layer with the keywords that are jax values, and no torch ones, put in by hand."""

    def __init__(self, module: nn.Module, **keywords: Any) -> None:
        super().__init__()
        self.module = module
        self._keywords = keywords

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer."""
        return self.module(*args, attention_mask=None, **kwargs, **self._keywords)


def label_head(
    rows: jax.Array,  # [num_items, hidden_size]
    weight: jax.Array,  # [vocab_size, hidden_size]
    label_ids: jax.Array,  # i32[num_labels]
    over_vocabulary: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Label logits and their normaliser, in float32; the logits of the vocabulary never exist."""
    rows = rows.astype(jnp.float32)

    def logits(w: jax.Array) -> jax.Array:
        return jnp.dot(rows, w.astype(jnp.float32).T, precision="highest")

    chosen = logits(weight[label_ids])
    if not over_vocabulary:
        return chosen, None
    chunk = min(VOCAB_CHUNK, weight.shape[0])
    starts = np.arange(0, weight.shape[0], chunk)

    def step(total: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        # the last chunk starts early enough to be whole; what it repeats is left out
        at = jnp.minimum(start, weight.shape[0] - chunk)
        columns = at + jnp.arange(chunk)
        part = logits(jax.lax.dynamic_slice_in_dim(weight, at, chunk))
        part = jnp.where(columns >= start, part, -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(part, axis=-1)), None

    nothing = jnp.full(rows.shape[0], -jnp.inf)
    normalizer, _ = jax.lax.scan(step, nothing, jnp.asarray(starts))
    return chosen, normalizer
