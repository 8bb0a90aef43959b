"""Give one model instance packed attention through Hugging Face's interfaces, and take it back."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from packscore.attention import SegmentPlan, segment_attention
from packscore.errors import InputError, InputTypeError, UnsupportedModelError
from packscore.kv_pages import KvPages

if TYPE_CHECKING:
    from packscore.program import ModelProgram

ModelT = TypeVar("ModelT", bound=nn.Module)

SUPPORTED_MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
# The name we register, by the implementation that keeps serving every call that is not packed.
# Transformers gives names with "sdpa", "flash" or "flex" in them a meaning of their own.
REGISTERED_NAMES = {"sdpa": "packscore", "eager": "packscore_eager"}
BASES = {name: base for base, name in REGISTERED_NAMES.items()}
# Rotary embeddings whose angles depend on the longest sequence of the batch.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# The compiled programs of models patched with a device, for as long as the models live.
_programs: WeakKeyDictionary[PreTrainedModel, ModelProgram] = WeakKeyDictionary()


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
    config = inner.config
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} is not supported; "
            f"it must be one of {', '.join(SUPPORTED_MODEL_TYPES)}"
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
    """Whether `patch_model` is in effect on `model`."""
    return base_model(model).config._attn_implementation in BASES


def patch_model(
    model: ModelT, *, device: str | None = None, compile_cache: str | Path | None = None
) -> ModelT:
    """Give `model` the packed attention, in place.

    Only this instance changes: its configuration is copied first, so that models which shared it
    stay as they are. Calls that are not packed by a scorer run the model's own attention exactly
    as before. Patching twice changes nothing.

    Args:
      model: a causal Hugging Face decoder (Qwen3, Qwen3-MoE, Qwen2, Llama), PEFT-wrapped or not,
        using the "sdpa" or "eager" attention.
      device: None scores in torch, where the model is. "tpu" and "jax" (the device jax prefers)
        score through compiled programs that share the weights of a model on the CPU; "auto" is
        "tpu" where jax sees one. Ordinary calls in eval mode, `model(input_ids=...)` with or
        without an `attention_mask`, run through the programs too: they return no `past_key_values`
        and no gradients, and zeros at padding. All other calls stay in torch.

      compile_cache: folder that keeps compiled programs for the next process; None leaves that to
        jax, which reads JAX_COMPILATION_CACHE_DIR.

    Returns:
      The same object.

    Raises:
      UnsupportedModelError: the model cannot be scored exactly when packed; the message says why.
      InputError: there is no such device, or a `compile_cache` and no device to compile for.
    """
    if compile_cache is not None and device is None:
        raise InputError(
            f"compile_cache={str(compile_cache)!r} keeps compiled programs, and {device=} compiles "
            "none; pass device='tpu', 'jax' or 'auto'"
        )
    check_supported(model)
    if not is_patched(model):
        _register()
        _switch(model, REGISTERED_NAMES[base_model(model).config._attn_implementation])
    if device is not None:
        _compile(model, device, None if compile_cache is None else Path(compile_cache))
    return model


def _compile(model: nn.Module, device: str, compile_cache: Path | None) -> None:
    # imported here: jax and torchax come into the process on the JAX path only
    from packscore.calls import serve_calls
    from packscore.program import ModelProgram, resolve_device

    found = resolve_device(device)
    inner = base_model(model)
    if found is None:
        return
    program = _programs.get(inner)
    if program is None or program.device != found[0]:
        program = ModelProgram(inner, device=found[0], implementation=found[1])
        _programs[inner] = program
    program.compile_cache = compile_cache or program.compile_cache
    serve_calls(inner)


def program_of(model: nn.Module) -> ModelProgram | None:
    """The compiled programs of a model patched with a `device`; None where torch scores it."""
    return _programs.get(base_model(model))


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model`, in place; does nothing to a model that is not patched.

    Returns:
      The same object; its logits are bit-identical to before it was patched.
    """
    if is_patched(model):
        _switch(model, BASES[base_model(model).config._attn_implementation])
        if _programs.pop(base_model(model), None) is not None:
            from packscore.calls import leave_calls

            leave_calls(base_model(model))
    return model


@contextmanager
def patched(model: ModelT) -> Iterator[ModelT]:
    """`with patched(model):` patches for the block and leaves the model as it was found."""
    found_patched = is_patched(model)
    try:
        yield patch_model(model)
    finally:
        if not found_patched:
            unpatch_model(model)


def _switch(model: nn.Module, implementation: str) -> None:
    shared = base_model(model).config
    own = copy.deepcopy(shared)
    own._attn_implementation_internal = implementation
    module: Any
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own


def _register() -> None:
    for base, name in REGISTERED_NAMES.items():
        AttentionInterface.register(name, functools.partial(packed_attention, base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])


def _base_attention(base: str, module: nn.Module) -> Callable[..., Any]:
    # "eager" is no registered function: every modeling file has its own
    eager = sys.modules[type(module).__module__].eager_attention_forward
    forward: Callable[..., Any] = eager if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
    return forward


def packed_attention(
    base: str,
    module: nn.Module,
    query: torch.Tensor,  # [batch, num_q_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [batch, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [batch, num_kv_heads, num_tokens, head_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_plan: SegmentPlan | None = None,
    kv_pages: KvPages | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that Hugging Face calls: packed with a `segment_plan`, else `base`.

    Returns:
      ([batch, num_tokens, num_q_heads, head_dim], None or the weights where `base` gives them).
    """
    if segment_plan is None:
        forward = _base_attention(base, module)
        output: tuple[torch.Tensor, torch.Tensor | None] = forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output
    sm_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer_idx: Any = module.layer_idx
    out = segment_attention(
        query, key, value, segment_plan, sm_scale=sm_scale, pages=kv_pages, layer_idx=layer_idx
    )
    return out, None
