"""A decoder's last layer where it is read: of the other tokens it needs keys and values alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from packscore.interfaces import COMPILED_CALL, MODULES, apply_rotary, folder_of, hooks_of

KeysValues = tuple[torch.Tensor, torch.Tensor]
# Whose modules act on one token alone, whatever rows come with it.
TOKEN_LIBRARIES = ("torch", "transformers", "peft")
OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


class _Before:
    """What a layer finds in the place of its cache: all tokens' keys and values.

    Those of its own rows, which it brings, are among them.
    """

    def __init__(self, found: KeysValues) -> None:
        self._found = found

    def update(self, *_: Any, **__: Any) -> KeysValues:
        """As of a cache: ([1, num_kv_heads, num_tokens, head_dim], the same)."""
        return self._found


def keys_values(
    layer: Any,
    hidden: torch.Tensor,  # [1, num_tokens, hidden_size]
    rotary: KeysValues,  # cosine and sine, [1, num_tokens, head_dim]
) -> KeysValues:
    """The keys and values of all tokens, as the layer's own attention makes them.

    Returns:
      ([1, num_kv_heads, num_tokens, head_dim], the same).
    """
    attention = layer.self_attn
    rows = layer.input_layernorm(hidden)
    shape = (*rows.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(rows).view(shape)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys = keys.transpose(1, 2)
    values = attention.v_proj(rows).view(shape).transpose(1, 2)
    return apply_rotary(attention)(keys[:, :0], keys, *rotary)[1], values


def at_rows(
    layer: nn.Module,
    rows: torch.Tensor,  # i64[num_rows], which of the tokens
    found: KeysValues,  # of all tokens
    hidden: torch.Tensor,  # [1, num_tokens, hidden_size]
    *,
    position_embeddings: KeysValues,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **keywords: Any,
) -> torch.Tensor:
    """What a layer gives at some rows, by itself on those rows: [1, num_rows, hidden_size].

    It finds the keys and values of all tokens where its cache would be.
    """
    if attention_mask is not None and attention_mask.numel():
        attention_mask = attention_mask[:, :, rows]
    out: torch.Tensor = layer(
        hidden[:, rows],
        position_embeddings=tuple(part[:, rows] for part in position_embeddings),
        attention_mask=attention_mask,
        position_ids=None if position_ids is None else position_ids[:, rows],
        **{**keywords, "past_key_values": _Before(found)},
    )
    return out


class OnRows(nn.Module):
    """A decoder layer that computes keys and values of all tokens, and the rest of some rows.

    Args:
      layer: as the model has it.
      rows: i64[num_rows], which of the tokens.
      keep: called with keys and values where there are no rows, so that the layer does not run.
      instead: keywords of the decoder's that are others for these rows.
    """

    def __init__(
        self,
        layer: nn.Module,
        rows: torch.Tensor,
        keep: Callable[[torch.Tensor, torch.Tensor], object] = lambda *_: None,
        **instead: Any,
    ) -> None:
        super().__init__()
        self.layer = layer
        self._rows, self._keep, self._instead = rows, keep, instead

    def __getattr__(self, name: str) -> Any:
        """A decoder reads of its layers what kind they are."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, hidden: torch.Tensor, **keywords: Any) -> torch.Tensor:
        """[1, num_rows, hidden_size] of [1, num_tokens, hidden_size]."""
        rows = self._rows.to(hidden.device)
        found = keys_values(self.layer, hidden, keywords["position_embeddings"])
        if not len(rows):
            self._keep(*found)
            return hidden[:, rows]
        return at_rows(self.layer, rows, found, hidden, **{**keywords, **self._instead})


def with_last(decoder: Any, last: nn.Module) -> Any:
    """A decoder with another module in the place of its last layer, and its own modules elsewhere.

    The decoder itself stays as it is, for other threads run it.
    """
    found = copy.copy(decoder)
    layers = nn.ModuleList([*decoder.layers[:-1], last])
    name = MODULES.name
    found.__dict__[name] = {**decoder.__dict__[name], "layers": layers}
    return found


def whole_reason(decoder: Any) -> str | None:
    """Why the last layer runs for all tokens; None: it can run for those that are read.

    The layer, the norm behind it and the decoder around them have to be what transformers made; the
    other layers may be what they are.
    """
    last, config = decoder.layers[-1], decoder.config
    if config.num_hidden_layers != len(decoder.layers):
        return f"num_hidden_layers={config.num_hidden_layers} of {len(decoder.layers)} layers"
    for name in OUTPUTS:
        if getattr(config, name, None):
            return f"{name}={getattr(config, name)}"
    behind = [decoder, *decoder.norm.modules(), *last.modules()]
    family = folder_of(config.model_type)
    home = f"transformers.models.{family}.modeling_{family}"
    for module in (decoder, decoder.norm, last, last.self_attn):
        if type(module).__module__ != home:
            return f"the {type(module).__name__} of {type(module).__module__}"
    for module in behind:
        own: Any = module.__dict__
        name = type(module).__name__
        if type(module).__module__.partition(".")[0] not in TOKEN_LIBRARIES:
            return f"the {name} of {type(module).__module__}"
        if hooks_of(module):
            return f"a hook on the {name}"
        if "forward" in own:
            return f"a forward put on the {name}"
        if own.get(COMPILED_CALL.name) is not None:
            return f"a compiled {name}"
    return None
