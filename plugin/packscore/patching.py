"""Give one model instance packed attention through Hugging Face's interfaces, and take it back."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

from packscore.calls import leave, program_of, serve
from packscore.errors import InputError
from packscore.inputs import checked
from packscore.interfaces import (
    ATTENTION_REGISTRY,
    attention_function,
    attention_name,
    check_patching,
)
from packscore.model.class_head import remember_drawn_head
from packscore.model.family import REGISTERED_NAMES, base_model, check_supported, layer_configs
from packscore.model.place import is_on_torchax
from packscore.model.stored import is_stored, refuse
from packscore.model.weight_watch import SIGNS, listen
from packscore.torch_engine.attention import SegmentPlan, segment_attention
from packscore.torch_engine.devices import listed_devices
from packscore.torch_engine.pages import LaunchPages
from packscore.torch_engine.replicas import drop_replicas, replicate
from packscore.torch_engine.row_plan import RowPlan, rows_attention

if TYPE_CHECKING:
    from packscore.programs.mesh.choice import MeshChoice
    from packscore.programs.row_attention import RowAttention

ModelT = TypeVar("ModelT", bound=nn.Module)


@checked
def patch_model(
    model: ModelT,
    *,
    device: str | Sequence[str | torch.device] | None = None,
    mesh: MeshChoice = None,
    compile_cache: str | Path | None = None,
) -> ModelT:
    """Give `model` the packed attention, in place.

    Only the layers of this instance change: its configuration, and models that share it, stay as
    they are. Calls that are not packed by a scorer run the model's own attention exactly as before,
    also one that is set later. Patching twice changes nothing.

    Args:
      model: a causal Hugging Face decoder (Qwen3, Qwen3-MoE, Qwen2, Llama, Mistral, Gemma 2 and 3,
        gpt-oss), PEFT-wrapped or not, using the "sdpa" or "eager" attention. Where only a
        dense mask is exact the scorer takes one, which needs no patch.
      device: None scores in torch, where the model is. "tpu" and "jax" (the device jax prefers)
        score through compiled programs that share the weights of a model on the CPU; "auto" is
        "tpu" where jax sees one. Ordinary calls in eval mode, `model(input_ids=...)` with or
        without an `attention_mask`, run through the programs too: they return no `past_key_values`
        and no gradients, and zeros at padding. All other calls stay in torch. A model on torchax is
        scored where it is, through programs that share its jax arrays; its ordinary calls stay
        torchax's, with the packed attention in the place of their own. A list of torch's devices,
        `["cuda:0", "cuda:1"]`, scores on all of them at once: each has a copy of the weights and
        pages of its own, on one of them the model itself where it is there. Copies follow the
        model; an ordinary call is the model's.
      mesh: the chips of `device` that programs run on. None: one. {"data": n, "model": m}: n copies
        of the model, each cut over m chips; launches go to the copy that is free, and queries to
        the one that has their prefix. "auto": all chips of this process, with the fewest for a copy
        that hold it. Or a `jax.sharding.Mesh` with these axes. The weights stay in the host's
        memory too; `MultiItemScorer.from_pretrained(..., mesh=...)` loads a model that this, or
        one chip, does not hold.
      compile_cache: folder that keeps compiled programs for the next process; None leaves that to
        jax, which reads JAX_COMPILATION_CACHE_DIR.

    Returns:
      The same object.

    Raises:
      UnsupportedModelError: the model cannot be scored exactly when packed, or not in programs; the
        message says why.
      InputError: there is no such device, a `compile_cache` or a `mesh` and no device to compile
        for, or a mesh that is not there or does not divide the model.
      InputTypeError: an entry of a list is no device.
      UnsupportedVersionError: torch, transformers, jax or torchax has not what packscore reads of
        it; the message names it, and versions that have it.
      MissingPackageError: there is a device, and jax or torchax is not installed.
    """
    check_patching()
    check_supported(model)
    check_patching(base_model(model).config.model_type)
    listed = None if device is None or isinstance(device, str) else listed_devices(device)
    compiles = isinstance(device, str) or is_on_torchax(model)
    if not compiles and is_stored(inner := base_model(model)) and (listed or not program_of(inner)):
        refuse(f"patch_model with {device=}")
    if compile_cache is not None and not compiles:
        raise InputError(
            f"compile_cache={str(compile_cache)!r} keeps compiled programs, and {device=} compiles "
            "none; pass device='tpu', 'jax' or 'auto'"
        )
    if mesh is not None and not (isinstance(device, str) and not is_on_torchax(model)):
        raise InputError(
            f"mesh={mesh!r} says which chips run the programs of a model on the CPU, and with "
            f"{device=} this one is scored where it is; pass device='tpu' or 'jax', and a model on "
            "the CPU"
        )
    if listed is not None and compiles:
        raise InputError(
            f"{device=} is a list of torch's devices, and the model is on torchax; pass "
            "device=None, or move the model to the CPU"
        )
    if listed is not None:
        replicate(model, listed)
    _register()
    for layer, config in layer_configs(model):
        layer.config = config if isinstance(config, PatchedConfig) else PatchedConfig(config)
    remember_drawn_head(base_model(model))
    if listed is not None:
        leave(base_model(model))
    elif compiles:
        assert device is None or isinstance(device, str)
        _compile(model, device, mesh, None if compile_cache is None else Path(compile_cache))
    return model


def _compile(
    model: nn.Module, device: str | None, mesh: MeshChoice, compile_cache: Path | None
) -> None:
    # imported here: jax and torchax come into the process on the JAX path only
    from packscore.programs.device import resolve_device
    from packscore.programs.mesh.choice import resolve_mesh
    from packscore.programs.program import ModelProgram

    inner = base_model(model)
    found = resolve_device(device, inner)
    if found is None and mesh is not None:
        raise InputError(
            f"{mesh=} needs chips, and {device=} finds none; pass device='jax' or none"
        )
    if found is None:
        return
    copies = resolve_mesh(mesh, found[0], inner)
    program = program_of(inner)
    if program is None or program.copies != copies:
        program = ModelProgram(inner, copies=copies, implementation=found[1])
    program.compile_cache = compile_cache or program.compile_cache
    drop_replicas(inner)
    serve(inner, program)


def unpatch_model(model: ModelT) -> ModelT:
    """Undo `patch_model`, in place; does nothing to a model that is not patched.

    Returns:
      The same object; its logits are bit-identical to before it was patched.

    Raises:
      UnsupportedModelError: its weights are on the chips of a mesh alone.
    """
    if is_stored(base_model(model)):
        refuse("unpatch_model")
    for layer, config in layer_configs(model):
        if isinstance(config, PatchedConfig):
            layer.config = config.own
    leave(base_model(model))
    drop_replicas(model)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch_model` is in effect on `model`, in all of its layers."""
    names = REGISTERED_NAMES.values()
    found = [attention_name(config) for _, config in layer_configs(model)]
    return bool(found) and all(name in names for name in found)


