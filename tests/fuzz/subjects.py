"""Random small models, and everything that happens to them between two calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from helpers import FAMILIES, random_classifier, random_decoder
from model_changes import CHANGES, step
from packscore.model.family import base_model, is_classifier

Engine = Literal["torch", "dense", "jax"]
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
KINDS = (*FAMILIES, "classifier")


@dataclass(frozen=True)
class Subject:
    """What a model is made of, and which engine scores with it."""

    kind: str = "qwen3"
    engine: Engine = "torch"
    dtype: str = "float32"
    num_heads: int = 4
    num_kv_heads: int = 2
    num_layers: int = 2
    tied: bool = False
    is_wrapped: bool = False  # by PEFT, with an adapter
    has_small_cache: bool = False  # six pages: what is kept is evicted

    def make(self) -> Any:
        sizes = {
            "num_key_value_heads": self.num_kv_heads,
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
        }
        if self.kind == "classifier":
            model: Any = random_classifier(**sizes)
        elif self.kind == "qwen3":
            model = random_decoder(
                "qwen3",
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                num_layers=self.num_layers,
                tied=self.tied,
            )
        else:
            model = random_decoder(self.kind, **sizes, tie_word_embeddings=self.tied)
        model = model.to(DTYPES[self.dtype])
        if self.is_wrapped:
            torch.manual_seed(0)
            model = get_peft_model(model, lora()).eval()
        return model


def lora() -> LoraConfig:
    return LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"])


@dataclass(frozen=True)
class Step:
    """A change of the machine's own.

    Args:
      make: what happens to the (perhaps wrapped) model.
      refused: what programs say of it; None: they follow.
      fits: whether it can happen to the model as it is.
    """

    make: Callable[[Any], None]
    refused: str | None = None
    fits: Callable[[Any], bool] = lambda _: True


def layers_of(model: Any) -> Any:
    return base_model(model).get_decoder().layers


def adapter_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "merged_adapters")]


def has_adapter(model: Any) -> bool:
    return bool(adapter_layers(model))


def has_no_adapter(model: Any) -> bool:
    return not has_adapter(model)


def is_language_model(model: Any) -> bool:
    return not is_classifier(base_model(model))


def has_two_layers(model: Any) -> bool:
    """And runs them: its configuration may say fewer, but not none."""
    return min(len(layers_of(model)), base_model(model).config.num_hidden_layers) > 1


def has_few_layers(model: Any) -> bool:
    return len(layers_of(model)) < 4


def has_plain_mlp(model: Any) -> bool:
    return type(getattr(layers_of(model)[0].mlp, "up_proj", None)) is nn.Linear and not hasattr(
        layers_of(model)[0].mlp.up_proj, "parametrizations"
    )


def every(model: Any, make: Callable[[Any], None]) -> None:
    for layer in adapter_layers(model):
        make(layer)


def names_of(model: Any) -> list[str]:
    return sorted(adapter_layers(model)[0].lora_A)


def adapter_added(model: Any) -> None:
    torch.manual_seed(len(adapter_layers(model)))
    name = f"other{len(names_of(model)) if has_adapter(model) else 0}"
    inject_adapter_in_model(lora(), base_model(model), adapter_name=name)
    every(model, lambda layer: layer.set_adapter(name))
    model.eval()


def adapter_swapped(model: Any) -> None:
    first = adapter_layers(model)[0]
    names = names_of(model)
    at = names.index(first.active_adapters[0]) if first.active_adapters else -1
    every(model, lambda layer: layer.set_adapter(names[(at + 1) % len(names)]))


def adapter_off(model: Any) -> None:
    every(model, lambda layer: layer.enable_adapters(False))


def adapter_on(model: Any) -> None:
    every(model, lambda layer: layer.enable_adapters(True))


def adapter_merged(model: Any) -> None:
    every(model, lambda layer: layer.merge())


def adapter_unmerged(model: Any) -> None:
    every(model, lambda layer: layer.unmerge() if layer.merged else None)


def adapter_scaled(model: Any) -> None:
    every(model, lambda layer: layer.scale_layer(1.5))


def plain_step(model: Any) -> None:
    step(base_model(model), foreach=False)


def unfrozen(make: Callable[[Any], None]) -> Callable[[Any], None]:
    """Adapters freeze what they are put on, and merged ones have no gradient themselves."""

    def made(model: Any) -> None:
        model.requires_grad_(True)
        make(model)

    return made


def only_the_embedding_steps(model: Any) -> None:
    """Sparse in effect: a few rows change."""
    base = base_model(model)
    weight = base.get_input_embeddings().weight
    weight.grad = torch.zeros_like(weight)
    weight.grad[2:40] = 1
    torch.optim.SGD([weight], lr=0.3, fused=True).step()
    weight.grad = None


def row_through_a_view(model: Any) -> None:
    layers_of(model)[0].post_attention_layernorm.weight.detach()[3:9].mul_(1.7)


def values_in_place(model: Any) -> None:
    with torch.no_grad():
        base_model(model).get_decoder().norm.weight.mul_(1.2)


def values_through_numpy(model: Any) -> None:
    weight = layers_of(model)[0].self_attn.o_proj.weight.detach()
    bits = weight.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]).numpy()
    bits[:] = bits[::-1].copy()


def float32(model: Any) -> None:
    model.float()


def return_dict_off(model: Any) -> None:
    base_model(model).config.return_dict = False


def is_counted(model: Any) -> bool:
    """Whether its values can be written at all outside of inference mode."""
    return not any(p.is_inference() for p in model.parameters())


def can_step(model: Any) -> bool:
    base = base_model(model)
    # hooks that take an output's name fail on a tuple
    return (
        is_counted(model) and base.dtype != torch.float16 and base.config.return_dict is not False
    )


PLAIN = "is not one of a plain"
HEADS = {"head_replaced", "head_with_a_bias", "head_of_two", "hook_on_the_head"}


def _fits_change(name: str) -> Callable[[Any], bool]:
    def fits(model: Any) -> bool:
        base = base_model(model)
        if name in ("bfloat16", "float16", "float64"):
            return base.config.model_type != "qwen3_moe"
        if name in HEADS or name in ("forward_of_the_model", "hook_on_the_model"):
            if is_classifier(base) and name in HEADS:
                return False
            if name == "head_of_two" and type(base.lm_head) is not nn.Linear:
                return False
        if name in ("layer_replaced", "layer_in_two_places") or name in FEWER:
            return has_two_layers(model)
        if name == "layer_appended":
            return has_few_layers(model)
        if name in ("parametrized", "one_value_through_numpy"):
            is_wide = name == "parametrized" or base.dtype in (torch.float32, torch.float64)
            return is_counted(model) and has_plain_mlp(model) and has_two_layers(model) and is_wide
        if name == "module_wrapped":
            return hasattr(layers_of(model)[0].input_layernorm, "weight")
        if name in ("fused_step", "foreach_step"):
            return can_step(model)
        if name in ("state_assigned", "under_inference_mode"):
            return is_counted(model) and is_language_model(model)
        writes = ("written_through_data", "vector_to_parameters", "state_loaded", "rotary_buffer")
        return name not in writes or is_counted(model)

    return fits


def _on_base(name: str, make: Callable[[Any], None]) -> Callable[[Any], None]:
    steps = name in ("fused_step", "foreach_step")
    return lambda model: (unfrozen(make) if steps else make)(base_model(model))


FEWER = ("layer_removed", "fewer_layers_by_the_configuration")
OWN: dict[str, Step] = {
    "adapter_added": Step(adapter_added, PLAIN),
    "adapter_swapped": Step(adapter_swapped, None, has_adapter),
    "adapter_off": Step(adapter_off, None, has_adapter),
    "adapter_on": Step(adapter_on, None, has_adapter),
    "adapter_merged": Step(
        adapter_merged, None, lambda model: has_adapter(model) and is_counted(model)
    ),
    "adapter_unmerged": Step(
        adapter_unmerged, None, lambda model: has_adapter(model) and is_counted(model)
    ),
    "adapter_scaled": Step(adapter_scaled, None, has_adapter),
    "plain_step": Step(unfrozen(plain_step), None, can_step),
    "only_the_embedding_steps": Step(only_the_embedding_steps, None, is_counted),
    "row_through_a_view": Step(row_through_a_view, None, is_counted),
    "values_in_place": Step(values_in_place, None, is_counted),
    "values_through_numpy": Step(
        values_through_numpy,
        None,
        lambda model: is_counted(model) and hasattr(layers_of(model)[0].self_attn.o_proj, "weight"),
    ),
    "float32": Step(float32),
    "return_dict_off": Step(return_dict_off),
}
STEPS: dict[str, Step] = OWN | {
    one.name: Step(_on_base(one.name, one.make), one.refused, _fits_change(one.name))
    for one in CHANGES
}


# by what they are, so that a draw takes each kind as often
VALUES = (
    *("fused_step", "foreach_step", "plain_step", "only_the_embedding_steps", "state_loaded"),
    *("written_through_data", "one_value_through_numpy", "vector_to_parameters", "rotary_buffer"),
    *("row_through_a_view", "values_in_place", "values_through_numpy"),
)
ADAPTERS = tuple(name for name in STEPS if name.startswith("adapter"))
MODULES = (
    *("layer_replaced", "layer_in_two_places", "layer_appended", "layer_removed", "parametrized"),
    *("head_replaced", "head_with_a_bias", "head_of_two", "module_wrapped"),
    *("state_assigned", "under_inference_mode"),
    *("bfloat16", "float16", "float32", "float64"),
)
OTHERS = tuple(sorted(set(STEPS) - {*VALUES, *ADAPTERS, *MODULES}))


Runs = list[tuple[nn.Module, dict[str, Any], dict[Any, Any], dict[Any, Any]]]
NAMES = ("forward", "is_causal", "variance_epsilon")


def what_runs(model: Any) -> Runs:
    """What every module has of its own to run: what stands on it, its hooks."""
    return [
        (
            module,
            {name: module.__dict__[name] for name in NAMES if name in module.__dict__},
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
        )
        for module in model.modules()
    ]


def put_back(found: Runs) -> None:
    for module, own, hooks, pre_hooks in found:
        for name in NAMES:
            module.__dict__.pop(name, None)
        module.__dict__.update(own)
        for now, before in ((module._forward_hooks, hooks), (module._forward_pre_hooks, pre_hooks)):
            now.clear()
            now.update(before)
