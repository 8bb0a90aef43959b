"""Whether all that a model computes is known: what is not runs as the model's own whole forward."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from packscore.errors import UnsupportedModelError
from packscore.interfaces import DROPOUT, MODULES, global_hooks, hooks_of

# Whose modules, forwards and hooks are known to do what their names say. Of a model built on those,
# a class that brings its own forward is not.
KNOWN_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "packscore")
# PEFT methods whose layers are a function of one token's vector: weights that are added to,
# multiplied or rotated. The others route by the sequence, read positions, or draw at random.
TOKEN_TUNERS = frozenset(
    [
        *(
            "_buffer_dict",
            "adalora",
            "boft",
            "c3a",
            "delora",
            "fourierft",
            "gralora",
            "hira",
            "hra",
        ),
        *(
            "ia3",
            "ln_tuning",
            "loha",
            "lokr",
            "lora",
            "lycoris_utils",
            "miss",
            "mixed",
            "oft",
            "osf",
        ),
        *("psoft", "randlora", "road", "shira", "trainable_tokens", "tuners_utils", "vblora"),
        *("vera", "waveft"),
    ]
)
TOKEN_VARIANTS = ("Dora", "QALora", "BdLora", "MiCA", "Kasa")
# Quantised layers that scale all tokens' activations by what is largest among them.
SEQUENCE_QUANTISERS = ("torch.ao.", "torchao.")


def check_token_wise(model: nn.Module) -> None:
    """Refuse, by name, adapters and quantisers that let one token change another's vector.

    Raises:
      UnsupportedModelError: there is one, or one that nobody knows.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        home = type(module).__module__
        where = f"{name!r} is a {type(module).__name__} of {home}"
        if home.startswith(SEQUENCE_QUANTISERS):
            raise UnsupportedModelError(
                f"{where}, which scales activations by the whole sequence's, so that items would "
                "change each other's scores; load the model unquantised, or quantise weights alone "
                "(bitsandbytes)"
            )
        tuner = home.split(".")[2:3] if home.startswith("peft.tuners.") else []
        if tuner and tuner[0] not in TOKEN_TUNERS:
            raise UnsupportedModelError(
                f"{where}, an adapter that is not known to act on one token alone; merge it "
                "(merge_and_unload()), or use one such as LoRA"
            )
        for adapter, variant in _variants(module).items():
            if not type(variant).__name__.startswith(TOKEN_VARIANTS):
                raise UnsupportedModelError(
                    f"{name!r} has the adapter {adapter!r} with a {type(variant).__name__}, not "
                    "known to act on one token alone; use plain LoRA, DoRA or rsLoRA"
                )
    for name, parameter in model.named_parameters():
        kind = type(parameter)
        if kind.__module__.startswith(SEQUENCE_QUANTISERS):
            raise UnsupportedModelError(
                f"parameter {name!r} is a {kind.__name__}, which may scale activations by the "
                "whole sequence's; load the model unquantised"
            )


def foreign_part(model: nn.Module, but_hooks_of: Iterable[nn.Module] = ()) -> str | None:
    """What in a model computes something that is not known; None: all of it is known.

    It names hooks, forwards put on an instance or a class, classes of other libraries, and
    attention that is not causal. What is foreign may do anything, mix tokens among it.

    Args:
      model: the model.
      but_hooks_of: modules that run as they are, and their hooks with them.
    """
    run = set(but_hooks_of)
    if global_hooks():
        return "a global forward hook"
    for name, module in model.named_modules(remove_duplicate=False):
        own: Any = module.__dict__
        where = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if not all(map(_is_known, hooks_of(module))) and module not in run:
            return f"a forward hook of the {where}"
        forward = theirs(own.get("forward"))
        if forward is not None and not _is_known(forward):
            return f"a forward put on the {where}"
        if not _is_known(type(module).forward):
            return f"a forward of its own in the class of the {where}"
        if own.get("is_causal") is False:
            return f"is_causal=False of the {where}"
    return None


def theirs(forward: Any) -> Any:
    """The forward that somebody put on an instance, also where packscore's stands before it."""
    return forward.own if type(forward).__module__ == "packscore.calls" else forward


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """All modules; several times faster than `model.modules()`, for it runs every request."""
    modules: list[nn.Module | None] = [model]
    name = MODULES.name
    while modules:
        module = modules.pop()
        if module is not None:
            yield module
            modules.extend(getattr(module, name).values())


def random_part(model: nn.Module) -> str | None:
    """Where dropout may be at work: "" for the whole model, ".name" for a part; None: nowhere."""
    if model.training:
        return ""
    for module in modules_of(model):
        if module.training and _drops(module):
            return next(f".{name}" for name, other in model.named_modules() if other is module)
    return None


def _drops(module: nn.Module) -> bool:
    name = "p" if isinstance(module, DROPOUT()) else "attention_dropout"
    return bool(getattr(module, name, 0))


def _variants(module: nn.Module) -> dict[str, Any]:
    return dict(getattr(module, "lora_variant", None) or {})


def _is_known(function: Any) -> bool:
    """Whether the code that runs is a known library's, whatever it says of itself."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__func__", function)
    # __module__ is copied by functools.wraps; a function's globals are those of its file
    names = getattr(function, "__globals__", None)
    home = names.get("__name__", "") if names else type(function).__module__
    return str(home).partition(".")[0] in KNOWN_LIBRARIES
