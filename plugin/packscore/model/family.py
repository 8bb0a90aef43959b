"""Which Hugging Face models packscore knows, and where their parts are."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification

from packscore.errors import InputTypeError, UnsupportedModelError
from packscore.model.plain import check_token_wise, modules_of


def is_classifier(model: nn.Module) -> bool:
    """Whether the model is a sequence classifier, which reads classes and not tokens."""
    return isinstance(model, GenericForSequenceClassification)


def class_count(model: PreTrainedModel) -> int:
    """How many classes a sequence classifier has; 0 for another model."""
    config: Any = model.config
    return int(config.num_labels) if is_classifier(model) else 0


def output_head(model: PreTrainedModel) -> Any:
    """The module that turns hidden states into logits of the vocabulary or of classes.

    Raises:
      UnsupportedModelError: the model has neither.
    """
    if is_classifier(model):
        return model.score
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head and is no sequence classifier; "
            "load it with AutoModelForCausalLM or AutoModelForSequenceClassification"
        )
    return head


SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
# The name we register, by the implementation that keeps serving every call that is not packed.
# Transformers gives names with "sdpa", "flash" or "flex" in them a meaning of their own.
REGISTERED_NAMES = {"sdpa": "packscore", "eager": "packscore_eager"}
BASES = {name: base for base, name in REGISTERED_NAMES.items()}
# Rotary embeddings whose angles depend on the longest sequence of the batch.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def base_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself: unwraps PEFT.

    Raises:
      InputTypeError: `model` is not a Hugging Face model.
      UnsupportedModelError: a PEFT method that changes the tokens (prompt or prefix tuning).
    """
    inner: Any = model
    if callable(getattr(model, "get_base_model", None)):
        peft_config = inner.active_peft_config
        if getattr(peft_config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"peft_type={str(peft_config.peft_type)!r} adds virtual tokens that packing would "
                "show to every item; use an adapter that changes weights, such as LoRA"
            )
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise InputTypeError(
            f"model is a {type(model).__name__}; it must be a transformers PreTrainedModel, "
            "for instance from AutoModelForCausalLM.from_pretrained(...)"
        )
    return inner


def check_supported(model: nn.Module) -> None:
    """Refuse, by name, what packed scoring could not reproduce exactly.

    Raises:
      UnsupportedModelError: architecture, sliding window, logit soft-capping, rotary embedding or
        attention implementation that is not exact when packed.
    """
    inner = base_model(model)
    check_token_wise(model)
    config = inner.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} is not supported; "
            f"it must be one of {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    kinds, num_layers = getattr(config, "layer_types", None), config.num_hidden_layers
    if kinds is not None and len(kinds) < num_layers:
        raise UnsupportedModelError(
            f"layer_types names {len(kinds)} of num_hidden_layers={num_layers} layers, so that the "
            "model's own forward fails; set config.layer_types for all of them"
        )
    windows = {getattr(module, "sliding_window", None) for module in inner.modules()} - {None}
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or windows:
        raise UnsupportedModelError(
            f"sliding_window={getattr(config, 'sliding_window', None)} is in use, and packed items "
            "have no such window; load with use_sliding_window=False if it was trained without"
        )
    for option in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, option, None) is not None:
            raise UnsupportedModelError(f"{option}={getattr(config, option)} is not supported")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise UnsupportedModelError(
            f"rope_type={rope_type!r} makes one item's angles depend on the others' lengths; "
            "use a static type such as 'default', 'linear', 'yarn' or 'llama3'"
        )
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedModelError("is_causal=False: the model must be a causal decoder")
    implementation = config._attn_implementation
    if implementation not in REGISTERED_NAMES and implementation not in BASES:
        raise UnsupportedModelError(
            f"attn_implementation={implementation!r} has a mask of its own kind; call "
            "model.set_attn_implementation('sdpa') first"
        )


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_model` is in effect on `model`, in all of its layers."""
    holders = configs_of(base_model(model))
    return all(config._attn_implementation in BASES for _, config in holders)


def configs_of(model: nn.Module) -> list[tuple[nn.Module, PreTrainedConfig]]:
    """Every module that has a configuration, which it may share or, copied or replaced, may not."""
    found = ((module, module.__dict__.get("config")) for module in modules_of(model))
    return [(module, config) for module, config in found if isinstance(config, PreTrainedConfig)]
