"""Which Hugging Face models packscore knows, and where their parts are."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from packscore.errors import InputTypeError, UnsupportedModelError
from packscore.interfaces import ATTENTION_NAME, CLASSIFIER, attention_name
from packscore.model.place import check_place
from packscore.model.plain import check_token_wise, modules_of
from packscore.model.sizes import ModelSizes
from packscore.model.stored import is_stored
from packscore.telling import counted, cut


def is_classifier(model: nn.Module) -> bool:
    """Whether the model is a sequence classifier, which reads classes and not tokens."""
    return isinstance(model, CLASSIFIER())


def class_count(model: PreTrainedModel) -> int:
    """How many classes a sequence classifier has; 0 for another model."""
    config: Any = model.config
    return int(config.num_labels) if is_classifier(model) else 0


def model_told(model: PreTrainedModel) -> str:
    """A model in a few words: class, name, sizes, where its weights are, and in which dtype."""
    config: Any = model.config
    name = str(config.name_or_path or "").rstrip("/").rpartition("/")[2]
    named = f"{type(model).__name__} {cut(name)}" if name else type(model).__name__
    sizes = f"{counted(config.num_hidden_layers, 'layer')} of {config.hidden_size:,}"
    place = "loaded in parts" if is_stored(model) else model.device
    return f"{named}, {sizes}, {place}, {str(model.dtype).removeprefix('torch.')}"


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


# Families whose layers programs can scan: equal but for their windows, under one rotary embedding.
TRACED_MODEL_TYPES = ("gemma2", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
SUPPORTED_MODEL_TYPES = (*TRACED_MODEL_TYPES, "gemma3_text", "gpt_oss")
# Options that a configuration may name, and the families that heed them.
HEEDED = {
    "attn_logit_softcapping": ("gemma2",),
    "final_logit_softcapping": ("gemma2", "gemma3_text"),
    "attention_chunk_size": (),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
# Families whose attention only their own function computes: sdpa leaves caps and sinks out.
EAGER_ONLY = ("gemma2", "gpt_oss")
# The name we register, by the implementation that keeps serving every call that is not packed.
# Transformers gives names with "sdpa", "flash" or "flex" in them a meaning of their own.
REGISTERED_NAMES = {"sdpa": "packscore", "eager": "packscore_eager"}
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
      UnsupportedModelError: weights that nothing here reads, an architecture, kind of layer,
        option, rotary embedding or attention implementation that is not exact when packed, or a
        size in the configuration that the modules contradict.
    """
    inner = base_model(model)
    check_place(model)
    check_token_wise(model)
    config = inner.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} is not supported; "
            f"it must be one of {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    _check_sizes(inner)
    kinds, num_layers = getattr(config, "layer_types", None), config.num_hidden_layers
    if kinds is not None and len(kinds) < num_layers:
        raise UnsupportedModelError(
            f"layer_types names {len(kinds)} of num_hidden_layers={num_layers} layers, so that the "
            "model's own forward fails; set config.layer_types for all of them"
        )
    for kind in kinds or ():
        if kind not in LAYER_TYPES:
            raise UnsupportedModelError(
                f"layer_types has {kind!r}, which is not supported; layers must be of "
                f"{' or '.join(LAYER_TYPES)}"
            )
    for option, families in HEEDED.items():
        if getattr(config, option, None) is not None and config.model_type not in families:
            raise UnsupportedModelError(f"{option}={getattr(config, option)} is not supported")
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(rope.get(kind) or {} for kind in LAYER_TYPES)):  # of all layers, or by kind
        if one.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            raise UnsupportedModelError(
                f"rope_type={one['rope_type']!r} makes one item's angles depend on the others' "
                "lengths; use a static type such as 'default', 'linear', 'yarn' or 'llama3'"
            )
    is_bidirectional = getattr(config, "use_bidirectional_attention", None)
    if getattr(config, "is_causal", True) is False or is_bidirectional:
        which = "use_bidirectional_attention=True" if is_bidirectional else "is_causal=False"
        raise UnsupportedModelError(f"{which}: the model must be a causal decoder")
    known = {None, *REGISTERED_NAMES, *REGISTERED_NAMES.values()}
    for owner in (config, *(own for _, own in layer_configs(model))):
        implementation = attention_name(owner)
        if implementation not in known:
            raise UnsupportedModelError(
                f"attn_implementation={implementation!r} has a mask of its own kind; call "
                "model.set_attn_implementation('sdpa') first"
            )
        if config.model_type in EAGER_ONLY and implementation in ("sdpa", REGISTERED_NAMES["sdpa"]):
            raise UnsupportedModelError(
                f"attn_implementation='sdpa' leaves out what {config.model_type!r} does to its "
                "scores; call model.set_attn_implementation('eager') first"
            )


# Sizes that pages and launches go by: as the configuration says them, as we read them, and where a
# layer's attention has them.
ATTENTION_SIZES = (
    ("head_dim", "head_dim", "head_dim"),
    ("num_attention_heads * head_dim", "q", "q_proj.out_features"),
    ("num_key_value_heads * head_dim", "kv", "k_proj.out_features"),
    ("num_key_value_heads * head_dim", "kv", "v_proj.out_features"),
    ("hidden_size", "hidden", "q_proj.in_features"),
)


def _check_sizes(model: PreTrainedModel) -> None:
    """Refuse sizes in the configuration that the modules contradict.

    A configuration may name fewer layers than there are: the model's own forward then runs so many.
    The width of an MLP is not compared, which layers may have of their own.

    Raises:
      UnsupportedModelError: there is one.
    """
    config: Any = model.config
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]  # untyped in transformers
    for name in ("num_attention_heads", "hidden_size"):
        if getattr(config, name) < 1:
            raise UnsupportedModelError(f"{name}={getattr(config, name)} must be at least 1")
    sizes, num_layers = ModelSizes.of(config), len(decoder.layers)
    if not 1 <= sizes.layers <= num_layers:
        raise UnsupportedModelError(
            f"num_hidden_layers={sizes.layers} contradicts the model, which has {num_layers} "
            f"layers; set config.num_hidden_layers to 1 to {num_layers}"
        )
    for i, layer in enumerate(decoder.layers[: sizes.layers]):
        for told, size, path in ATTENTION_SIZES:
            found = functools.reduce(_part, path.split("."), getattr(layer, "self_attn", None))
            if found not in (None, getattr(sizes, size)):
                raise UnsupportedModelError(
                    f"{told}={getattr(sizes, size)} in the configuration contradicts layer {i}, "
                    f"where {path} is {found}; set the configuration's sizes to the model's own"
                )


def _part(whole: Any, name: str) -> Any:
    return getattr(whole, name, None)


def layer_configs(model: nn.Module) -> list[tuple[Any, Any]]:
    """Every module that has a configuration and is no model; they may share one or, copied, not."""
    found = ((module, module.__dict__.get("config")) for module in modules_of(base_model(model)))
    return [
        (module, config)
        for module, config in found
        if hasattr(config, ATTENTION_NAME.name) and not isinstance(module, PreTrainedModel)
    ]
