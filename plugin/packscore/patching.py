"""Give one model instance packed attention through Hugging Face's interfaces, and take it back."""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from packscore.calls import leave, program_of, serve
from packscore.errors import InputError
from packscore.inputs import checked
from packscore.model.class_head import remember_drawn_head
from packscore.model.family import (
    BASES,
    REGISTERED_NAMES,
    base_model,
    check_supported,
    configs_of,
    is_patched,
)
from packscore.model.weight_watch import SIGNS, listen
from packscore.torch_engine.attention import SegmentPlan, segment_attention
from packscore.torch_engine.pages import LaunchPages

ModelT = TypeVar("ModelT", bound=nn.Module)
MARK = "_packscore"  # the attribute of a patched model
BATCHING = "init_continuous_batching"  # what `generate_batch` begins with


@checked
def patch_model(
    model: ModelT, *, device: str | None = None, compile_cache: str | Path | None = None
) -> ModelT:
    """Give `model` the packed attention, in place.

    Only this instance changes: its configuration is copied first, so that models which shared it
    stay as they are. Calls that are not packed by a scorer run the model's own attention exactly
    as before. Patching twice changes nothing.

    Args:
      model: a causal Hugging Face decoder (Qwen3, Qwen3-MoE, Qwen2, Llama, Mistral, Gemma 2 and 3,
        gpt-oss), PEFT-wrapped or not, using the "sdpa" or "eager" attention. Where only a
        dense mask is exact the scorer takes one, which needs no patch.
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
      UnsupportedModelError: the model cannot be scored exactly when packed, or not in programs; the
        message says why.
      InputError: there is no such device, or a `compile_cache` and no device to compile for.
    """
    if compile_cache is not None and device is None:
        raise InputError(
            f"compile_cache={str(compile_cache)!r} keeps compiled programs, and {device=} compiles "
            "none; pass device='tpu', 'jax' or 'auto'"
        )
    check_supported(model)
    _register()
    if not is_patched(model):
        switch_attention(model, _ours)
    base_model(model).__dict__[MARK] = Mark()
    base_model(model).__dict__[BATCHING] = OwnBatching(base_model(model))
    remember_drawn_head(base_model(model))
    if device is not None:
        _compile(model, device, None if compile_cache is None else Path(compile_cache))
    return model


def _compile(model: nn.Module, device: str, compile_cache: Path | None) -> None:
    # imported here: jax and torchax come into the process on the JAX path only
    from packscore.programs.program import ModelProgram, resolve_device

    found = resolve_device(device)
    inner = base_model(model)
    if found is None:
        return
    program = program_of(inner)
    if program is None or program.device != found[0]:
        program = ModelProgram(inner, device=found[0], implementation=found[1])
    program.compile_cache = compile_cache or program.compile_cache
    serve(inner, program)


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model`, in place; does nothing to a model that is not patched.

    Returns:
      The same object; its logits are bit-identical to before it was patched.
    """
    if base_model(model).config._attn_implementation in BASES:
        switch_attention(model, lambda name: BASES.get(name, name))
        for name in (MARK, BATCHING):
            base_model(model).__dict__.pop(name, None)
        leave(base_model(model))
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


class Mark:
    """What a patched model carries, so that its copy in another process finds our attention."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _mark, ()


class OwnBatching:
    """What `model.init_continuous_batching` is while the model is patched.

    Continuous batching knows attentions by their names, and takes none that it does not know: from
    its beginning until the manager stops, the model has its own again, and cannot be scored.

    Args:
      model: held weakly, for the model holds this.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnBatching, (self._model(),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The manager, which gives the model the packed attention back when it stops."""
        model: Any = self._model()
        name = model.config._attn_implementation
        begin = functools.partial(type(model).init_continuous_batching, model, *args, **kwargs)
        if name not in BASES:  # another manager runs
            return begin()
        model.set_attn_implementation(BASES[name])
        try:
            manager = begin()
        except BaseException:
            model.set_attn_implementation(name)
            raise
        manager._original_attn_impl = name
        return manager


def _mark() -> Mark:
    _register()
    return Mark()


def _ours(name: str) -> str:
    """The registered name that stands for an implementation; for one of another kind, "sdpa"'s."""
    return name if name in BASES else REGISTERED_NAMES.get(name, REGISTERED_NAMES["sdpa"])


def switch_attention(model: nn.Module, named: Callable[[str], str]) -> Callable[[], None]:
    """Name other attentions in configurations of the model's own.

    Modules that share a configuration share its copy, and no other model does.

    Args:
      model: the model.
      named: the name to have, of the one that is there.

    Returns:
      What gives the modules their old configurations back.
    """
    before: Any = configs_of(model)
    own: dict[int, Any] = {}
    for module, config in before:
        if id(config) not in own:
            own[id(config)] = copied = copy.deepcopy(config)
            copied._attn_implementation_internal = named(config._attn_implementation)
        module.config = own[id(config)]

    def take_back() -> None:
        for module, config in before:
            module.config = config

    return take_back


def _register() -> None:
    listen()
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
    kv_pages: LaunchPages | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that Hugging Face calls: packed with a `segment_plan`, else `base`.

    Returns:
      ([batch, num_tokens, num_q_heads, head_dim], None or the weights where `base` gives them).
    """
    if module.training:
        SIGNS.trained(module)
    if segment_plan is None:
        forward = _base_attention(base, module)
        output: tuple[torch.Tensor, torch.Tensor | None] = forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output
    sm_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # as in the attention it stands for: one dtype for all three, and float64 stays
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value)
        )
    out = segment_attention(
        query,
        key,
        value,
        segment_plan,
        sm_scale=sm_scale,
        pages=kv_pages.pages if kv_pages else None,
        layer_idx=kv_pages.next_layer() if kv_pages else 0,
    )
    return out, None