@contextmanager
def patched(model: ModelT) -> Iterator[ModelT]:
    """`with patched(model):` patches for the block and leaves the model as it was found."""
    found_patched = is_patched(model)
    try:
        yield patch_model(model)
    finally:
        if not found_patched:
            unpatch_model(model)


class PatchedConfig:
    """What a patched layer has as its configuration: its own, but for the attention it names.

    The model's stays as it is, so that whatever reads there which attention serves ordinary calls,
    or sets another (`set_attn_implementation`, continuous batching), finds what it knows.

    Args:
      own: the layer's configuration.
    """

    own: PreTrainedConfig

    def __init__(self, own: PreTrainedConfig) -> None:
        self.__dict__["own"] = own

    @property
    def _attn_implementation(self) -> str:
        name = attention_name(self.own) or "eager"
        return REGISTERED_NAMES.get(name, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.own, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy in another process finds our attention
        return _unpickled, (self.own,)


def _unpickled(own: PreTrainedConfig) -> PatchedConfig:
    _register()
    return PatchedConfig(own)


def _register() -> None:
    listen()
    for base, name in REGISTERED_NAMES.items():
        ATTENTION_REGISTRY()(name, functools.partial(packed_attention, base))


def packed_attention(
    base: str,
    module: nn.Module,
    query: torch.Tensor,  # [batch, num_q_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [batch, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,  # [batch, num_kv_heads, num_tokens, head_dim]
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segment_plan: SegmentPlan | RowPlan | None = None,
    kv_pages: LaunchPages | None = None,
    row_attention: RowAttention | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function that Hugging Face calls: `base`, unless the call brings another.

    A scorer brings a `segment_plan`, an ordinary call on torchax a `row_attention`.

    Returns:
      ([batch, num_tokens, num_q_heads, head_dim], None or the weights where `base` gives them).
    """
    if module.training:
        SIGNS.trained(module)
    sm_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if row_attention is not None:
        return row_attention(query, key, value, sm_scale), None
    if segment_plan is None:
        forward = attention_function(base, module)
        output: tuple[torch.Tensor, torch.Tensor | None] = forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # as in the attention it stands for: one dtype for all three, and float64 stays
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value)
        )
    where: dict[str, Any] = {
        "pages": kv_pages.pages if kv_pages else None,
        "layer_idx": kv_pages.next_layer() if kv_pages else 0,
    }
    if isinstance(segment_plan, RowPlan):
        out = rows_attention(query, key, value, segment_plan, sm_scale=sm_scale, **where)
    else:
        out = segment_attention(query, key, value, segment_plan, sm_scale=sm_scale, **where)
    return out, None
