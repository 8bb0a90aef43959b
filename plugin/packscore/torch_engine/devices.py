"""A list of torch's devices, as an argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from packscore.errors import InputError, InputTypeError
from packscore.inputs import as_list, short

# What is asked for by name alone, and is no device of torch.
OF_PROGRAMS = ("tpu", "jax", "auto")


def listed_devices(devices: Sequence[str | torch.device]) -> list[torch.device]:
    """Devices that each get a copy of a model; a CPU may be named twice.

    Raises:
      InputTypeError: an entry is no name and no `torch.device`.
      InputError: there are none, one is not there or gets no copy, or one has two.
    """
    found: list[torch.device] = []
    named = as_list("device", devices)
    for i, value in enumerate(named):
        name = f"device={short(named)}: entry {i}, {short(value)},"
        device = _device(name, value)
        if device in found and device.type != "cpu":
            raise InputError(
                f"{name} names {device} again, and two copies take its memory and gain nothing; "
                "each must be named once"
            )
        found.append(device)
    return found


def _device(name: str, value: Any) -> torch.device:
    if not isinstance(value, str | torch.device):
        raise InputTypeError(
            f"{name} is a {type(value).__name__}, and must be a torch.device or its name, such as "
            "'cuda:0'"
        )
    if value in OF_PROGRAMS:
        raise InputError(
            f"{name} is no device of torch, which all of a list must be, as ['cuda:0', 'cuda:1'] "
            f"are; pass device={value!r} in the place of the list"
        )
    try:
        device = torch.empty(0, device=value).device  # with its number, where it has one
    except Exception as error:  # torch has no one error for it
        raise InputError(
            f"{name} cannot be used ({str(error).splitlines()[0]}), and must be a device that "
            "torch sees"
        ) from error
    if device.type == "meta":
        raise InputError(f"{name} holds no weights, and must be a device that computes")
    return device
