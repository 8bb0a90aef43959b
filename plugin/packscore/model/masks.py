"""Which keys a model's own attention sees, and whether anything but a mask can say so."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from packscore.errors import MaskTooLargeError, UnsupportedModelError
from packscore.model.family import base_model, is_classifier
from packscore.model.plain import modules_of

logger = logging.getLogger("packscore")

MaskKind = Literal["segment", "dense"]
# A dense mask of this size is worth telling the user, who may not know what it costs.
TELL_MASK_BYTES = 256 * 2**20
# Families whose decoder takes a mask for each kind of layer that `config.layer_types` names, and
# those whose layers all have the configuration's window. The others know no windows.
MASKS_BY_LAYER = ("qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_oss")
ONE_WINDOW = ("qwen3_moe", "mistral")
KINDS = ("full_attention", "sliding_attention")


def windows_of(model: PreTrainedModel) -> list[int | None]:
    """Of each layer how many tokens back a token sees, itself included; None: all of them."""
    whole: Any = model
    config = whole.get_decoder().config
    window, num_layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    if config.model_type in ONE_WINDOW:
        return [window] * num_layers
    if config.model_type not in MASKS_BY_LAYER:
        return [None] * num_layers
    return [window if kind == KINDS[1] else None for kind in config.layer_types[:num_layers]]


def mask_reason(model: nn.Module, longest: int) -> str | None:
    """Why sequences of up to `longest` tokens need a mask; None: segments of attention are exact.

    Segments merge partial softmaxes over whole runs of keys: what is done to single scores, or
    hides keys by their distance, has no place there.
    """
    inner = base_model(model)
    kind = inner.config.model_type
    if kind == "gpt_oss":
        return "its attention has sinks"
    caps = (getattr(x, "attn_logit_softcapping", None) for x in modules_of(inner))
    cap = max((x for x in caps if x is not None), default=None) if kind == "gemma2" else None
    if cap is not None:
        return f"attn_logit_softcapping={cap} caps its scores"
    windows = [window for window in windows_of(inner) if window is not None]
    if windows and min(windows) < longest:
        return f"sliding_window={min(windows)} hides keys in sequences of up to {longest:,} tokens"
    return None


def check_segment(model: nn.Module, longest: int) -> None:
    """Refuse what attention in segments would get wrong.

    Raises:
      UnsupportedModelError: sequences of so many tokens need a mask.
    """
    reason = mask_reason(model, longest)
    if reason:
        raise UnsupportedModelError(
            f"mask_impl='segment' is not exact for this {type(base_model(model)).__name__}, for "
            f"{reason}; pass mask_impl='dense'"
        )


def check_mask_fits(model: nn.Module, longest: int, needed: int, free: int, what: str) -> None:
    """Say what a dense mask needs, before it exists.

    Args:
      model: whose mask it is.
      longest: tokens of its longest sequence.
      needed, free: bytes.
      what: needs them.

    Raises:
      MaskTooLargeError: it needs more than is free.
    """
    told = (
        f"mask_impl='dense' needs {needed / 2**20:,.0f} MiB {what}; "
        f"{free / 2**20:,.0f} MiB are free"
    )
    if needed <= free:
        logger.log(logging.WARNING if needed >= TELL_MASK_BYTES else logging.INFO, told)
        return
    remedy = "score fewer items at a time, pass a smaller max_tokens, or free some memory"
    if mask_reason(model, longest) is None:
        remedy = "use mask_impl='segment', which needs no mask"
    raise MaskTooLargeError(f"{told}; {remedy}")


def as_taken(model: PreTrainedModel, masks: Sequence[Any]) -> Any:
    """Masks of `KINDS` as the model's decoder takes them: by kind, or the one that it has."""
    if model.config.model_type in MASKS_BY_LAYER:
        return dict(zip(KINDS, masks, strict=True))
    full, windowed = masks
    return windowed if any(windows_of(model)) else full


def final_cap(model: PreTrainedModel) -> float | None:
    """What a language model's logits are soft-capped at; None: they are not."""
    config: Any = model.config
    is_capped = config.model_type in ("gemma2", "gemma3_text") and not is_classifier(model)
    return getattr(config, "final_logit_softcapping", None) if is_capped else None
